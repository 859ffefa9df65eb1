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

// ---- dtypes: fp32, and bf16 and fp16 by integer arithmetic where there are no instructions for them

INLINE vf load(const char* p, int dtype) {
    if (dtype == kFloat32) return *(const vf_any*)p;
#if X86_LEVEL >= 4
    if (dtype == kFloat16) return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif X86_LEVEL == 3
    if (dtype == kFloat16) return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
    const vi h = __builtin_convertvector(*(const vh_any*)p, vi);
    if (dtype == kBFloat16) return from_bits(h << 16);
    const vi size = (h & 0x7fff) << 13;  // fp16: rebase the exponent by a product, which also normalises subnormals
    const vi finite = bits(from_bits(size) * 0x1p112f), infinite = size | 0x7f800000;
    return from_bits((size >= (0x7c00 << 13) ? infinite : finite) | ((h & 0x8000) << 16));
}

// To bf16 in the upper half, to nearest even. NaN stays NaN if it came of bf16.
INLINE vu rounded(vf x) {
    const vu b = (vu)x;
    return b + 0x7fff + ((b >> 16) & 1);
}

INLINE vh narrow(vf x, int dtype) {  // to nearest even; NaN stays NaN
    const vi b = bits(x), size = b & 0x7fffffff;
    if (dtype == kBFloat16) return __builtin_convertvector(x == x ? (vi)(rounded(x) >> 16) : 0x7fc0 + vi{}, vh);
#if X86_LEVEL >= 4
    return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif X86_LEVEL == 3
    return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#endif
    const vi normal = (size + 0xfff + ((size >> 13) & 1) - (112 << 23)) >> 13;
    const vi small = bits(from_bits(size) + 0.5f) - 0x3f000000;  // subnormals have the spacing of 0.5 in fp32
    vi h = size < (113 << 23) ? small : normal;
    h = size >= 0x477ff000 ? 0x7c00 + vi{} : h;  // 65520 and more
    h = x == x ? h : 0x7e00 + vi{};
    return __builtin_convertvector(h | ((b >> 16) & 0x8000), vh);
}

// ---- two vectors at once

constexpr int kStep = 2 * kLanes;

struct Two {
    vf x[2];
};

// by_turns, of bf16 the first holds the even elements and the second the odd ones: no shuffle, and as stores undo it,
// sums over all elements need not know.
INLINE Two load_two(const char* p, const int dtype, const bool by_turns) {
    if (!by_turns) return {{load(p, dtype), load(p + kLanes * size_of(dtype), dtype)}};
    const vi h = *(const vi_any*)p;
    return {{from_bits(h << 16), from_bits(h & ~0xffff)}};
}

constexpr bool kStreams = X86_LEVEL >= 3;  // stores past the caches from vectors' own registers

INLINE void put(char* p, vf x, bool stream) {
#if X86_LEVEL >= 4
    if (stream) return _mm512_stream_ps((float*)p, (__m512)x);
#elif X86_LEVEL == 3
    if (stream) return _mm256_stream_ps((float*)p, (__m256)x);
#endif
    *(vi_any*)p = (vi)x;  // of which pairs of bf16 lie at any even address
}

// bf16 by turns, from its halves rounded in the upper bits.
INLINE vu joined(vu even, vu odd) { return (even >> 16) | (odd & 0xffff0000u); }

// To nearest even, what was stored; by_turns, NaN must have come of bf16.
INLINE Two store_two(char* p, const Two& g, const int dtype, const bool by_turns, bool stream) {
    if (dtype == kFloat32) return put(p, g.x[0], stream), put(p + sizeof(vf), g.x[1], stream), g;
    if (by_turns) {
        const vu h = joined(rounded(g.x[0]), rounded(g.x[1]));
        put(p, (vf)h, stream);
        return {{(vf)(h << 16), (vf)(h & 0xffff0000u)}};
    }
    for (int k = 0; k < 2; ++k) *(vh_any*)(p + 2 * k * kLanes) = narrow(g.x[k], dtype);
    return load_two(p, dtype, false);
}

// Asks for what lies a page ahead of `bytes` read from p: the hardware's own prefetchers stop where a page ends, and
// asking for more at once would wait for the few lines that may be under way. Past the end this may be no memory at
// all, which does no harm.
INLINE void fetch_ahead(const char* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + 4096 + i, 0, 2);
}
