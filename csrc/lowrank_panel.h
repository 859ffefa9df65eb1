// Lines of a difference, included once per instruction set (csrc/clones.h) after csrc/vectors.h.

constexpr int kBlock = 16 * kAtOnce * kLanes;  // elements summed in fp32, before the sums go on in fp64

struct Statistics {
    double squares = 0, largest = 0, unchanged = 0, ulp_squares = 0, nonfinite = 0, base_squares = 0;

    void add(const Statistics& other) {
        squares += other.squares, unchanged += other.unchanged, ulp_squares += other.ulp_squares;
        nonfinite += other.nonfinite, base_squares += other.base_squares;
        largest = std::max(largest, other.largest);
    }
};

// The power of two at or below |x|, 0 for numbers that are denormal in their dtype; times its eps, the distance to the
// next.
INLINE vf power(vf x, int dtype) {
    const vi size = bits(x) & 0x7f800000;
    return from_bits(dtype == kFloat16 ? (size < (113 << 23) ? vi{} : size) : size);
}

// kLanes elements at p, or the fewer that are left, padded by zeros.
INLINE vf load_some(const char* p, const int dtype, int left) {
    if (left >= kLanes) return load(p, dtype);
    char rest[64] = {};
    memcpy(rest, p, left * size_of(dtype));
    return load(rest, dtype);
}

constexpr float kWhole = 0x1.8p23f;  // x + kWhole is x rounded to an integer, which its lower bits are

INLINE vf clamped(vf x) {
    const vf most = splat(kMostWhole), low = x < -most ? -most : x;
    return low > most ? most : low;
}

INLINE void store_some(vf x, char* p, const int dtype, int left) {
    char rest[64];
    char* const to = left < kLanes ? rest : p;
    if (dtype == kFloat32) *(vf_any*)to = x;
    else if (dtype == kInt16) *(vh_any*)to = __builtin_convertvector((vu)(clamped(x) + kWhole), vh);
#if X86_LEVEL == 5
    else *(vh_any*)to = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    else *(vh_any*)to = narrow(x, kBFloat16);
#endif
    if (left < kLanes) memcpy(p, rest, left * size_of(dtype));
}

#if X86_LEVEL >= 3
// What 16 bits take off.
INLINE vf rest_of(vf x, const int dtype) {
    return x - (dtype == kInt16 ? clamped(x) + kWhole - kWhole : (vf)(rounded(x) & 0xffff0000u));
}

INLINE void take(vf x, const int dtype, int64_t line, int64_t place, Rests& to) {
    const vf rest = rest_of(x, dtype);
#if X86_LEVEL >= 4
    uint16_t some = _mm512_cmp_ps_mask((__m512)rest, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#else
    unsigned some = _mm256_movemask_ps(_mm256_cmp_ps((__m256)rest, _mm256_setzero_ps(), _CMP_NEQ_UQ));
#endif
    for (; __builtin_expect(some != 0, 0) && to.held.size() <= to.most; some &= some - 1)
        to.held.push_back({line, place + __builtin_ctz(some), rest[__builtin_ctz(some)]});
}
#endif

// Sizes of floats as integers: the same order, one instruction for the larger, and NaN above all.
INLINE vi size_bits(vf x) { return bits(x) & 0x7fffffff; }
INLINE vi max_(vi a, vi b) { return a > b ? a : b; }

// Sums under way, of which there are several at once, or each would wait for its last addition.
struct Partial {
    vf squares{}, ulp_squares{}, base_squares{};
    vi largest{}, widest{}, zeros{};
};

// Where some elements of a line lie; b and out may be null.
struct Span {
    const char *x, *b;
    char* out;
    int64_t line, place, ahead;
};

INLINE void difference(const Span& at, int count, float scale, const int x_dtype, const int b_dtype,
                       const int out_dtype, const bool stats, const bool full, Rests* rests, Partial sums[kAtOnce]) {
    const auto vector = [&](int i, int left, Partial& to) __attribute__((always_inline)) {
        __builtin_prefetch(at.x + i * size_of(x_dtype) + at.ahead, 0, 2);
        if (at.b) __builtin_prefetch(at.b + i * size_of(b_dtype) + at.ahead, 0, 2);
        const vf value = load_some(at.x + i * size_of(x_dtype), x_dtype, left);
        const vf base = at.b ? load_some(at.b + i * size_of(b_dtype), b_dtype, left) : vf{}, delta = value - base;
        if (at.out) store_some(delta * scale, at.out + i * size_of(out_dtype), out_dtype, left);
#if X86_LEVEL >= 3
        if (rests) take(delta * scale, out_dtype, at.line, at.place + i, *rests);
#endif
        if (!stats) return;
        const vi size = size_bits(delta);
        to.squares += delta * delta;
        to.largest = max_(size, to.largest);
        if (!full) return;
        const vf step = power(value, x_dtype);
        to.zeros -= size == 0;
        to.ulp_squares += step * step;
        to.widest = max_(bits(step), to.widest);
        to.base_squares += base * base;
    };
    int i = 0;
    for (; i + kAtOnce * kLanes <= count; i += kAtOnce * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) vector(i + j * kLanes, kLanes, sums[j]);
    for (; i < count; i += kLanes) vector(i, count - i, sums[0]);
}

// Whether what was summed in fp32 is finite and in range.
INLINE bool add_up(const Partial p[kAtOnce], Statistics& sums) {
    vf squares{}, ulp_squares{}, base_squares{};
    vi largest{}, widest{}, zeros{};
#pragma GCC unroll 4
    for (int j = 0; j < kAtOnce; ++j) {
        squares += p[j].squares;
        ulp_squares += p[j].ulp_squares;
        base_squares += p[j].base_squares;
        largest = max_(largest, p[j].largest);
        widest = max_(widest, p[j].widest);
        zeros += p[j].zeros;
    }
    int32_t top = 0, top_step = 0;
    for (int i = 0; i < kLanes; ++i) {
        top = std::max(top, largest[i]);
        top_step = std::max(top_step, widest[i]);
        sums.unchanged += zeros[i];
    }
    constexpr int32_t kLow = 0x2b8cbccc, kHigh = 0x5368d4a5;  // the bits of 1e-12 and 1e12
    const auto held = [](int32_t size) { return size == 0 || (size > kLow && size < kHigh); };
    if (!held(top) || !held(top_step)) return false;
    sums.squares += sum(squares);
    sums.ulp_squares += sum(ulp_squares);
    sums.base_squares += sum(base_squares);
    sums.largest = std::max(sums.largest, double(from_bits(vi{} + top)[0]));
    return true;
}

// The same one by one in fp64, where squares are beyond fp32, or elements not finite.
static void add_up_each(const Span& at, int count, int x_dtype, int b_dtype, bool full, Statistics& sums) {
    for (int i = 0; i < count; i += kLanes) {
        const vf value = load_some(at.x + i * size_of(x_dtype), x_dtype, count - i), step = power(value, x_dtype);
        const vf base = at.b ? load_some(at.b + i * size_of(b_dtype), b_dtype, count - i) : vf{}, delta = value - base;
        for (int j = 0; j < kLanes && i + j < count; ++j) {
            const double size = std::fabs(delta[j]);
            sums.squares += size * size;
            sums.nonfinite += !(size - size == 0);
            sums.largest = size > sums.largest ? size : sums.largest;
            if (full) sums.ulp_squares += double(step[j]) * step[j], sums.base_squares += double(base[j]) * base[j];
        }
    }
}

// Lines that lie far apart start where the processor's own prefetching does not look.
INLINE void prefetch(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

INLINE void lines_as(const Panel& p, const int x_dtype, const int b_dtype, const int out_dtype, const bool stats,
                     const bool full, Statistics& sums) {
    const int64_t ahead = 1 + kAhead / (p.length * size_of(x_dtype));  // lines
    const bool apart = p.x_pitch != p.length;
    const auto span = [&](int64_t line, int64_t i) {
        return Span{p.x + (line * p.x_pitch + i) * size_of(x_dtype),
                    p.b ? p.b + (line * p.b_pitch + i) * size_of(b_dtype) : nullptr,
                    p.out ? p.out + (line * p.out_pitch + i) * size_of(out_dtype) : nullptr,
                    line,
                    i,
                    apart ? 0 : kPage};
    };
    // Lines, where they are short: no more than a sum in fp32 bears, of which each line's end adds to the same.
    const int64_t together = std::clamp<int64_t>(kBlock / p.length, 1, 16);
    for (int64_t first = 0; first < p.lines; first += together)
        for (int64_t i = 0; i < p.length; i += kBlock) {
            const int count = int(std::min<int64_t>(p.length - i, kBlock));
            const int64_t stop = std::min(first + together, p.lines);
            Partial partial[kAtOnce];
            for (int64_t line = first; line < stop; ++line) {
                const Span at = span(line, i);
                if (apart && line + ahead < p.lines) {
                    prefetch(at.x + ahead * p.x_pitch * size_of(x_dtype), count * size_of(x_dtype));
                    if (at.b) prefetch(at.b + ahead * p.b_pitch * size_of(b_dtype), count * size_of(b_dtype));
                }
                difference(at, count, p.scale, x_dtype, b_dtype, out_dtype, stats, full, p.rests, partial);
            }
            if (!stats) continue;
            if (full) sums.unchanged -= (stop - first) * ((count + kLanes - 1) / kLanes * kLanes - count);  // padding
            if (!add_up(partial, sums))
                for (int64_t line = first; line < stop; ++line)
                    add_up_each(span(line, i), count, x_dtype, b_dtype, full, sums);
        }
}

template <bool stats, bool full>
static void lines_of(const Panel& p, Statistics& sums) {  // the usual dtypes as constants
    const auto of = [&](auto in) {
        if (p.out_dtype == kBFloat16) lines_as(p, in.value, in.value, kBFloat16, stats, full, sums);
        else if (p.out_dtype == kInt16) lines_as(p, in.value, in.value, kInt16, stats, full, sums);
        else lines_as(p, in.value, in.value, kFloat32, stats, full, sums);
    };
    const bool alike = !p.b || p.x_dtype == p.b_dtype;
    if (alike && p.x_dtype == kFloat32) of(std::integral_constant<int, kFloat32>());
    else if (alike && p.x_dtype == kBFloat16) of(std::integral_constant<int, kBFloat16>());
    else lines_as(p, p.x_dtype, p.b_dtype, p.out_dtype, stats, full, sums);
}

static void write_statistics(const Statistics& sums, int dtype, double* to) {
    const double eps = dtype == kFloat32 ? 0x1p-23 : dtype == kBFloat16 ? 0x1p-7 : 0x1p-10;
    const double found[] = {sums.squares, sums.largest, sums.unchanged, sums.ulp_squares * eps * eps, sums.nonfinite};
    memcpy(to, found, sizeof found);
}

static void write_lines(const Panel& p, Statistics& sums, bool stats, bool full) {
    if (!stats) lines_of<false, false>(p, sums);
    else if (full) lines_of<true, true>(p, sums);
    else lines_of<true, false>(p, sums);
}

// Of every line Σ(x − b)², Σx² and Σb², in fp32 a block at a time.
static void line_squares(const Panel& p, double* out) {
    for (int64_t line = 0; line < p.lines; ++line, out += 3) {
        const char* const x = p.x + line * p.x_pitch * size_of(p.x_dtype);
        const char* const b = p.b + line * p.b_pitch * size_of(p.b_dtype);
        out[0] = out[1] = out[2] = 0;
        for (int64_t start = 0; start < p.length; start += kBlock) {
            const int64_t stop = std::min<int64_t>(start + kBlock, p.length);
            vf sums[3][2] = {};  // by turns: one addition need not wait for the last
            for (int64_t i = start; i < stop; i += kLanes) {
                const int left = int(stop - i), turn = i / kLanes % 2;
                fetch_ahead(x + i * size_of(p.x_dtype), kLanes * 2),
                    fetch_ahead(b + i * size_of(p.b_dtype), kLanes * 2);
                const vf value = load_some(x + i * size_of(p.x_dtype), p.x_dtype, left);
                const vf base = load_some(b + i * size_of(p.b_dtype), p.b_dtype, left), delta = value - base;
                sums[0][turn] += delta * delta, sums[1][turn] += value * value, sums[2][turn] += base * base;
            }
            for (int s = 0; s < 3; ++s) out[s] += sum(sums[s][0]) + sum(sums[s][1]);
        }
    }
}

static void write_panel(const Panel& p, double* statistics, bool full) {
    Statistics sums;
    write_lines(p, sums, statistics, full);
    if (statistics) write_statistics(sums, p.x_dtype, statistics);
}
