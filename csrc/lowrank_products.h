// Y = X q and Z += XᵀY for some rows of a difference X, with operands in fp32 or, where the processor has dot products of
// bf16 pairs, rounded to bf16, and fp32 sums. After lowrank_panel.h.
//
// Both products go through one tile: terms of the left operand along the contraction are broadcast, those of the right
// one lie kLanes columns to a vector. A term is an fp32 number, or two bf16 ones that the contraction meets one after the
// other. A block of the pair is written once (in bf16 once for each order of pairs: along its lines, across them), its
// Y goes from registers to where the second product takes it, and Z takes the sums as they are: nothing is larger than
// a cache.

typedef uint32_t vu_any __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr int kStrip = X86_LEVEL >= 4 ? 4 : 2;  // vectors of columns whose sums, for some rows, take most registers
// Of a block of X: a core's own cache at the most.
constexpr int64_t kRows = 128, kEntries = int64_t(1) << (X86_LEVEL >= 4 ? 18 : 16);
// Summed before the sums are: longer sums of equal terms are off by more than bounds allow.
constexpr int64_t kTerms = 64, kPairs = 256;

INLINE vu interleaved(vf even, vf odd) { return joined(rounded(even), rounded(odd)); }

// Terms: fp32 numbers, or pairs of bf16 or of 16-bit integers. Sums of the last are integers too.
enum Kind { kFloats, kHalves, kIntegers };

template <Kind kind>
INLINE vf dot(vf sum, uint32_t left, vu right) {
    const vu both = vu{} + left;
#if X86_LEVEL == 5
    if (kind == kHalves) return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)right);
#endif
    if (kind == kIntegers) {
#if X86_LEVEL >= 4  // for processors with VNNI, which the level does not ask for
        asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(both), "v"(right));
#else  // in one piece: the compiler would keep all products until it adds them, in memory
        vf products;
        asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(both), "x"(right));
#endif
        return sum;
    }
    return (vf)both * (vf)right + sum;
}

// A left operand: term k of row i at at[i · row + k · step].
struct Terms {
    const uint32_t* at;
    int64_t row, step;
};

// R rows and C vectors of columns; store(i, sums of row i, of row i + 1) for even i.
template <Kind kind, int R, int C, class Store>
INLINE void tile(const Terms left, const uint32_t* right, int64_t pitch, int64_t terms, const Store& store) {
    vf sums[R][C] = {};
    const uint32_t* at = left.at;
    for (int64_t k = 0; k < terms; ++k, at += left.step, right += pitch) {
        vu columns[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) columns[c] = *(const vu_any*)(right + c * kLanes);
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[i][c] = dot<kind>(sums[i][c], at[i * left.row], columns[c]);
    }
#pragma GCC unroll 12
    for (int i = 0; i < R; i += 2) store(i, sums[i], sums[i + 1]);
}

template <bool half, int C, class Store>
static void strip(Terms left, int64_t rows, const uint32_t* right, int64_t pitch, int64_t terms, const Store& store) {
    constexpr Kind kind = half ? kHalves : kFloats;
    constexpr int R = C == kStrip ? 6 : C == 3 ? 8 : 12;
    int64_t i = 0;
    const auto from = [&](int64_t i) { return Terms{left.at + i * left.row, left.row, left.step}; };
    for (; i + R <= rows; i += R)
        tile<kind, R, C>(from(i), right, pitch, terms,
                         [&](int j, const vf* even, const vf* odd) { store(i + j, even, odd, C); });
    for (; i < rows; i += 2)
        tile<kind, 2, C>(from(i), right, pitch, terms,
                         [&](int j, const vf* even, const vf* odd) { store(i + j, even, odd, C); });
}

// store(i, first vector of columns, sums of row i, of row i + 1, their vectors); rows are even.
template <bool half, class Store>
static void product(Terms left, int64_t rows, const uint32_t* right, int64_t pitch, int64_t terms, const Store& store) {
    const int vectors = int(pitch / kLanes), strips = (vectors + kStrip - 1) / kStrip;
    for (int s = 0, from = 0; s < strips; ++s) {
        const int to = (s + 1) * vectors / strips, count = to - from;
        const uint32_t* const b = right + from * kLanes;
        const auto put = [&, from](int64_t i, const vf* even, const vf* odd, int c) { store(i, from, even, odd, c); };
        if constexpr (kStrip == 4) {
            if (count == 4) strip<half, 4>(left, rows, b, pitch, terms, put);
            if (count == 3) strip<half, 3>(left, rows, b, pitch, terms, put);
        }
        if (count == 2) strip<half, 2>(left, rows, b, pitch, terms, put);
        if (count == 1) strip<half, 1>(left, rows, b, pitch, terms, put);
        from = to;
    }
}

// One stage of a transposition: swaps the quarters off the diagonal of every 2 · size lanes of as many vectors.
template <int size, int... lane>
INLINE void swap_quarters(vu x[kLanes], std::integer_sequence<int, lane...>) {
    const vu upper{uint32_t(lane & size ? lane - size + kLanes : lane)...};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (i & size) continue;
        const vu a = x[i], b = x[i + size];
        x[i] = __builtin_shuffle(a, b, upper), x[i + size] = __builtin_shuffle(a, b, upper + size);
    }
}

INLINE void transpose(vu x[kLanes]) {
    constexpr std::make_integer_sequence<int, kLanes> lanes;
    if constexpr (kLanes > 8) swap_quarters<8>(x, lanes);
    if constexpr (kLanes > 4) swap_quarters<4>(x, lanes);
    swap_quarters<2>(x, lanes), swap_quarters<1>(x, lanes);
}

// Rows of XΩ for an Ω of signs, fp32 ones or pairs in bf16: as many additions an element of X as there are signs in a
// row of Ω, kLanes of them at a time, whose sums stay in the first-level cache. Term k of row p lies at
// rows[k · pitch + p] (by_term) or rows[p · pitch + k]; rows are padded to a multiple of kLanes in `out` and by_term also
// in memory.
template <bool half>
static void signed_sums(const uint32_t* rows, int64_t pitch, bool by_term, int64_t count, int64_t terms,
                        const int32_t* places, int signs, int64_t width, vf* sums, uint32_t* out) {
    constexpr int kEach = half ? 2 : 1;
    for (int64_t p = 0; p < count; p += kLanes) {
        memset(sums, 0, kEach * width * sizeof(vf));
        for (int64_t k = 0; k < terms; k += kLanes) {
            const int held = int(std::min<int64_t>(kLanes, terms - k));
            vu x[kLanes] = {};
            if (by_term)
                for (int i = 0; i < held; ++i) x[i] = *(const vu_any*)(rows + (k + i) * pitch + p);
            else {
                for (int i = 0; i < kLanes && p + i < count; ++i) x[i] = *(const vu_any*)(rows + (p + i) * pitch + k);
                transpose(x);
            }
            for (int i = 0; i < held; ++i) {
                const vu even = half ? x[i] << 16 : x[i], odd = x[i] & 0xffff0000u;
                for (int s = 0; s < signs; ++s) {
                    const uint32_t place = places[(k + i) * signs + s], flip = place << 31;
                    vf* const to = sums + (place >> 1) * kEach;
                    to[0] += (vf)(even ^ flip);
                    if (half) to[1] += (vf)(odd ^ flip);
                }
            }
        }
        for (int64_t c = 0; c < width; c += kLanes) {
            vu x[kLanes];
            for (int i = 0; i < kLanes; ++i)
                x[i] = half ? interleaved(sums[2 * (c + i)], sums[2 * (c + i) + 1]) : (vu)sums[c + i];
            transpose(x);
            for (int i = 0; i < kLanes; ++i) *(vu_any*)(out + (p + i) * width + c) = x[i];
        }
    }
}

// Room for `elements` of 32 bits, of this thread until it asks again, in cache lines of their own.
static uint32_t* scratch(int64_t elements) {
    thread_local std::vector<uint32_t> room;
    if (int64_t(room.size()) < elements + 16) room.resize(elements + 16);
    return (uint32_t*)(((uintptr_t)room.data() + 63) / 64 * 64);
}

template <bool half>
static void products_in(const Products& p) {
    const Panel& x = p.x;
    const int64_t n = p.by_column ? x.length : x.lines, m = p.by_column ? x.lines : x.length;
    const int64_t width = (p.columns + 15) / 16 * 16, even_m = m + m % 2;
    const int64_t step = std::max<int64_t>(16, std::min<int64_t>(kRows, kEntries / m / 16 * 16));
    constexpr int kLine = half ? 32 : 16;  // elements of a cache line
    const int64_t lines = p.by_column ? even_m : step, longest = ((p.by_column ? step : even_m) + kLine - 1) / kLine;
    const int64_t pitch = (longest | 1) * kLine;  // an odd number of cache lines, so that lines fall into all sets
    const int64_t per_term = half ? 2 : 1;
    const int64_t right_size = (even_m / per_term * width + 15) / 16 * 16,
                  middle_size = ((step + step % 32) / per_term * width + 15) / 16 * 16;
    const int64_t partial_size = half ? std::max<int64_t>(step, 32) * width : p.places ? kLanes * width : 0;
    uint32_t* const right = scratch(right_size + middle_size + partial_size + lines * pitch);
    uint32_t *const middle = right + right_size, *const partial = half ? middle + middle_size : middle;
    uint32_t *const along = middle + middle_size + partial_size, *const across = along + lines / 2 * pitch;

    for (int64_t k = 0; k < m && !p.places; k += per_term)
        for (int64_t c = 0; c < width; c += kLanes) {
            const int left = int(p.columns - c);
            const float* const at = p.q + k * p.columns + c;
            const vf even = left > 0 ? load_some((const char*)at, kFloat32, left) : vf{};
            const vf odd = half && k + 1 < m ? load_some((const char*)(at + p.columns), kFloat32, left) : vf{};
            *(vu_any*)(right + k / per_term * width + c) = half ? interleaved(even, odd) : (vu)even;
        }

    Statistics sums;
    for (int64_t start = 0; start < n; start += step) {
        const int64_t rows = std::min(step, n - start), even_rows = rows + rows % 2;
        Panel block = x;
        (p.by_column ? block.length : block.lines) = rows;
        block.x += (p.by_column ? start : start * x.x_pitch) * size_of(x.x_dtype);
        if (block.b) block.b += (p.by_column ? start : start * x.b_pitch) * size_of(x.b_dtype);
        block.out = (char*)along, block.out_dtype = half ? kBFloat16 : kFloat32, block.out_pitch = pitch;
        // What needs no subtraction, no rounding and no row more is read where it lies.
        const bool there = !half && x.x_dtype == kFloat32 && !x.b && x.scale == 1 && !p.statistics && !p.by_column &&
                           rows == even_rows && (!p.places || m % kLanes == 0);
        if (!there) write_lines(block, sums, p.statistics, p.full);

        if (half) {
            uint16_t* const pairs = (uint16_t*)along;
            if (block.lines % 2) memset(pairs + block.lines * pitch, 0, block.length * 2);
            if (block.length % 2)
                for (int64_t line = 0; line < block.lines + block.lines % 2; ++line)
                    pairs[line * pitch + block.length] = 0;
            for (int64_t line = 0; line < block.lines; line += 2)
                for (int64_t i = 0; i < block.length; i += kLanes) {
                    const uint16_t* const at = pairs + line * pitch + i;
                    const vu even = __builtin_convertvector(*(const vh_any*)at, vu);
                    const vu odd = __builtin_convertvector(*(const vh_any*)(at + pitch), vu);
                    *(vu_any*)(across + line / 2 * pitch + i) = even | odd << 16;
                }
        }
        const uint32_t* const read = there ? (const uint32_t*)block.x : along;
        const int64_t read_pitch = there ? x.x_pitch : pitch;
        const Terms by_line{read, read_pitch / per_term, 1}, by_place{half ? across : read, 1, read_pitch};

        if (p.places)
            signed_sums<half>(half && !p.by_column ? across : read, half && p.by_column ? pitch / 2 : read_pitch,
                              p.by_column, half ? even_rows / 2 : rows, m, p.places, p.signs, width,
                              (vf*)(middle + middle_size), middle);
        // Sums of some terms, then sums of those: the right operand of so many stays in cache, and fp32's rounding
        // small.
        const int64_t all = half ? even_m / 2 : m, most = half ? kPairs : kTerms;
        for (int64_t k = 0; k < all && !p.places; k += most) {
            const int64_t terms = std::min(most, all - k);
            Terms left = p.by_column ? by_place : by_line;
            left.at += k * left.step;
            product<half>(left, even_rows, right + k * width, width, terms,
                          [&](int64_t i, int vector, const vf* even, const vf* odd, int count) {
                              for (int c = 0; c < count; ++c) {
                                  const int64_t column = (vector + c) * kLanes;
                                  vf_any* const sums = (vf_any*)(partial + i * width + column);
                                  vf_any* const next = (vf_any*)(partial + (i + 1) * width + column);
                                  const vf a = k ? *sums + even[c] : even[c], b = k ? *next + odd[c] : odd[c];
                                  if (half && k + terms == all)
                                      *(vu_any*)(middle + i / 2 * width + column) = interleaved(a, b);
                                  else *sums = a, *next = b;
                              }
                          });
        }
        if (p.y)
            for (int64_t i = 0; i < rows; ++i) memcpy(p.y + (start + i) * p.columns, middle + i * width, p.columns * 4);
        if (p.z)
            product<half>(p.by_column ? by_line : by_place, even_m, middle, width, half ? even_rows / 2 : rows,
                          [&](int64_t i, int vector, const vf* even, const vf* odd, int count) {
                              for (int c = 0; c < count; ++c) {
                                  float* const to = p.z + i * width + (vector + c) * kLanes;
                                  *(vf_any*)to += even[c];
                                  *(vf_any*)(to + width) += odd[c];
                              }
                          });
    }
    if (p.statistics) write_statistics(sums, x.x_dtype, p.statistics);
}

static void products(const Products& p, bool half) {
#if X86_LEVEL == 5
    if (half) return products_in<true>(p);
#endif
    products_in<false>(p);
}
