// Vectors of floats and the dtypes they are loaded from and stored as. Included once per instruction set, inside a
// namespace of its own (csrc/clones.h), so nothing is included here.

// As many as a register holds: what is wider GCC keeps in memory, from one operation to the next.
#if X86_LEVEL == 1
constexpr int kLanes = 4;
#elif X86_LEVEL == 3
constexpr int kLanes = 8;
#else
constexpr int kLanes = 16;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef float vf_any __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
typedef int32_t vi_any __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));

INLINE vf splat(float x) { return x - vf{}; }
INLINE vi bits(vf x) { return (vi)x; }
INLINE vf from_bits(vi x) { return (vf)x; }
INLINE vf max_(vf a, vf b) { return a > b ? a : b; }

// In fp64, by halves: one chain through all lanes would take as long as the arithmetic of a block. Written out, since
// the compiler keeps no vectors in a loop over the halves' widths.
INLINE double sum(vf x) {
    double s[kLanes];
    for (int i = 0; i < kLanes; ++i) s[i] = x[i];
    for (int i = 0; i + 8 < kLanes; ++i) s[i] += s[i + 8];
    for (int i = 0; i < 4 && i + 4 < kLanes; ++i) s[i] += s[i + 4];
    return (s[0] + s[2]) + (s[1] + s[3]);
}

// ---- dtypes: fp32, and bf16 and fp16 by integer arithmetic, which every instruction set has in vectors

INLINE vf load(const char* p, int dtype) {
    if (dtype == kFloat32) return *(const vf_any*)p;
    const vi h = __builtin_convertvector(*(const vh_any*)p, vi);
    if (dtype == kBFloat16) return from_bits(h << 16);
    const vi size = (h & 0x7fff) << 13;  // fp16: rebase the exponent by a product, which also normalises subnormals
    const vi finite = bits(from_bits(size) * 0x1p112f), infinite = size | 0x7f800000;
    return from_bits((size >= (0x7c00 << 13) ? infinite : finite) | ((h & 0x8000) << 16));
}

INLINE vh narrow(vf x, int dtype) {  // to nearest even; NaN stays NaN
    const vi b = bits(x), size = b & 0x7fffffff;
    if (dtype == kBFloat16) {
        const vi rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
        return __builtin_convertvector(x == x ? rounded : 0x7fc0 + vi{}, vh);
    }
    const vi normal = (size + 0xfff + ((size >> 13) & 1) - (112 << 23)) >> 13;
    const vi small = bits(from_bits(size) + 0.5f) - 0x3f000000;  // subnormals have the spacing of 0.5 in fp32
    vi h = size < (113 << 23) ? small : normal;
    h = size >= 0x477ff000 ? 0x7c00 + vi{} : h;  // 65520 and more
    h = x == x ? h : 0x7e00 + vi{};
    return __builtin_convertvector(h | ((b >> 16) & 0x8000), vh);
}
