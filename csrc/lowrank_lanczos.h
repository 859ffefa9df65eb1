// A step of the Lanczos process with G (M, M), outside of span(V), for kProbes starting vectors: what they have at one place
// lies side by side, so that sums over places are additions of vectors. After lowrank_products.h.

constexpr int kProbes = 16;

INLINE vf& at_place(float* y, int64_t i) { return *(vf*)(y + i * kProbes); }
INLINE vf at_place(const float* y, int64_t i) { return *(const vf_any*)(y + i * kProbes); }

// Σ a·b over places, by fours: a chain of additions would wait for itself, and be off by more than fp32 bears.
static vf dot_of(const float* a, const float* b, int64_t m) {
    vf sums[4] = {};
    int64_t i = 0;
    for (; i + 4 <= m; i += 4)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] += at_place(a, i + j) * at_place(b, i + j);
    for (; i < m; ++i) sums[0] += at_place(a, i) * at_place(b, i);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// put(at, sums), at to + row · kProbes and on, of the product of left (rows, terms) and right (terms, kProbes); rows are
// even.
template <class Put>
INLINE void narrow_product(Terms left, int64_t rows, const float* right, int64_t terms, float* to, const Put& put) {
    product<kFloats>(left, rows, (const uint32_t*)right, kProbes, terms,
                     [&](int64_t i, int vector, const vf* even, const vf* odd, int count) {
                         for (int c = 0; c < count; ++c) {
                             float* const at = to + i * kProbes + (vector + c) * kLanes;
                             put(*(vf*)at, even[c]), put(*(vf*)(at + kProbes), odd[c]);
                         }
                     });
}

INLINE vf root(vf x) {
#if X86_LEVEL >= 4
    return (vf)_mm512_sqrt_ps((__m512)x);
#else
    return (vf)_mm256_sqrt_ps((__m256)x);
#endif
}

// Step t of q (…, M, kProbes), which has q[0 … t]: fills in q[t + 1], diagonal[t] and off[t]. scale: of G. M, K are even.
static void lanczos_step(const float* g, int64_t m, float scale, const float* v, int64_t k, float* q, int64_t t,
                         float* diagonal, float* off) {
    float *const all = (float*)scratch((m + k) * kProbes), *const inside = all + m * kProbes,
                 *const last = q + t * m * kProbes;
    memset(all, 0, (m + k) * kProbes * 4);
    constexpr int64_t kSome = 48;  // rows, whose sums stay in the first-level cache; with 96 a quarter slower
    for (int64_t row = 0; row < m; row += kSome)
        for (int64_t start = 0; start < m; start += kTerms)  // sums of some terms, then sums of those
            narrow_product({(const uint32_t*)g + row * m + start, m, 1}, std::min(kSome, m - row),
                           last + start * kProbes, std::min(kTerms, m - start), all + row * kProbes,
                           [&](vf& y, vf sum) { y += sum * scale; });
    for (int64_t start = 0; start < m; start += kTerms)
        narrow_product({(const uint32_t*)(v + start * k), 1, k}, k, all + start * kProbes, std::min(kTerms, m - start),
                       inside, [&](vf& y, vf sum) { y += sum; });
    narrow_product({(const uint32_t*)v, k, 1}, m, inside, k, all, [&](vf& y, vf sum) { y -= sum; });

    for (int64_t lane = 0; lane < kProbes; lane += kLanes) {
        float* const y = all + lane;
        const auto past = [&](int64_t s) { return (const float*)q + s * m * kProbes + lane; };
        const vf alpha = dot_of(past(t), y, m);
        for (int turn = 0; turn < 2; ++turn)
            for (int64_t s = t; s >= 0; --s) {
                const vf factor = dot_of(past(s), y, m);
                for (int64_t i = 0; i < m; ++i) at_place(y, i) -= factor * at_place(past(s), i);
            }
        const vf length = root(dot_of(y, y, m));
        *(vf_any*)(diagonal + t * kProbes + lane) = alpha;
        // Where an invariant subspace was found the rest is rounding. Zero vectors decouple T, with no weight.
        const vi alive = length > 0x1p-23f * at_place((const float*)diagonal + lane, 0);
        *(vf_any*)(off + t * kProbes + lane) = alive ? length : vf{};
        float* const next = last + m * kProbes + lane;
        for (int64_t i = 0; i < m; ++i) *(vf_any*)(next + i * kProbes) = alive ? at_place(y, i) / length : vf{};
    }
}
