// Blocks of a row's logits: the functions that are computed of vectors of them, and how they are read and written. Where
// both sides are fp32 or both bf16, the two hot loops read them as they lie; whatever else (fp16, soft caps, sides of
// different dtypes, a row's ragged end) is first widened to fp32 in the L1 cache (`stage`).

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
