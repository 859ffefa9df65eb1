// The row kernel of the divergences, included once per instruction set (csrc/clones.h) after csrc/vectors.h.
//
// Rows are taken in blocks. Where both sides are fp32 or both bf16, the two hot loops read them as they lie; whatever
// else (fp16, soft caps, sides of different dtypes, a row's ragged end) is first widened to fp32 in the L1 cache
// (`stage`). Logarithms are in base 2 throughout: with c = scale·log2(e)/temperature and u, v the c·logits of sides x
// and y relative to a reference near the largest so far, one pass gathers
//
//     X = Σ 2^u,  Y = Σ 2^v,  G = Σ 2^u·(u − v)        KL(x‖y) = G/X − log2 X + log2 Y, in bits
//
// and a second, whose reads come from the cache, writes the gradient of the student's logits s (teacher t):
//
//     reverse KL (x = s)   q·(u − v − G/X)            forward KL (x = t)   q − p
//
// Mixtures take a pass more in between: Σφ and Σw of the family's definition (effopd_kernels/divergence/reference.py).
// Sums run in fp32 within a block and in fp64 across blocks.
//
// Infinities: the fp32 sum G over a block holding −inf comes out NaN or inf, and only then is the block taken again
// with the comparisons that −inf needs. `hole` = Σ 2^u over entries with v = −inf, whose log-probability counts as
// kFloor.

// No include here: this file stands inside a namespace.

// Functions of K vectors go in lockstep: one chain of dependent steps leaves most of the arithmetic units waiting.
#define EACH for (int k = 0; k < K; ++k)

// p = (…(p·x + c₀)·x + …)·x + c_last
template <int K, int n>
INLINE void horner(const float (&c)[n], const vf (&x)[K], vf (&p)[K]) {
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) EACH p[k] = p[k] * x[k] + c[j];
}

// 2^x for x < 128, relative error < 1e-7, exactly 1 at 0; exactly 0 from −126 (elsewhere than AVX-512, from −125). NaN
// stays NaN. What may be larger goes through `below_overflow` first.
template <int K>
INLINE void exp2_(const vf (&x)[K], vf (&e)[K]) {
    vf r[K], p[K];
#if X86_LEVEL >= 4  // x = ⌊x⌋ + r: two instructions split and scale
    EACH r[k] = (vf)_mm512_reduce_ps((__m512)x[k], 9);
    EACH p[k] = splat(0.0018671301f);
    horner({0.0090170303f, 0.0557999131f, 0.2401644501f, 0.6931513118f, 1.0f}, r, p);
    EACH e[k] = (vf)_mm512_scalef_ps((__m512)p[k], (__m512)x[k]);
#else  // x = n + r with |r| <= ½; n is added to the exponent bits of 2^r
    vf shifted[K];
    EACH shifted[k] = x[k] + 0x1.8p23f;  // rounds to an integer, left in the low bits
    EACH r[k] = x[k] - (shifted[k] - 0x1.8p23f);
    EACH p[k] = splat(0.0013264700f);
    horner({0.0096715339f, 0.0555073400f, 0.2402224176f, 0.6931469774f, 1.0f}, r, p);
    EACH e[k] = x[k] < -125.0f ? vf{} : from_bits((vi)((vu)p[k] + ((vu)shifted[k] << 23)));
#endif
}

// AVX-512 overflows to infinity by itself; elsewhere the exponent would wrap, and 2^1000 look like 2^−24.
INLINE vf below_overflow(vf x) {
#if X86_LEVEL >= 4
    return x;
#else
    return x > 127.0f ? splat(127.0f) : x;
#endif
}

INLINE vf exp2_(vf x) {
    const vf in[1] = {x};
    vf out[1];
    exp2_(in, out);
    return out[0];
}

// log2 x for normal x > 0. x = 2^n·(1+f) with 1+f in [√½, √2).
template <int K>
INLINE void log2_(const vf (&x)[K], vf (&l)[K]) {
    vi shifted[K];
    vf f[K], p[K];
    EACH shifted[k] = bits(x[k]) - 0x3f3504f3;
    EACH f[k] = from_bits((shifted[k] & 0x7fffff) + 0x3f3504f3) - 1.0f;
    EACH p[k] = splat(0.12599961906f);
    horner({-0.20835217027f, 0.21610541550f, -0.23879971940f, 0.28786979215f, -0.36070969824f, 0.48091121736f,
            -0.72134726049f},
           f, p);
    EACH l[k] = __builtin_convertvector(shifted[k] >> 23, vf) + (f[k] * 1.4426950409f + f[k] * f[k] * p[k]);
}

// 2^x − 1 for x <= 0, given 2^x: near 0 the series, where subtracting would leave rounding.
template <int K>
INLINE void exp2m1(const vf (&x)[K], const vf (&power)[K], vf (&result)[K]) {
    vf p[K];
    EACH p[k] = splat(1.5403530393e-04f);
    horner({1.3333558146e-03f, 0.0096181291f, 0.0555041087f, 0.2402265070f, 0.6931471806f}, x, p);
    EACH result[k] = x[k] > -0.25f ? p[k] * x[k] : power[k] - 1.0f;
}

INLINE vf tanh_(vf x) {
    const vf size = from_bits(bits(x) & 0x7fffffff), square = x * x, e = exp2_(-2.8853900818f * size);
    vf p = -0.0060451650965f * square + 0.020961329108f;
    p = p * square + -0.053843263175f;
    p = p * square + 0.13332718845f;
    p = p * square + -0.33333328433f;
    const vf large = from_bits(bits((1.0f - e) / (1.0f + e)) | (bits(x) & (vi)splat(-0.0f)));
    return size < 0.63f ? x + x * square * p : large;
}

// To nearest, in the upper half; halfway away from zero, where results of fp32 arithmetic lie once in 2¹⁶: to even would
// take three instructions more. NaN stays NaN, unless all its bits are set, which none is that comes of bf16.
INLINE vu round_bf16(vf x) { return (vu)x + 0x8000; }
INLINE vh narrow_bf16(vf x) { return __builtin_convertvector(x == x ? (vi)(round_bf16(x) >> 16) : 0x7fc0 + vi{}, vh); }

INLINE Two load_two(const char* p, const int dtype) { return load_two(p, dtype, dtype == kBFloat16); }

INLINE void store_gradient(char* p, const Two& g, const int dtype, bool stream) {
    if (dtype == kFloat32) put(p, g.x[0], stream), put(p + sizeof(vf), g.x[1], stream);
    else put(p, (vf)joined(round_bf16(g.x[0]), round_bf16(g.x[1])), stream);
}

// ---- blocks

// Logits in fp32 or bf16, a multiple of kStep of them.
struct Block {
    const char* z;
    int dtype;
};

// `count` logits, or tanh(x·pre) of them under a soft cap, in fp32, padded by −inf to a multiple of kStep.
INLINE void stage_as(const Side& side, const char* p, int count, float* out, const int dtype, const bool capped) {
    const int size = size_of(dtype), whole = count / kLanes * kLanes;
    for (int i = 0; i < whole; i += kLanes) {
        const vf x = load(p + int64_t(i) * size, dtype);
        fetch_ahead(p + int64_t(i) * size, kLanes * size);
        *(vf*)(out + i) = capped ? tanh_(x * side.pre) : x;
    }
    if (whole < count) {
        alignas(64) char rest[64] = {};
        memcpy(rest, p + int64_t(whole) * size, (count - whole) * size);
        const vf x = load(rest, dtype);
        *(vf*)(out + whole) = capped ? tanh_(x * side.pre) : x;
    }
    for (int i = count; i % kStep; ++i) out[i] = -kInf;
}

static int whole_steps(int count) { return (count + kStep - 1) / kStep * kStep; }

static const float* stage(const Side& side, const char* row, int64_t start, int count, float* out) {
    const char* p = row + start * size_of(side.dtype);
    const bool capped = side.pre != 0;
    if (side.dtype == kFloat32 && !capped && count % kStep == 0) return (const float*)p;
    if (side.dtype == kFloat32)
        capped ? stage_as(side, p, count, out, kFloat32, true) : stage_as(side, p, count, out, kFloat32, false);
    else if (side.dtype == kBFloat16)
        capped ? stage_as(side, p, count, out, kBFloat16, true) : stage_as(side, p, count, out, kBFloat16, false);
    else capped ? stage_as(side, p, count, out, kFloat16, true) : stage_as(side, p, count, out, kFloat16, false);
    return out;
}

static bool as_they_lie(const Side& x, const Side& y) {
    return x.dtype == y.dtype && x.dtype != kFloat16 && x.pre == 0 && y.pre == 0;
}

static Block block_of(const Side& side, const char* row, int64_t start, int count, float* out, bool as_it_lies) {
    if (as_it_lies && count % kStep == 0) return {row + start * size_of(side.dtype), side.dtype};
    return {(const char*)stage(side, row, start, count, out), kFloat32};
}

INLINE float largest(vf x) {
    float result = -kInf;
    for (int i = 0; i < kLanes; ++i) result = x[i] > result ? x[i] : result;
    return result;
}

INLINE float top_as(const char* z, int count, const int dtype) {
    vf top = splat(-kInf);
    for (int i = 0; i < count; i += kStep) {
        const Two two = load_two(z + i * size_of(dtype), dtype);
        top = max_(two.x[1], max_(two.x[0], top));
    }
    return largest(top);
}

static float top_of(const Block& b, int count) {
    return b.dtype == kFloat32 ? top_as(b.z, count, kFloat32) : top_as(b.z, count, kBFloat16);
}

static int64_t first_of(const Block& b, float top) {
    for (int64_t i = 0;; i += kLanes) {
        const vf x = load(b.z + i * size_of(b.dtype), b.dtype);
        for (int j = 0; j < kLanes; ++j)
            if (x[j] == top) return i + j;
    }
}

// c·z − reference, rounded once. Any reference cancels from the results as long as a whole side has the same.
INLINE vf at(vf z, float c, float reference) {
#if X86_LEVEL >= 3 || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return z * c - reference;
#else  // a rounding of the product would be an error of the size of c·z, however near the reference it lies
    typedef double vd __attribute__((vector_size(8 * kLanes)));
    return __builtin_convertvector(__builtin_convertvector(z, vd) * double(c) - double(reference), vf);
#endif
}
INLINE vf at(const float* z, int i, float c, float reference) { return at(*(const vf_any*)(z + i), c, reference); }

static void store(const float* g, int count, int dtype, char* out, bool stream) {
    if (dtype == kFloat32) return copy_out(out, g, int64_t(count) * 4, stream);
    alignas(64) uint16_t narrowed[kBlock];
    for (int i = 0; i < count; i += kLanes) {
        const vf x = *(const vf*)(g + i);
        *(vh*)(narrowed + i) = dtype == kBFloat16 ? narrow_bf16(x) : narrow(x, kFloat16);
    }
    copy_out(out, narrowed, int64_t(count) * 2, stream);
}

// ---- first pass

struct Sums {  // relative to the references x0, y0
    double x = 0, y = 0, gap = 0, hole = 0, xu = 0, yv = 0;
    float cx = 0, cy = 0, x0 = 0, y0 = 0;
    bool holes = false;  // −inf met: the gradient pass must look out for it
    bool agree = false;  // the largest logits of both sides stand in one place
};

struct Part {  // what one block adds
    double x, y, gap, hole, xu, yv;
};

template <int dtype, bool holes, bool stats>
static Part part_of(const Sums& s, const char* x, const char* y, int count) {
    constexpr int size = size_of(dtype);
    vf X{}, Y{}, gap{}, hole{}, xu{}, yv{};
    for (int i = 0; i < count; i += kStep) {
        const Two zx = load_two(x + i * size, dtype), zy = load_two(y + i * size, dtype);
        vf z[4] = {at(zx.x[0], s.cx, s.x0), at(zy.x[0], s.cy, s.y0), at(zx.x[1], s.cx, s.x0), at(zy.x[1], s.cy, s.y0)},
           e[4];
        fetch_ahead(x + i * size, kStep * size), fetch_ahead(y + i * size, kStep * size);
        for (vf& u : z) u = below_overflow(u);  // the reference may lie far below this block
        exp2_(z, e);
        for (int k = 0; k < 4; k += 2) {
            vf u = z[k], v = z[k + 1];
            const vf eu = e[k], ev = e[k + 1];
            if (holes) {
                hole += v == -kInf ? eu : vf{};
                u = u == -kInf ? vf{} : u;
                v = v == -kInf ? vf{} : v;
            }
            X += eu;
            Y += ev;
            gap += eu * (u - v);
            if (stats) {
                xu += eu * u;
                yv += ev * v;
            }
        }
    }
    return {sum(X), sum(Y), sum(gap), holes ? sum(hole) : 0, stats ? sum(xu) : 0, stats ? sum(yv) : 0};
}

template <bool holes>
static Part part_of(const Sums& s, const Block& x, const Block& y, int count, bool stats) {
    if (x.dtype == kFloat32)
        return stats ? part_of<kFloat32, holes, true>(s, x.z, y.z, count)
                     : part_of<kFloat32, holes, false>(s, x.z, y.z, count);
    return stats ? part_of<kBFloat16, holes, true>(s, x.z, y.z, count)
                 : part_of<kBFloat16, holes, false>(s, x.z, y.z, count);
}

// What is left of a sum that lies too far below. Those of logits as far down as 1e10 may have overflowed, by the rounding
// of their reference; NaN are what a logit was.
static double vanished(double sum) { return sum != sum ? sum : 0; }

static void rebase(Sums& s, float x0, float y0) {
    const double dx = double(s.x0) - x0, dy = double(s.y0) - y0;
    // Before the first finite logit the reference is 0, and the step from it may be up, and huge.
    const double fx = s.x == 0 ? 0 : std::exp2(dx), fy = s.y == 0 ? 0 : std::exp2(dy);
    if (fx == 0) {
        s.gap = s.xu = s.hole = 0;
        s.x = vanished(s.x);
    } else {
        s.gap = fx * (s.gap + dx * s.x - dy * (s.x - s.hole));
        s.xu = fx * (s.xu + dx * s.x);
        s.x *= fx;
        s.hole *= fx;
    }
    s.yv = fy == 0 ? 0 : fy * (s.yv + dy * s.y);
    s.y = fy == 0 ? vanished(s.y) : fy * s.y;
    s.x0 = x0;
    s.y0 = y0;
}

// Until a side has met a finite logit its reference stays 0, so that −inf − reference is −inf and not NaN.
static float reference(double sum, float old, float top) {
    return top == -kInf || (sum != 0 && top <= old) ? old : top;
}

static void meet_tops(Sums& s, const Block& x, const Block& y, int count) {
    rebase(s, reference(s.x, s.x0, top_of(x, count) * s.cx), reference(s.y, s.y0, top_of(y, count) * s.cy));
}

struct Argmax {
    float top = -kInf;
    int64_t index = 0;
    void add(const Block& block, int64_t start, int count) {
        const float block_top = top_of(block, count);
        if (!(block_top > top)) return;
        top = block_top;
        index = start + first_of(block, top);
    }
};

static Sums online(const Side& side_x, const Side& side_y, const char* row_x, const char* row_y, int64_t V,
                   bool stats) {
    // A reference may lag behind the largest logit as long as u stays small: its rounding is u·2⁻²⁴. No entry exceeds
    // the sum, so this bounds u by 11.
    constexpr float kLag = 2 * kBlock;
    alignas(64) float x_block[kBlock], y_block[kBlock];
    const bool as_it_lies = as_they_lie(side_x, side_y);
    Sums s;
    Argmax x_best, y_best;
    s.cx = side_x.c;
    s.cy = side_y.c;
    for (int64_t start = 0; start < V; start += kBlock) {
        const int count = int(V - start < kBlock ? V - start : kBlock), padded = whole_steps(count);
        const Block x = block_of(side_x, row_x, start, count, x_block, as_it_lies);
        const Block y = block_of(side_y, row_y, start, count, y_block, as_it_lies);
        if (stats) x_best.add(x, start, padded), y_best.add(y, start, padded);
        if (s.x == 0 || s.y == 0) meet_tops(s, x, y, padded);
        Part part = part_of<false>(s, x, y, padded, stats);
        if (!(part.x + part.y <= kLag)) {
            meet_tops(s, x, y, padded);
            part = part_of<false>(s, x, y, padded, stats);
        }
        if (!(part.gap - part.gap == 0)) {  // −inf (or NaN) has no place in the fast form
            s.holes = true;
            part = part_of<true>(s, x, y, padded, stats);
        }
        s.x += part.x;
        s.y += part.y;
        s.gap += part.gap;
        s.hole += part.hole;
        s.xu += part.xu;
        s.yv += part.yv;
    }
    s.agree = x_best.index == y_best.index;
    return s;
}

// ---- last pass: the gradient of one block into g

struct Factors {
    float x, y;         // of 2^u and of 2^v
    float mean, floor;  // of u − v; what stands for a v of −inf
};

// Reverse KL, x = student, y = teacher: q·(u − v − mean). Forward KL, x = teacher, y = student: q − p. Writes the
// blocks' dtype. Sums and factors are copies: what g is written to might, for all the compiler knows, be theirs.
template <Kind kind, int dtype, bool holes>
static void gradient_as(const char* x, const char* y, char* g, int count, Sums s, Factors f, bool stream) {
    constexpr int size = size_of(dtype);
    const float offset = f.mean * f.x;
    for (int i = 0; i < count; i += kStep) {
        const Two zx = load_two(x + i * size, dtype), zy = load_two(y + i * size, dtype);
        vf u[2] = {at(zx.x[0], s.cx, s.x0), at(zx.x[1], s.cx, s.x0)}, eu[2];
        exp2_(u, eu);
        Two out;
        for (int k = 0; k < 2; ++k) {
            vf v = at(zy.x[k], s.cy, s.y0);
            if (holes) {
                u[k] = u[k] == -kInf ? vf{} : u[k];
                v = v == -kInf ? splat(f.floor) : v;
            }
            out.x[k] = kind == kForward ? exp2_(v) * f.y - eu[k] * f.x : eu[k] * ((u[k] - v) * f.x - offset);
        }
        store_gradient(g + i * size, out, dtype, stream);
    }
}

template <int dtype>
static auto gradient_of(Kind kind, bool holes) {
    return kind == kForward ? gradient_as<kForward, dtype, false>
           : holes          ? gradient_as<kReverse, dtype, true>
                            : gradient_as<kReverse, dtype, false>;
}

struct Mixture {  // x = student, y = teacher
    float a, b, pi, rho, kappa, cx, cy, x0, y0, log_x, log_y;
};

INLINE vf log_prob(const float* z, int i, float c, float top, float log_sum) {
    const vf l = at(z, i, c, top) - log_sum;
    return l == -kInf ? splat(kFloor) : l;
}

// φ (in bits) and w of K vectors. With e = 2^(−|lp − lq|) every quotient is of numbers in [0, 1], and none is 0/0; what
// vanishes with lp − lq is taken from 1 − e, as in the definition.
template <int K>
INLINE void mixture_of(const Mixture& m, const float* x, const float* y, float* w, vf& phis, vf& ws) {
    vf lq[K], lp[K], q[K], p[K], d[K], minus[K], e[K], less[K], t[K], density[K], l[K];
    vi teacher_larger[K];
    EACH lq[k] = log_prob(x, k * kLanes, m.cx, m.x0, m.log_x);
    EACH lp[k] = log_prob(y, k * kLanes, m.cy, m.y0, m.log_y);
    EACH d[k] = lp[k] - lq[k];
    EACH minus[k] = from_bits(bits(d[k]) | (vi)splat(-0.0f));
    EACH teacher_larger[k] = d[k] > 0;
    exp2_(lq, q);
    exp2_(lp, p);
    exp2_(minus, e);
    exp2m1(minus, e, less);  // the smaller of p and q over the larger, minus 1
    EACH t[k] = (teacher_larger[k] ? splat(m.rho) : splat(m.pi)) * less[k];
    EACH density[k] = (teacher_larger[k] ? m.pi + m.rho * e[k] : m.rho + m.pi * e[k]);  // m over the larger
    log2_(density, l);
    EACH l[k] += (t[k] - (density[k] - 1.0f)) * 1.4426950409f;  // what rounding took from 1 + t is put back
    for (int k = 0; k < K; ++k) {
        const vf lq_lm = teacher_larger[k] ? -d[k] - l[k] : -l[k], lp_lm = teacher_larger[k] ? -l[k] : d[k] - l[k];
        const vf share = (teacher_larger[k] ? m.rho * e[k] : splat(m.rho)) / density[k];
        const vf k_difference = m.kappa * ((teacher_larger[k] ? -p[k] : q[k]) * less[k]), b_term = m.b * q[k] * lq_lm;
        const vf wi = b_term * float(kLn2) - share * k_difference;
        *(vf*)(w + k * kLanes) = wi;
        phis += m.a * p[k] * lp_lm + (b_term - k_difference * float(kLog2e));
        ws += wi;
    }
}

// One block, all of whose arrays are padded to a multiple of kStep.
INLINE void mixture_block(const Mixture& m, const float* x, const float* y, float* w, int count, double& phi_sum,
                          double& w_sum) {
    vf phis{}, ws{};
    int i = 0;
    for (; i + 2 * kStep <= count; i += 2 * kStep) mixture_of<4>(m, x + i, y + i, w + i, phis, ws);
    for (; i < count; i += kStep) mixture_of<2>(m, x + i, y + i, w + i, phis, ws);
    phi_sum += sum(phis);
    w_sum += sum(ws);
}

INLINE void mixture_gradient(const Mixture& m, const float* x, const float* w, float* g, int count, float w_sum,
                             float factor) {
    constexpr int K = 2;
    for (int i = 0; i < count; i += kStep) {
        vf lq[K], q[K];
        EACH lq[k] = log_prob(x, i + k * kLanes, m.cx, m.x0, m.log_x);
        exp2_(lq, q);
        for (int k = 0; k < K; ++k)
            *(vf*)(g + i + k * kLanes) = (*(const vf*)(w + i + k * kLanes) - q[k] * w_sum) * factor;
    }
}

#undef EACH

// Chain rule through the soft cap: d tanh(x)/dx = 1 − tanh².
INLINE void through_cap(const float* tanh, float* g, int count) {
    for (int i = 0; i < count; i += kLanes) *(vf*)(g + i) *= 1.0f - *(const vf*)(tanh + i) * *(const vf*)(tanh + i);
}

// ---- a row

// Logits before the first whole line of what is streamed, as streams write whole lines.
static int64_t head_of(const char* out, bool stream, int64_t size) {
    return stream ? (64 - uintptr_t(out) % 64) % 64 / size : 0;
}

static void one_row(const Job& job, int64_t n, float* scratch) {
    const Side &student = job.student, &teacher = job.teacher;
    const char *row_s = student.row(n, job.T), *row_t = teacher.row(n, job.T);
    char* row_g = job.grad.data ? job.grad.row(n, job.T) : nullptr;
    const int64_t V = job.V, size = size_of(student.dtype);
    if (job.mask && !job.mask[n]) {
        job.loss[n] = 0;
        if (job.stats) job.stats[n] = job.stats[n + job.N] = job.stats[n + 2 * job.N] = 0;
        if (row_g) memset(row_g, 0, job.columns * size);
        return;
    }
    const bool forward = job.kind == kForward;
    const Sums s = forward ? online(teacher, student, row_t, row_s, V, job.stats)
                           : online(student, teacher, row_s, row_t, V, job.stats);
    const double log_x = std::log2(s.x), log_y = std::log2(s.y), floor = kFloor + log_y;
    const double mean = (s.gap - s.hole * floor) / s.x;
    double loss = mean - log_x + log_y, w_sum = 0;

    alignas(64) float x_block[kBlock], y_block[kBlock], g[kBlock];
    const Mixture m{job.a, job.b, job.pi, job.rho, job.kappa, s.cx, s.cy, s.x0, s.y0, float(log_x), float(log_y)};
    if (job.kind == kMixture) {
        loss = 0;
        for (int64_t start = 0; start < V; start += kBlock) {
            const int count = int(V - start < kBlock ? V - start : kBlock);
            const float* x = stage(student, row_s, start, count, x_block);
            const float* y = stage(teacher, row_t, start, count, y_block);
            mixture_block(m, x, y, row_g ? scratch + start : g, count, loss, w_sum);
        }
    } else {
        loss *= forward ? job.a : job.b;
    }
    job.loss[n] = float(loss * kLn2);
    if (job.stats) {
        const double entropy_x = (log_x - s.xu / s.x) * kLn2, entropy_y = (log_y - s.yv / s.y) * kLn2;
        job.stats[n] = float(forward ? entropy_y : entropy_x);
        job.stats[n + job.N] = float(forward ? entropy_x : entropy_y);
        job.stats[n + 2 * job.N] = s.agree;
    }
    if (!row_g) return;

    const double factor = job.chain * (job.row_scale ? job.row_scale[n] : 1.0);
    const Factors f = forward ? Factors{float(job.a * factor / s.x), float(job.a * factor / s.y), 0, 0}
                              : Factors{float(job.b * kLn2 * factor / s.x), 0, float(mean), float(floor)};
    const bool as_it_lies = job.kind != kMixture && as_they_lie(student, teacher);
    const int64_t head = head_of(row_g, job.stream && job.kind != kMixture, size);
    for (int64_t start = 0, limit = head ? head : kBlock; start < V; start += limit, limit = kBlock) {
        const int count = int(V - start < limit ? V - start : limit), padded = whole_steps(count);
        char* const out = row_g + start * size;
        if (job.kind == kMixture) {
            const float* x = stage(student, row_s, start, count, x_block);
            mixture_gradient(m, x, scratch + start, g, count, float(w_sum), float(factor));
            if (student.pre != 0) through_cap(x, g, count);
        } else {
            const Block s_block = block_of(student, row_s, start, count, x_block, as_it_lies);
            const Block t_block = block_of(teacher, row_t, start, count, y_block, as_it_lies);
            const Block &x = forward ? t_block : s_block, &y = forward ? s_block : t_block;
            const bool direct = as_it_lies && padded == count && (kStreams || !job.stream);
            const auto run = (x.dtype == kFloat32 ? gradient_of<kFloat32> : gradient_of<kBFloat16>)(job.kind, s.holes);
            run(x.z, y.z, direct ? out : (char*)g, padded, s, f, direct && job.stream);
            if (direct) continue;
            if (x.dtype == kBFloat16) {
                copy_out(out, g, int64_t(count) * size, job.stream);
                continue;
            }
            if (student.pre != 0) through_cap((const float*)s_block.z, g, count);
        }
        store(g, count, student.dtype, out, job.stream);
    }
    memset(row_g + V * size, 0, (job.columns - V) * size);
}

// row(n) for rows drawn `job.grain` at a time from `next`.
template <class Row>
static void each_row(const Job& job, std::atomic<int64_t>& next, Row row) {
    for (int64_t begin; (begin = next.fetch_add(job.grain)) < job.N;)
        for (int64_t n = begin; n < job.N && n < begin + job.grain; ++n) row(n);
    end_stream();
}

// One thread's work. scratch (V rounded up to whole blocks) is for mixtures.
static void run_rows(const Job& job, std::atomic<int64_t>& next, float* scratch) {
    each_row(job, next, [&](int64_t n) { one_row(job, n, scratch); });
}
