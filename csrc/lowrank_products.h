// Y = X q and Z += XᵀY for some rows of a difference X, with operands in fp32 or, where that is faster, rounded to bf16 or
// to integers of 16 bits, and fp32 sums. After lowrank_panel.h.
//
// Both products go through one tile: terms of the left operand along the contraction are broadcast, those of the right
// one lie kLanes columns to a vector. A term is an fp32 number, or two of 16 bits that the contraction meets one after the
// other. A block of the pair is written once (as pairs once for each order: along its lines, across them), its Y goes from
// registers to where the second product takes it, and Z takes the sums as they are: nothing is larger than a cache.
//
// Integers are multiples of a unit that a block of X has for itself, and every column of q and of the block's Y, whose sizes
// differ as the σ do, such that the largest fits. Where that leaves too little of X's usual ones the block goes the way of
// fp32.

typedef uint32_t vu_any __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr int kStrip = X86_LEVEL >= 4 ? 4 : 2;  // vectors of columns whose sums, for some rows, take most registers
// Of a block of X: a core's own cache at the most.
constexpr int64_t kRows = 128, kEntries = int64_t(1) << (X86_LEVEL >= 4 ? 18 : 16);
// Summed before the sums are: longer sums of equal terms are off by more than bounds allow.
constexpr int64_t kTerms = 64, kPairs = 256, kIntegerPairs = 128;  // of integers as many as kMostWhole allows
constexpr int64_t kSums = 64;                                      // of sums of so many terms, before wider ones

// Terms: fp32 numbers, or pairs of bf16 or of 16-bit integers. Sums of the last are integers too.
enum Kind { kFloats, kHalves, kIntegers };
constexpr Kind kFastest = X86_LEVEL == 5 ? kHalves : X86_LEVEL == 3 ? kIntegers : kFloats;  // of what the level has

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

INLINE vu interleaved(vf even, vf odd) { return joined(rounded(even), rounded(odd)); }

// A pair; scale: of integers.
template <Kind kind>
INLINE vu pair_of(vf even, vf odd, vf scale) {
    if (kind == kHalves) return interleaved(even, odd);
    return ((vu)(even * scale + kWhole) & 0xffff) | (vu)(odd * scale + kWhole) << 16;
}

template <Kind kind>
INLINE vf first_of(vu pair) {
    return kind == kIntegers ? __builtin_convertvector((vi)(pair << 16) >> 16, vf) : (vf)(pair << 16);
}

template <Kind kind>
INLINE vf second_of(vu pair) {
    return kind == kIntegers ? __builtin_convertvector((vi)pair >> 16, vf) : (vf)(pair & 0xffff0000u);
}

template <Kind kind>
INLINE vf sum_of(vf sum) {
    return kind == kIntegers ? __builtin_convertvector((vi)sum, vf) : sum;
}

// The root of the mean square of a block, in units: half a unit is 4e-3 of it then, the least that bf16 tells from 1.
constexpr float kLeastUsual = 128;

// Of every column, kLanes of them or the fewer that are left.
static vf largest_of(const float* x, int64_t pitch, int64_t rows, int left) {
    vi most{};
    for (int64_t i = 0; i < rows; ++i)
        most = max_(size_bits(load_some((const char*)(x + i * pitch), kFloat32, left)), most);
    return from_bits(most);
}

// The least units, powers of two, in which these are no more than kMostWhole; numbers whose squares leave fp32 come to be
// zeros.
INLINE vf units_of(vf largest) {
    const vf fine = power(largest, kFloat32) / 2048, unit = largest > kMostWhole * fine ? 2 * fine : fine;
    return largest > 1e-30f ? unit : splat(1);
}
INLINE float unit_of(float largest) { return units_of(splat(largest))[0]; }

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

template <Kind kind, int C, class Store>
static void strip(Terms left, int64_t rows, const uint32_t* right, int64_t pitch, int64_t terms, const Store& store) {
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
template <Kind kind, class Store>
static void product(Terms left, int64_t rows, const uint32_t* right, int64_t pitch, int64_t terms, const Store& store) {
    const int vectors = int(pitch / kLanes), strips = (vectors + kStrip - 1) / kStrip;
    for (int s = 0, from = 0; s < strips; ++s) {
        const int to = (s + 1) * vectors / strips, count = to - from;
        const uint32_t* const b = right + from * kLanes;
        const auto put = [&, from](int64_t i, const vf* even, const vf* odd, int c) { store(i, from, even, odd, c); };
        if constexpr (kStrip == 4) {
            if (count == 4) strip<kind, 4>(left, rows, b, pitch, terms, put);
            if (count == 3) strip<kind, 3>(left, rows, b, pitch, terms, put);
        }
        if (count == 2) strip<kind, 2>(left, rows, b, pitch, terms, put);
        if (count == 1) strip<kind, 1>(left, rows, b, pitch, terms, put);
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

// Rows of XΩ for an Ω of signs: as many additions an element of X as there are signs in a row of Ω, kLanes of them at a
// time, whose sums stay in the first-level cache. Term k of row p, a number or a pair, lies at rows[k · pitch + p] (by_term)
// or rows[p · pitch + k]; rows are padded to a multiple of kLanes in `out` and by_term also in memory. Pairs come out as
// pairs, but of integers as rows of floats.
template <Kind kind>
static void signed_sums(const uint32_t* rows, int64_t pitch, bool by_term, int64_t count, int64_t terms,
                        const int32_t* places, int signs, int64_t width, vf* sums, uint32_t* out) {
    constexpr int kEach = kind == kFloats ? 1 : 2;
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
                const vu even = kind == kFloats ? x[i] : (vu)first_of<kind>(x[i]), odd = (vu)second_of<kind>(x[i]);
                for (int s = 0; s < signs; ++s) {
                    const uint32_t place = places[(k + i) * signs + s], flip = place << 31;
                    vf* const to = sums + (place >> 1) * kEach;
                    to[0] += (vf)(even ^ flip);
                    if (kEach == 2) to[1] += (vf)(odd ^ flip);
                }
            }
        }
        constexpr int kApart = kind == kIntegers ? 2 : 1;  // rows that come out for one of terms
        for (int64_t c = 0; c < width; c += kLanes)
            for (int odd = 0; odd < kApart; ++odd) {
                vu x[kLanes];
                for (int i = 0; i < kLanes; ++i) {
                    const vf* const at = sums + kEach * (c + i);
                    x[i] = kind == kHalves ? interleaved(at[0], at[1]) : (vu)at[odd];
                }
                transpose(x);
                for (int i = 0; i < kLanes; ++i) *(vu_any*)(out + (kApart * (p + i) + odd) * width + c) = x[i];
            }
    }
}

// Scratch of this thread, `elements` of 32 bits from a cache line on, valid until it asks again.
static uint32_t* scratch(int64_t elements) {
    thread_local std::vector<uint32_t> room;
    if (int64_t(room.size()) < elements + 16) room.resize(elements + 16);
    return (uint32_t*)(((uintptr_t)room.data() + 63) / 64 * 64);
}

// A first pass over a block, which brings it into a cache, for what decides on its unit.
static Statistics measured(Panel block, bool full) {
    Statistics sums;
    block.out = nullptr;
    write_lines(block, sums, true, full);
    return sums;
}

static float usual(const Statistics& sums, const Panel& block) {
    return float(std::sqrt(sums.squares / (double(block.lines) * double(block.length))));
}

// Lines of 16-bit elements as lines of pairs, the even line of two in the lower halves.
static void pair_up(const uint16_t* lines, int64_t pitch, int64_t count, int64_t length, uint32_t* out,
                    int64_t out_pitch) {
    for (int64_t line = 0; line < count; line += 2)
        for (int64_t i = 0; i < length; i += kLanes) {
            const uint16_t* const at = lines + line * pitch + i;
            const vu even = __builtin_convertvector(*(const vh_any*)at, vu);
            const vu odd = __builtin_convertvector(*(const vh_any*)(at + pitch), vu);
            *(vu_any*)(out + line / 2 * out_pitch + i) = even | odd << 16;
        }
}

template <Kind kind>
static void products_in(const Products& p) {
    constexpr bool paired = kind != kFloats;
    const Panel& x = p.x;
    const int64_t n = p.by_column ? x.length : x.lines, m = p.by_column ? x.lines : x.length;
    const int64_t width = (p.columns + 15) / 16 * 16, even_m = m + m % 2;
    const int64_t step = std::max<int64_t>(16, std::min<int64_t>(kRows, kEntries / m / 16 * 16));
    constexpr int kLine = paired ? 32 : 16;  // elements of a cache line
    const int64_t lines = p.by_column ? even_m : step, longest = ((p.by_column ? step : even_m) + kLine - 1) / kLine;
    const int64_t pitch = (longest | 1) * kLine;  // an odd number of cache lines, so that lines fall into all sets
    const int64_t per_term = paired ? 2 : 1;
    const int64_t right_size = (even_m / per_term * width + 15) / 16 * 16,
                  middle_size = ((step + step % 32) / per_term * width + 15) / 16 * 16;
    const int64_t partial_size = paired ? (step + step % 32) * width : 0;
    const int64_t units_size = kind == kIntegers ? 2 * width : 0;
    const int64_t signed_size = p.places ? per_term * kLanes * width : 0;
    uint32_t* const right = scratch(right_size + middle_size + partial_size + signed_size + units_size + lines * pitch);
    uint32_t *const middle = right + right_size, *const partial = paired ? middle + middle_size : middle;
    vf* const signed_room = (vf*)(middle + middle_size + partial_size);
    float *const q_units = (float*)signed_room + signed_size, *const z_units = q_units + width;  // of columns
    uint32_t *const along = (uint32_t*)q_units + units_size, *const across = along + lines / 2 * pitch;

    for (int64_t c = 0; c < width; c += kLanes) {
        const int left = std::max(int(p.columns - c), 0);
        vf unit = splat(1);
        if (kind == kIntegers && !p.places) {
            const vf largest = largest_of(p.q + c, p.columns, m, left);
            for (int i = 0; i < kLanes; ++i)
                if (!(largest[i] < kInf)) return products_in<kFloats>(p);
            unit = units_of(largest);
        }
        if (kind == kIntegers) *(vf_any*)(q_units + c) = unit;
        for (int64_t k = 0; k < m && !p.places; k += per_term) {
            const char* const at = (const char*)(p.q + k * p.columns + c);
            const vf even = load_some(at, kFloat32, left);
            const vf odd = paired && k + 1 < m ? load_some(at + p.columns * 4, kFloat32, left) : vf{};
            *(vu_any*)(right + k / per_term * width + c) = paired ? pair_of<kind>(even, odd, 1 / unit) : (vu)even;
        }
    }

    Statistics sums;
    std::vector<Panel> others;  // blocks that are no integers
    std::vector<double> wide;   // of long sums
    for (int64_t start = 0; start < n; start += step) {
        const int64_t rows = std::min(step, n - start), even_rows = rows + rows % 2;
        Panel block = x.part(p.by_column, start, rows);
        float unit = 1;
        if (kind == kIntegers) {
            const Statistics own = measured(block, p.full);
            sums.add(own);
            unit = unit_of(float(own.largest));
            if (own.nonfinite || (own.largest && usual(own, block) < kLeastUsual * unit)) {
                others.push_back(block);
                continue;
            }
            block.scale = 1 / unit;
        }
        block.out = (char*)along, block.out_pitch = pitch;
        block.out_dtype = kind == kFloats ? kFloat32 : kind == kHalves ? kBFloat16 : kInt16;
        // What needs no subtraction, no rounding and no row more is read where it lies.
        const bool there = !paired && x.x_dtype == kFloat32 && !x.b && x.scale == 1 && !p.statistics && !p.by_column &&
                           rows == even_rows && m == even_m && (!p.places || m % kLanes == 0);
        if (!there) write_lines(block, sums, p.statistics && kind != kIntegers, p.full);

        if (paired) {
            uint16_t* const pairs = (uint16_t*)along;
            if (block.lines % 2) memset(pairs + block.lines * pitch, 0, block.length * 2);
            if (block.length % 2)
                for (int64_t line = 0; line < block.lines + block.lines % 2; ++line)
                    pairs[line * pitch + block.length] = 0;
            pair_up(pairs, pitch, block.lines, block.length, across, pitch);
        }
        const uint32_t* const read = there ? (const uint32_t*)block.x : along;
        const int64_t read_pitch = there ? x.x_pitch : pitch;
        const Terms by_line{read, read_pitch / per_term, 1}, by_place{paired ? across : read, 1, read_pitch};

        if (p.places)
            signed_sums<kind>(paired && !p.by_column ? across : read, paired && p.by_column ? pitch / 2 : read_pitch,
                              p.by_column, paired ? even_rows / 2 : rows, m, p.places, p.signs, width, signed_room,
                              kind == kIntegers ? partial : middle);
        // Sums of some terms, then sums of those: the right operand of so many stays in cache, and fp32's rounding
        // small. Of many of these, sums in fp64: equal terms, as along a constant row, are rounded to one side each time.
        constexpr int64_t most = kind == kFloats ? kTerms : kind == kHalves ? kPairs : kIntegerPairs;
        const int64_t all = paired ? even_m / 2 : m;
        int64_t summed = 0;  // of the sums of terms, in partial
        wide.assign(all > most * kSums && !p.places ? even_rows * width : 0, 0);
        for (int64_t k = 0; k < all && !p.places; k += most) {
            const int64_t terms = std::min(most, all - k);
            if (summed == kSums && !wide.empty()) {
                for (size_t i = 0; i < wide.size(); ++i) wide[i] += ((const float*)partial)[i];
                summed = 0;
            }
            const bool first = summed++ == 0, last = k + terms == all;
            Terms left = p.by_column ? by_place : by_line;
            left.at += k * left.step;
            product<kind>(left, even_rows, right + k * width, width, terms,
                          [&](int64_t i, int vector, const vf* even, const vf* odd, int count) {
                              for (int c = 0; c < count; ++c) {
                                  const int64_t column = (vector + c) * kLanes;
                                  vf_any* const sums = (vf_any*)(partial + i * width + column);
                                  vf_any* const next = (vf_any*)(partial + (i + 1) * width + column);
                                  const vf a = first ? sum_of<kind>(even[c]) : *sums + sum_of<kind>(even[c]);
                                  const vf b = first ? sum_of<kind>(odd[c]) : *next + sum_of<kind>(odd[c]);
                                  if (kind == kHalves && last && wide.empty())
                                      *(vu_any*)(middle + i / 2 * width + column) = interleaved(a, b);
                                  else *sums = a, *next = b;
                              }
                          });
        }
        for (size_t i = 0; i < wide.size(); ++i) ((float*)partial)[i] = float(wide[i] + ((const float*)partial)[i]);
        for (int64_t i = 0; kind == kHalves && !wide.empty() && i < even_rows; i += 2)
            for (int64_t c = 0; c < width; c += kLanes) {
                const float* const sums = (const float*)partial + i * width + c;
                *(vu_any*)(middle + i / 2 * width + c) =
                    interleaved(*(const vf_any*)sums, *(const vf_any*)(sums + width));
            }
        if (kind == kIntegers) {
            const float to_z = unit * x.scale * (unit * x.scale);
            for (int64_t c = 0; c < width; c += kLanes) {
                const float* const sums = (const float*)partial + c;
                const vf y_unit = units_of(largest_of(sums, width, even_rows, kLanes));
                for (int64_t i = 0; i < even_rows; i += 2)
                    *(vu_any*)(middle + i / 2 * width + c) = pair_of<kind>(
                        *(const vf_any*)(sums + i * width), *(const vf_any*)(sums + (i + 1) * width), 1 / y_unit);
                *(vf_any*)(z_units + c) = y_unit * to_z * *(const vf_any*)(q_units + c);
            }
        }
        if (p.y)
            for (int64_t i = 0; i < rows; ++i) memcpy(p.y + (start + i) * p.columns, middle + i * width, p.columns * 4);
        if (p.z)
            product<kind>(p.by_column ? by_line : by_place, even_m, middle, width, paired ? even_rows / 2 : rows,
                          [&](int64_t i, int vector, const vf* even, const vf* odd, int count) {
                              for (int c = 0; c < count; ++c) {
                                  float* const to = p.z + i * width + (vector + c) * kLanes;
                                  const vf unit =
                                      kind == kIntegers ? *(const vf_any*)(z_units + (vector + c) * kLanes) : splat(1);
                                  *(vf_any*)to += sum_of<kind>(even[c]) * unit;
                                  *(vf_any*)(to + width) += sum_of<kind>(odd[c]) * unit;
                              }
                          });
    }
    if (p.statistics) write_statistics(sums, x.x_dtype, p.statistics);
    for (const Panel& block : others) {
        Products other = p;
        other.x = block, other.statistics = nullptr;
        products_in<kFloats>(other);
    }
}

static void products(const Products& p, bool half) { half ? products_in<kFastest>(p) : products_in<kFloats>(p); }

#if X86_LEVEL == 4
static void products_by_vnni(const Products& p, bool half) {
    half ? products_in<kIntegers>(p) : products_in<kFloats>(p);
}
#endif
