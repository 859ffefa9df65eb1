// Y = X q and Z += XᵀY as in lowrank_products.h, in the matrix tiles of AMX: 32 terms of 16 × 16 sums take 16 cycles, so
// reading and subtracting the pair is most of the time. Included after lowrank_products.h.
//
// A tile product C = A B meets its terms in pairs: A (M, K) has them along its lines, B (K, N) across them, one pair of
// lines interleaved into one. Those are the two orders a block of the pair is written in, so that X is A of one product
// and B of the other, and only the narrow q and Y are transposed:
//
//     lines are rows of X       Y  (rows, L) = X  q        Zᵀ (L, M) += Yᵀ X
//     lines are columns of X    Yᵀ (L, rows) = qᵀ Xᵀ       Z  (M, L) += Xᵀ Y
//
// Where operands may not be rounded to bf16, q and Y are sums of three numbers in bf16, the terms of the smaller ones
// first, so that fp32 sums are rounded no more often. And X is in bf16 as it is, if it is what bf16 weights changed by: a
// few units in their last place, all but some in a thousand, whose rests are added one by one.
//
#ifdef EMULATE_TILES  // in software, for machines without: `cmake -DEMULATE_TILES=ON`
alignas(64) static thread_local vu emulated[8][kLanes];

template <int tile>
INLINE void load_tile(const void* p, int64_t bytes) {
    for (int i = 0; i < kLanes; ++i) emulated[tile][i] = *(const vu_any*)((const char*)p + i * bytes);
}

template <int tile>
INLINE void store_tile(void* p, int64_t bytes) {
    for (int i = 0; i < kLanes; ++i) *(vu_any*)((char*)p + i * bytes) = emulated[tile][i];
}

template <int tile>
INLINE void clear_tile() {
    memset(emulated[tile], 0, sizeof emulated[tile]);
}

// Rounded as Intel's manual has it: 16 even terms and 16 odd ones are summed, then both sums, then they are added.
template <int c, int a, int b>
INLINE void add_product() {
    for (int i = 0; i < kLanes; ++i) {
        vf even{}, odd{};
        for (int k = 0; k < kLanes; ++k) {
            const vu left = vu{} + emulated[a][i][k], right = emulated[b][k];
            even += first_of<kHalves>(left) * first_of<kHalves>(right);
            odd += second_of<kHalves>(left) * second_of<kHalves>(right);
        }
        emulated[c][i] = (vu)((vf)emulated[c][i] + (even + odd));
    }
}

struct TileShapes {
    TileShapes() {}
};
#else
// Instructions are named to the assembler alone: no compiler flag nor header is needed.

template <int tile>
INLINE void load_tile(const void* p, int64_t bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(bytes), "i"(tile) : "memory");
}

template <int tile>
INLINE void store_tile(void* p, int64_t bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(bytes), "i"(tile) : "memory");
}

template <int tile>
INLINE void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

template <int c, int a, int b>
INLINE void add_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// Eight tiles of 16 lines of 64 bytes, for as long as it lives. Other users of this thread's tiles (oneDNN) find the
// shapes that they set.
class TileShapes {
   public:
    TileShapes() {
        alignas(64) unsigned char all[64] = {1};  // palette
        for (int i = 0; i < 8; ++i) all[16 + 2 * i] = 64, all[48 + i] = 16;
        asm volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(before) : "m"(all));
    }
    ~TileShapes() { asm volatile("ldtilecfg %0" ::"m"(before)); }

   private:
    alignas(64) unsigned char before[64];
};
#endif

struct Matrix {  // of pairs of bf16 (uint32_t) or of floats
    void* at;
    int64_t pitch;  // elements of 32 bits from one line to the next
    char* tile(int64_t line, int64_t column) const { return (char*)at + 4 * (line * pitch + column); }
    int64_t bytes() const { return 4 * pitch; }
};

// A line of a matrix of floats, or what stands below one of its elements.
struct Vector {
    float* at;
    int64_t step;
    Vector(const Matrix& x, int64_t line, int64_t column, bool down)
        : at((float*)x.tile(line, column)), step(down ? x.pitch : 1) {}
    void add(float factor, const Vector& other, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) at[i * step] += factor * other.at[i * other.step];
    }
};

// An operand given as a sum of so many, `apart` elements of 32 bits; or, for the other one, the same each time.
struct Operand : Matrix {
    int64_t apart = 0;
    Operand from(int64_t line, int64_t column) const { return {{tile(line, column), pitch}, apart}; }
};

// R × C tiles of sums from (i, j) on.
template <bool add, int R, int C>
INLINE void tiles(const Operand& a, const Operand& b, const Matrix& c, int64_t i, int64_t j, int64_t pairs, int parts) {
    const auto each_sum = [&](auto f00, auto f01, auto f10, auto f11) {
        f00(c.tile(i, j));
        if constexpr (C == 2) f01(c.tile(i, j + 16));
        if constexpr (R == 2) f10(c.tile(i + 16, j));
        if constexpr (R == 2 && C == 2) f11(c.tile(i + 16, j + 16));
    };
    const int64_t bytes = c.bytes();
    if (add)
        each_sum([=](void* p) { load_tile<0>(p, bytes); }, [=](void* p) { load_tile<1>(p, bytes); },
                 [=](void* p) { load_tile<2>(p, bytes); }, [=](void* p) { load_tile<3>(p, bytes); });
    else clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
    for (int part = 0; part < parts; ++part)
        for (int64_t k = 0; k < pairs; k += 16) {
            const char* const left = a.tile(i, k) + 4 * part * a.apart;
            const char* const right = b.tile(k, j) + 4 * part * b.apart;
            load_tile<4>(left, a.bytes());
            load_tile<6>(right, b.bytes());
            add_product<0, 4, 6>();
            if constexpr (C == 2) {
                load_tile<7>(right + 64, b.bytes());
                add_product<1, 4, 7>();
            }
            if constexpr (R == 2) {
                load_tile<5>(left + 16 * a.bytes(), a.bytes());
                add_product<2, 5, 6>();
                if constexpr (C == 2) add_product<3, 5, 7>();
            }
        }
    each_sum([=](void* p) { store_tile<0>(p, bytes); }, [=](void* p) { store_tile<1>(p, bytes); },
             [=](void* p) { store_tile<2>(p, bytes); }, [=](void* p) { store_tile<3>(p, bytes); });
}

// c (m, n) = a (m, 2 · pairs) b (2 · pairs, n), or is added to; m, n and pairs are multiples of 16.
template <bool add>
static void tile_product(const Operand& a, const Operand& b, const Matrix& c, int64_t m, int64_t n, int64_t pairs,
                         int parts) {
    for (int64_t i = 0; i < m; i += 32)
        for (int64_t j = 0; j < n; j += 32) {
            const bool tall = i + 16 < m, wide = j + 16 < n;
            if (tall && wide) tiles<add, 2, 2>(a, b, c, i, j, pairs, parts);
            else if (tall) tiles<add, 2, 1>(a, b, c, i, j, pairs, parts);
            else if (wide) tiles<add, 1, 2>(a, b, c, i, j, pairs, parts);
            else tiles<add, 1, 1>(a, b, c, i, j, pairs, parts);
        }
}

// Of a matrix (lines, columns), 16 elements from(line, column) of a line at a time, its transpose: as many to each
// put(column, line, elements).
template <class From, class Put>
INLINE void transposed(int64_t lines, int64_t columns, const From& from, const Put& put) {
    for (int64_t i = 0; i < lines; i += kLanes)
        for (int64_t j = 0; j < columns; j += kLanes) {
            vu x[kLanes];
            for (int r = 0; r < kLanes; ++r) x[r] = from(i + r, j);
            transpose(x);
            for (int r = 0; r < kLanes; ++r) put(j + r, i, x[r]);
        }
}

// Summed before the sums are, as kPairs: an instruction adds 16 pairs at once, so errors grow with a 16th of their number.
constexpr int64_t kTilePairs = 1024;
constexpr int kTogether = 4;  // blocks whose Z is summed by itself

static void add_all(const Matrix& from, const Matrix& to, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) *(vf*)to.tile(0, i) += *(const vf*)from.tile(0, i);
}

// Zeros behind the elements of every line and behind the lines, to multiples of 32 of both.
static void pad(const Matrix& x, int64_t lines, int64_t length) {
    const int64_t all_lines = (lines + 31) / 32 * 32, all = (length + 31) / 32 * 32;
    for (int64_t line = 0; line < all_lines; ++line) {
        const int64_t held = line < lines ? length : 0;
        memset(x.tile(line, 0) + 2 * held, 0, 2 * (all - held));
    }
}

// Whether they were taken: not where too many elements of X are no bf16 numbers and may not be rounded.
static bool products_in_tiles(const Products& p, bool half) {
    if (!half && (p.x.x_dtype != kBFloat16 || (p.x.b && p.x.b_dtype != kBFloat16))) return false;
    const auto up = [](int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; };
    const Panel& x = p.x;
    const bool by_column = p.by_column;
    const int parts = half ? 1 : 3;
    const int64_t n = by_column ? x.length : x.lines, m = by_column ? x.lines : x.length;
    const int64_t width = up(p.columns, kLanes), deep = up(m, 32);
    const int64_t step = std::max<int64_t>(32, std::min<int64_t>(kRows, kEntries / deep / 32 * 32));
    const int64_t lines = by_column ? deep : step, longest = by_column ? step : deep;
    const int64_t pitch = (longest / 32 | 1) * 32;  // an odd number of cache lines, so that lines fall into all sets
    const int64_t z_width = by_column ? width : deep;

    // X in both orders; q and Y as they are multiplied; Y and Z as they come.
    const int64_t x_size = lines * pitch / 2, q_size = deep / 2 * width, y_size = step / 2 * width;
    uint32_t* free = scratch(2 * x_size + parts * (q_size + y_size) + 2 * step * width + 2 * deep * width);
    const auto take = [&](int64_t size) { return (free += size) - size; };
    const Operand along{{take(x_size), pitch / 2}}, across{{take(x_size), pitch}};
    const Operand q{{take(parts * q_size), by_column ? deep / 2 : width}, q_size};
    const Operand y{{take(parts * y_size), by_column ? width : step / 2}, y_size};
    const Matrix sums{take(step * width), by_column ? step : width}, some_sums{take(step * width), sums.pitch};
    const Matrix z{take(deep * width), z_width}, some_z{take(deep * width), z_width};
    memset(z.at, 0, deep * width * 4);

    const auto rest = [](vf v, int times) {
        while (times--) v = rest_of(v, kBFloat16);
        return v;
    };
    const auto into = [](const Operand& to, int part) {
        return [at = Matrix{(uint32_t*)to.at + part * to.apart, to.pitch}](int64_t line, int64_t column, vu elements) {
            *(vu_any*)at.tile(line, column) = elements;
        };
    };
    for (int part = 0; part < parts; ++part) {
        const auto pairs = [&](int64_t pair, int64_t c) {
            const int left = int(p.columns - c);
            const float* const from = p.q + 2 * pair * p.columns + c;
            const vf even = 2 * pair < m ? load_some((const char*)from, kFloat32, left) : vf{};
            const vf odd = 2 * pair + 1 < m ? load_some((const char*)(from + p.columns), kFloat32, left) : vf{};
            return interleaved(rest(even, parts - 1 - part), rest(odd, parts - 1 - part));
        };
        const auto put = into(q, part);
        if (by_column) transposed(deep / 2, width, pairs, put);
        else
            for (int64_t pair = 0; pair < deep / 2; ++pair)
                for (int64_t c = 0; c < width; c += kLanes) put(pair, c, pairs(pair, c));
    }

    Statistics statistics;
    Rests rests{{}, size_t(step * m / 128)};
    const TileShapes shapes;
    for (int64_t start = 0; start < n; start += step) {
        const int64_t rows = std::min(step, n - start), padded = up(rows, 32);
        Panel block = x.part(by_column, start, rows);
        block.out = (char*)along.at, block.out_dtype = kBFloat16, block.out_pitch = pitch;
        block.rests = half ? nullptr : &rests;
        rests.held.clear();
        write_lines(block, statistics, p.statistics, p.full);
        if (rests.held.size() > rests.most) return false;
        pad(along, block.lines, block.length);
        if (by_column || p.z)
            pair_up((const uint16_t*)along.at, pitch, up(block.lines, 32), up(block.length, 32), (uint32_t*)across.at,
                    across.pitch);

        for (int64_t k = 0; k < deep / 2; k += kTilePairs) {
            const int64_t pairs = std::min(kTilePairs, deep / 2 - k);
            const Matrix& to = k ? some_sums : sums;
            if (by_column) tile_product<false>(q.from(0, k), across.from(k, 0), to, width, padded, pairs, parts);
            else tile_product<false>(along.from(0, k), q.from(k, 0), to, padded, width, pairs, parts);
            if (k) add_all(some_sums, sums, step * width);
        }
        for (const auto& x : rests.held) {
            const Vector of_q = {{(void*)p.q, p.columns}, by_column ? x.line : x.place, 0, false};
            const Vector of_y = by_column ? Vector{sums, 0, x.place, true} : Vector{sums, x.line, 0, false};
            of_y.add(x.value, of_q, p.columns);
        }
        if (p.y) {
            const auto put = [&](int64_t row, int64_t column, vu elements) {
                if (row < rows)
                    store_some((vf)elements, (char*)(p.y + (start + row) * p.columns + column), kFloat32,
                               int(p.columns - column));
            };
            const auto line = [&](int64_t line, int64_t column) { return *(const vu*)sums.tile(line, column); };
            if (by_column) transposed(width, up(rows, kLanes), line, put);
            else
                for (int64_t row = 0; row < rows; ++row)
                    for (int64_t c = 0; c < width; c += kLanes) put(row, c, line(row, c));
        }
        if (!p.z) continue;

        for (int part = 0; part < parts; ++part) {
            const int times = parts - 1 - part;
            const auto along_lines = [&](int64_t column, int64_t pair) {
                const vf* const at = (const vf*)sums.tile(column, 2 * pair);
                return (vu)_mm512_cvtne2ps_pbh((__m512)rest(at[1], times), (__m512)rest(at[0], times));
            };
            const auto across_lines = [&](int64_t pair, int64_t column) {
                return interleaved(rest(*(const vf*)sums.tile(2 * pair, column), times),
                                   rest(*(const vf*)sums.tile(2 * pair + 1, column), times));
            };
            if (by_column) transposed(width, padded / 2, along_lines, into(y, part));
            else transposed(padded / 2, width, across_lines, into(y, part));
        }
        const auto second = [&](auto add, const Matrix& to) {
            if (by_column) tile_product<add.value>(along, y, to, up(m, 16), width, padded / 2, parts);
            else tile_product<add.value>(y, across, to, width, up(m, 16), padded / 2, parts);
        };
        if (half) {
            second(std::true_type(), z);
            continue;
        }
        // Sums of some blocks, then sums of those: fp32's rounding stays small.
        const int64_t block_index = start / step;
        if (block_index % kTogether) second(std::true_type(), some_z);
        else second(std::false_type(), some_z);
        for (const auto& x : rests.held) {
            const Vector of_y = by_column ? Vector{sums, 0, x.place, true} : Vector{sums, x.line, 0, false};
            const Vector of_z = by_column ? Vector{some_z, x.line, 0, false} : Vector{some_z, 0, x.place, true};
            of_z.add(x.value, of_y, p.columns);
        }
        if (block_index % kTogether < kTogether - 1 && start + step < n) continue;
        add_all(some_z, z, deep * width);
    }
    const auto row_of_z = [&](int64_t line, int64_t column) { return *(const vu*)z.tile(line, column); };
    const auto add = [&](int64_t i, int64_t column, vu sums) {
        if (i < m) *(vf_any*)(p.z + i * width + column) += (vf)sums;
    };
    if (p.z && !by_column) transposed(width, up(m, kLanes), row_of_z, add);
    else if (p.z)
        for (int64_t i = 0; i < m; ++i)
            for (int64_t c = 0; c < width; c += kLanes) add(i, c, row_of_z(i, c));
    if (p.statistics) write_statistics(statistics, x.x_dtype, p.statistics);
    return true;
}

static void products_by_tiles(const Products& p, bool half) {
    if (!products_in_tiles(p, half)) products(p, half);
}

// As add_products of lowrank_gram.h: a tile's lines are columns of X, with pairs of rows along them.
static void add_products_in_tiles(const GramBlock& block) {
    const int64_t pairs = (block.count + 15) / 16 * 16;
    for (int64_t k = block.count; k < pairs; ++k) memset(block.terms + k * block.pitch, 0, block.width * 4);
    const Operand across{{block.terms, block.pitch}};
    const Operand along{{block.written, block.by_column ? block.line_pitch : (pairs / 16 | 1) * 16}};
    if (block.by_column)
        for (int64_t line = 0; line < block.width; ++line)
            memset(along.tile(line, block.count), 0, (pairs - block.count) * 4);
    else
        transposed(
            pairs, block.width, [&](int64_t k, int64_t c) { return *(const vu_any*)across.tile(k, c); },
            [&](int64_t line, int64_t k, vu elements) { *(vu_any*)along.tile(line, k) = elements; });

    const TileShapes shapes;
    alignas(64) float of_some[32 * 32];
    const Matrix sums{of_some, 32};
    for (int64_t i = 0; i < block.width; i += 32)
        for (int64_t j = i; j < block.width; j += 32) {  // sums of a block, then sums of those
            const bool tall = i + 16 < block.width, wide = j + 16 < block.width;
            const Operand left{{along.tile(i, 0), along.pitch}}, right{{across.tile(0, j), across.pitch}};
            if (tall && wide) tiles<false, 2, 2>(left, right, sums, 0, 0, pairs, 1);
            else if (tall) tiles<false, 2, 1>(left, right, sums, 0, 0, pairs, 1);
            else if (wide) tiles<false, 1, 2>(left, right, sums, 0, 0, pairs, 1);
            else tiles<false, 1, 1>(left, right, sums, 0, 0, pairs, 1);
            for (int64_t r = 0; r < (tall ? 32 : 16); ++r)
                for (int64_t c = 0; c < (wide ? 32 : 16); c += kLanes)
                    *(vf_any*)(block.f + (i + r) * block.width + j + c) += *(const vf*)(of_some + 32 * r + c);
        }
}

static bool gram_in_tiles(const Panel& x, bool by_column, float* g, double* statistics, double* base_squares) {
    return gram_by<kHalves, add_products_in_tiles>(x, by_column, g, statistics, base_squares);
}
