// G = XᵀX of a difference X of bf16 matrices, with fp32 sums. Included after lowrank_products.h.
//
// A block of X is written in rows that the contraction meets one after the other; both operands of a tile are columns of
// it, so one order serves. Their sums gather in the upper triangle of F.
//
// Where terms are pairs of 16 bits, products are exact and X is taken as it is, all but some in a thousand of its entries,
// whose rests are added one by one: a rest r of X's entry (k, j) adds r · X[k] to row j of A, whose sums stay small, and
// G = F + A + Aᵀ. What bf16 weights changed by fits: a few units in their last place. bf16 holds that of each entry for
// itself. Integers hold multiples of a unit of the block: 2^-9 or less of the root of its mean square, so that rests are
// left of outliers, and of weights much smaller than most changes, whose units in the last place are finer.

constexpr int64_t kGramBytes = int64_t(1) << 19;  // of a block of X: part of a core's own cache
constexpr int64_t kGramSteps = 128;               // along the contraction, in a block: see kMostWhole
constexpr int64_t kGramBlocks = 64;               // whose products are added up, before sums are
constexpr int kGramRows = 6;                      // of a tile, and kStrip vectors of columns
static_assert(kMostWhole * kMostWhole * (2 * kGramSteps) < 0x1p31, "sums of integers");

// A block of X, and where its products go.
struct GramBlock {
    uint32_t* terms;  // rows of floats or pairs of rows, the even one in the lower half of an element
    int64_t pitch, count;
    uint32_t* written;  // by_column, the same along lines, which are columns; else, of pairs, room for as much
    int64_t line_pitch;
    bool by_column;
    float* f;  // (height, width), of which the upper triangle is wanted
    int64_t height, width;
    float unit;  // of X

    // A row of pairs.
    template <Kind kind>
    vf row(int64_t k, int64_t column) const {
        const vu both = *(const vu_any*)(terms + k / 2 * pitch + column);
        return (k % 2 ? second_of<kind>(both) : first_of<kind>(both)) * unit;
    }
};

// Those of kGramRows rows from i on and of C vectors of columns from j on.
template <Kind kind, int C>
INLINE void add_tile(const GramBlock& b, int64_t i, int64_t j) {
    float* const f = b.f + i * b.width + j;
    const auto add = [&](float* to, vf sum)
                         __attribute__((always_inline)) { *(vf_any*)to += sum_of<kind>(sum) * (b.unit * b.unit); };
    for (int r = 0; r < kGramRows; ++r)
        for (int c = 0; c < C; ++c) __builtin_prefetch(f + r * b.width + c * kLanes, 1);
    tile<kind, kGramRows, C>({b.terms + i, 1, b.pitch}, b.terms + j, b.pitch, b.count,
                             [&](int r, const vf* even, const vf* odd) __attribute__((always_inline)) {
#pragma GCC unroll 4
                                 for (int c = 0; c < C; ++c) {
                                     add(f + r * b.width + c * kLanes, even[c]);
                                     add(f + (r + 1) * b.width + c * kLanes, odd[c]);
                                 }
                             });
}

template <Kind kind>
static void add_products(const GramBlock& b) {
    for (int64_t j = 0; j < b.width; j += kStrip * kLanes)
        for (int64_t i = 0; i < std::min(b.height, j + kStrip * kLanes); i += kGramRows) {
            const int64_t from = j + std::max<int64_t>(i - j, 0) / kLanes * kLanes;  // left of it is the lower triangle
            const int vectors = int((std::min(j + kStrip * kLanes, b.width) - from) / kLanes);
            if constexpr (kStrip == 4) {
                if (vectors == 4) add_tile<kind, 4>(b, i, from);
                if (vectors == 3) add_tile<kind, 3>(b, i, from);
            }
            if (vectors == 2) add_tile<kind, 2>(b, i, from);
            if (vectors == 1) add_tile<kind, 1>(b, i, from);
        }
}

// Whether it was taken: not where X is something else. g (M, M), contiguous; statistics, in full, and Σb² or neither.
template <Kind kind, void add_products(const GramBlock&)>
static bool gram_by(const Panel& x, bool by_column, float* g, double* statistics, double* base_squares) {
    if (x.x_dtype != kBFloat16 || (x.b && x.b_dtype != kBFloat16)) return false;
    constexpr bool paired = kind != kFloats;
    constexpr int per_term = paired ? 2 : 1, kLine = 16 * per_term;  // rows in a term; elements in a cache line
    const auto up = [](int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; };
    const int64_t n = by_column ? x.length : x.lines, m = by_column ? x.lines : x.length;
    const int64_t width = up(m, kLanes), height = up(m, kGramRows), tall = std::max(width, height);
    const int64_t step = per_term * std::max<int64_t>(16, std::min(kGramSteps, kGramBytes / (4 * width) / 16 * 16));
    // Odd numbers of cache lines, so that lines fall into all sets of a cache.
    const auto odd = [&](int64_t size, int64_t unit) { return (up(size, unit) / unit | 1) * unit; };
    const int64_t pitch = odd(tall, 16);
    const int64_t line_pitch = by_column ? odd(step, kLine) : paired ? odd(width, kLine) : pitch;
    const int64_t lines = by_column ? width * line_pitch
                          : paired  ? std::max(step * line_pitch, width * odd(step, kLine))
                                    : 0;
    const int64_t terms_size = step / per_term * pitch;
    uint32_t* const terms = scratch(lines / per_term + terms_size + (tall + (paired ? width : 0)) * width);
    float *const f = (float*)(terms + terms_size), *const a = f + tall * width;
    uint32_t* const written = lines ? (uint32_t*)(paired ? a + width * width : a) : terms;
    memset(terms, 0, (terms_size + (tall + (paired ? width : 0)) * width) * 4);

    std::vector<float> earlier;  // sums of kGramBlocks each: long sums of much the same are rounded to one side
    int64_t added = 0;
    Statistics sums;
    Rests rests{{}, 0};
    float unit = 1, next_unit = kind == kIntegers ? 0 : 1;
    const auto unit_for = [&](const Statistics& own, const Panel& block) -> float {
        if (!own.largest) return unit;
        // Finer than usual where that clamps nothing.
        const float least = std::min(power(splat(usual(own, block)), kFloat32)[0] / 256, unit_of(float(own.largest)));
        return own.nonfinite || least < 0x1p-60f || least > 0x1p60f ? 0 : least;  // or its square would leave fp32
    };
    for (int64_t start = 0; start < n; start += step) {
        const int64_t rows = std::min(step, n - start), count = (rows + per_term - 1) / per_term;
        Panel block = x.part(by_column, start, rows);
        block.out = (char*)written, block.out_pitch = line_pitch;
        block.out_dtype = kind == kFloats ? kFloat32 : kind == kHalves ? kBFloat16 : kInt16;
        if (paired) block.rests = &rests;
        rests.most = size_t(rows * m / 128);
        Statistics own;
        const auto write = [&](float in) {
            own = {}, unit = in, block.scale = 1 / in;
            rests.held.clear();
            write_lines(block, own, statistics || kind == kIntegers, statistics);
            return rests.held.size() <= rests.most;
        };
        bool taken = next_unit && write(next_unit);  // mostly the last block's does
        if (kind == kIntegers && !taken) {
            next_unit = unit_for(measured(block, false), block);
            taken = next_unit && write(next_unit);
        }
        if (!taken) return false;
        if (kind == kIntegers) next_unit = unit_for(own, block);
        sums.add(own);
        if (rows % per_term) {  // the last row's pair
            uint16_t* const to = (uint16_t*)written;
            if (by_column)
                for (int64_t line = 0; line < m; ++line) to[line * line_pitch + rows] = 0;
            else memset(to + rows * line_pitch, 0, m * 2);
        }
        if (by_column) {
            for (int64_t k = 0; k < count; k += kLanes)
                for (int64_t c = 0; c < m; c += kLanes) {
                    vu of[kLanes] = {};
                    for (int64_t i = 0; i < std::min<int64_t>(kLanes, m - c); ++i)
                        of[i] = *(const vu_any*)(written + (c + i) * line_pitch / per_term + k);
                    transpose(of);
                    for (int64_t i = 0; i < std::min<int64_t>(kLanes, count - k); ++i)
                        *(vu_any*)(terms + (k + i) * pitch + c) = of[i];
                }
        } else if (paired) {
            pair_up((const uint16_t*)written, line_pitch, 2 * count, m, terms, pitch);
            if (m % kLanes)
                for (int64_t k = 0; k < count; ++k) memset(terms + k * pitch + m, 0, (width - m) * 4);
        }
        const GramBlock held{terms, pitch, count, written, line_pitch / per_term, by_column, f, height, width, unit};
        if (added++ == kGramBlocks) {
            earlier.resize(height * width);
            for (int64_t i = 0; i < height * width; ++i) earlier[i] += f[i];
            memset(f, 0, height * width * 4);
            added = 1;
        }
        add_products(held);

        const auto row_of = [&](const Rests::Entry& x) { return by_column ? x.place : x.line; };
        const auto column_of = [&](const Rests::Entry& x) { return by_column ? x.line : x.place; };
        std::sort(rests.held.begin(), rests.held.end(),
                  [&](const auto& x, const auto& y) { return row_of(x) < row_of(y); });
        for (auto x = rests.held.begin(), first = x; x != rests.held.end(); ++x) {
            const int64_t k = row_of(*x), j = column_of(*x);
            if (row_of(*first) != k) first = x;
            if (x + 1 != rests.held.end()) prefetch((const char*)(a + column_of(x[1]) * width), width * 4);
            float* const to = a + j * width;
            const float value = x->value * unit;
            for (int64_t c = 0; c < width; c += kLanes) *(vf_any*)(to + c) += value * held.template row<kind>(k, c);
            to[j] += value * value / 2;
            for (auto y = first; y != x; ++y) to[column_of(*y)] += value * y->value * unit;  // two rests of a row
        }
    }
    for (size_t i = 0; i < earlier.size(); ++i) f[i] += earlier[i];
    const auto put = [&](int64_t i, int64_t j, const vu rows[kLanes]) {
        for (int64_t r = 0; r < std::min<int64_t>(kLanes, m - i); ++r)
            store_some((vf)rows[r], (char*)(g + (i + r) * m + j), kFloat32, int(std::min<int64_t>(kLanes, m - j)));
    };
    vi lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    for (int64_t i = 0; i < m; i += kLanes)
        for (int64_t j = i; j < m; j += kLanes) {
            vu sums[kLanes], mirrored[kLanes];
            for (int64_t r = 0; paired && r < kLanes; ++r) mirrored[r] = *(const vu_any*)(a + (j + r) * width + i);
            if (paired) transpose(mirrored);
            for (int64_t r = 0; r < kLanes; ++r) {
                const int64_t place = (i + r) * width + j;
                const vf sum = *(const vf_any*)(f + place);
                sums[r] = (vu)(paired ? sum + (*(const vf_any*)(a + place) + (vf)mirrored[r]) : sum);
                mirrored[r] = sums[r];
            }
            transpose(mirrored);
            if (i == j)  // only the upper half of these holds
                for (int64_t r = 0; r < kLanes; ++r) sums[r] = lanes < int(r) ? mirrored[r] : sums[r];
            put(i, j, sums);
            if (i != j) put(j, i, mirrored);
        }
    if (statistics) write_statistics(sums, x.x_dtype, statistics), *base_squares = sums.base_squares;
    return true;
}

static bool gram(const Panel& x, bool by_column, float* g, double* statistics, double* base_squares) {
    return gram_by<kFastest, add_products<kFastest>>(x, by_column, g, statistics, base_squares);
}

#if X86_LEVEL == 4
static bool gram_by_vnni(const Panel& x, bool by_column, float* g, double* statistics, double* base_squares) {
    return gram_by<kIntegers, add_products<kIntegers>>(x, by_column, g, statistics, base_squares) ||
           gram(x, by_column, g, statistics, base_squares);
}
#endif
