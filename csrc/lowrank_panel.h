// Lines of a difference, included once per instruction set (csrc/clones.h) after csrc/vectors.h.

struct Statistics {
    double squares = 0, largest = 0, unchanged = 0, ulp_squares = 0, nonfinite = 0;
};

// The power of two at or below |x|, 0 for numbers that are denormal in their dtype; times its eps, the distance to the
// next.
INLINE vf power(vf x, int dtype) {
    const vi size = bits(x) & 0x7f800000;
    return from_bits(dtype == kFloat16 ? (size < (113 << 23) ? vi{} : size) : size);
}

// 16 elements at p, or the fewer that are left, padded by zeros.
INLINE vf load_some(const char* p, const int dtype, int left) {
    if (left >= kLanes) return load(p, dtype);
    char rest[64] = {};
    memcpy(rest, p, left * size_of(dtype));
    return load(rest, dtype);
}

INLINE void store_some(vf x, char* p, const int dtype, int left) {
    char rest[64];
    char* const to = left < kLanes ? rest : p;
    if (dtype == kFloat32) *(vf_any*)to = x;
    else *(vh_any*)to = narrow(x, kBFloat16);
    if (left < kLanes) memcpy(p, rest, left * size_of(dtype));
}

// count ≤ kBlock elements; b and out may be null.
INLINE void block(const char* x, const char* b, char* out, int count, float scale, const int x_dtype, const int b_dtype,
                  const int out_dtype, const bool stats, const bool full, Statistics& sums) {
    const int64_t x_size = size_of(x_dtype), b_size = size_of(b_dtype), out_size = size_of(out_dtype);
    vf squares{}, largest{}, ulp_squares{}, widest{};
    vi zeros{};
    for (int i = 0; i < count; i += kLanes) {
        const vf value = load_some(x + i * x_size, x_dtype, count - i);
        const vf delta = b ? value - load_some(b + i * b_size, b_dtype, count - i) : value;
        if (out) store_some(delta * scale, out + i * out_size, out_dtype, count - i);
        if (!stats) continue;
        const vf size = from_bits(bits(delta) & 0x7fffffff);
        squares += delta * delta;
        largest = max_(size, largest);
        if (!full) continue;
        const vf step = power(value, x_dtype);
        zeros -= bits(size) == 0;
        ulp_squares += step * step;
        widest = max_(step, widest);
    }
    if (!stats) return;
    float top = 0, top_step = 0;
    int unchanged = -((count + kLanes - 1) / kLanes * kLanes - count);  // the padding's
    for (int i = 0; i < kLanes; ++i) {
        top = largest[i] > top ? largest[i] : top;
        top_step = widest[i] > top_step ? widest[i] : top_step;
        unchanged += zeros[i];
    }
    if (full) sums.unchanged += unchanged;
    const double square = sum(squares), ulp_square = sum(ulp_squares);
    const auto held = [](float size, double square) {
        return square - square == 0 && (size == 0 || (size > 1e-12f && size < 1e12f));
    };
    if (held(top, square) && held(top_step, ulp_square)) {
        sums.squares += square;
        sums.ulp_squares += ulp_square;
        sums.largest = top > sums.largest ? top : sums.largest;
        return;
    }
    for (int i = 0; i < count; i += kLanes) {  // squares beyond fp32, or not finite: once more, one by one
        const vf value = load_some(x + i * x_size, x_dtype, count - i), step = power(value, x_dtype);
        const vf delta = b ? value - load_some(b + i * b_size, b_dtype, count - i) : value;
        for (int j = 0; j < kLanes && i + j < count; ++j) {
            const double size = std::fabs(delta[j]);
            sums.squares += size * size;
            sums.nonfinite += !(size - size == 0);
            sums.largest = size > sums.largest ? size : sums.largest;
            if (full) sums.ulp_squares += double(step[j]) * step[j];
        }
    }
}

// Lines that lie far apart start where the processor's own prefetching does not look.
INLINE void prefetch(const char* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

INLINE void lines_as(const Panel& p, const int x_dtype, const int b_dtype, const int out_dtype, const bool stats,
                     const bool full, Statistics& sums) {
    const int64_t x_size = size_of(x_dtype), b_size = size_of(b_dtype), out_size = size_of(out_dtype);
    const int64_t ahead = 1 + kAhead / (p.length * x_size);  // lines
    const bool apart = p.x_pitch != p.length;
    for (int64_t line = 0; line < p.lines; ++line)
        for (int64_t i = 0; i < p.length; i += kBlock) {
            const int count = int(p.length - i < kBlock ? p.length - i : kBlock);
            const char* const x = p.x + (line * p.x_pitch + i) * x_size;
            const char* const b = p.b ? p.b + (line * p.b_pitch + i) * b_size : nullptr;
            if (apart && line + ahead < p.lines) {
                prefetch(x + ahead * p.x_pitch * x_size, count * x_size);
                if (b) prefetch(b + ahead * p.b_pitch * b_size, count * b_size);
            }
            block(x, b, p.out ? p.out + (line * p.out_pitch + i) * out_size : nullptr, count, p.scale, x_dtype, b_dtype,
                  out_dtype, stats, full, sums);
        }
}

template <bool stats, bool full>
static void lines_of(const Panel& p, Statistics& sums) {  // the usual dtypes as constants
    const bool alike = !p.b || p.x_dtype == p.b_dtype, half = p.out_dtype == kBFloat16;
    if (alike && p.x_dtype == kFloat32 && half) lines_as(p, kFloat32, kFloat32, kBFloat16, stats, full, sums);
    else if (alike && p.x_dtype == kFloat32) lines_as(p, kFloat32, kFloat32, kFloat32, stats, full, sums);
    else if (alike && p.x_dtype == kBFloat16 && half) lines_as(p, kBFloat16, kBFloat16, kBFloat16, stats, full, sums);
    else if (alike && p.x_dtype == kBFloat16) lines_as(p, kBFloat16, kBFloat16, kFloat32, stats, full, sums);
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

static void write_panel(const Panel& p, double* statistics, bool full) {
    Statistics sums;
    write_lines(p, sums, statistics, full);
    if (statistics) write_statistics(sums, p.x_dtype, statistics);
}
