// A step of the Lanczos process with G (M, M) for 16 starting vectors at a time, outside of span(V): what 16 vectors have
// at one place lies side by side, so that every sum over places is an addition of vectors. After lowrank_products.h.

constexpr int kProbes = 16, kEach = kProbes / kLanes;  // vectors of lanes at a place

struct Probes {
    vf x[kEach];
};

INLINE Probes at_place(const float* y, int64_t i) {
    Probes p;
#pragma GCC unroll 2
    for (int c = 0; c < kEach; ++c) p.x[c] = *(const vf_any*)(y + i * kProbes + c * kLanes);
    return p;
}

// Σ a·b over places, in parts: the terms of a chain are as many as fp32 bears.
static Probes dot_of(const float* a, const float* b, int64_t m) {
    constexpr int64_t kTogether = 64;
    Probes total{};
    for (int64_t start = 0; start < m; start += kTogether) {
        Probes sum{};
        for (int64_t i = start; i < std::min(start + kTogether, m); ++i)
#pragma GCC unroll 2
            for (int c = 0; c < kEach; ++c) sum.x[c] += at_place(a, i).x[c] * at_place(b, i).x[c];
        for (int c = 0; c < kEach; ++c) total.x[c] += sum.x[c];
    }
    return total;
}

// y −= a·factor
static void subtract(float* y, const float* a, const Probes& factor, int64_t m) {
    for (int64_t i = 0; i < m; ++i)
#pragma GCC unroll 2
        for (int c = 0; c < kEach; ++c) *(vf_any*)(y + i * kProbes + c * kLanes) -= at_place(a, i).x[c] * factor.x[c];
}

// The product of (rows, terms) `left` with (terms, 16) `right`, by put(row, sums).
template <class Put>
INLINE void narrow_product(Terms left, int64_t rows, const float* right, int64_t terms, const Put& put) {
    product<false>(left, rows, (const uint32_t*)right, kProbes, terms,
                   [&](int64_t i, int vector, const vf* even, const vf* odd, int count) {
                       for (int c = 0; c < count; ++c) put(i, vector + c, even[c]), put(i + 1, vector + c, odd[c]);
                   });
}

// Step t of q (…, M, 16), which has q[0 … t]: fills in q[t + 1], diagonal[t] and off[t] (16 each). scale: of G. M and K
// are even.
static void lanczos_step(const float* g, int64_t m, float scale, const float* v, int64_t k, float* q, int64_t t,
                         float* diagonal, float* off) {
    float* const y = q + (t + 1) * m * kProbes;
    const float* const latest = q + t * m * kProbes;
    float* const inside = (float*)scratch(k * kProbes);
    constexpr int64_t kSome = 96;  // rows, whose sums stay in the first-level cache
    memset(y, 0, m * kProbes * 4);
    for (int64_t row = 0; row < m; row += kSome)
        for (int64_t start = 0; start < m; start += kTerms) {  // sums of some terms, then sums of those
            float* const to = y + row * kProbes;
            narrow_product({(const uint32_t*)g + row * m + start, m, 1}, std::min(kSome, m - row),
                           latest + start * kProbes, std::min(kTerms, m - start),
                           [&](int64_t i, int c, vf sum) { *(vf_any*)(to + i * kProbes + c * kLanes) += sum * scale; });
        }
    memset(inside, 0, k * kProbes * 4);
    for (int64_t start = 0; start < m; start += kTerms)
        narrow_product({(const uint32_t*)(v + start * k), 1, k}, k, y + start * kProbes, std::min(kTerms, m - start),
                       [&](int64_t i, int c, vf sum) { *(vf_any*)(inside + i * kProbes + c * kLanes) += sum; });
    narrow_product({(const uint32_t*)v, k, 1}, m, inside, k,
                   [&](int64_t i, int c, vf sum) { *(vf_any*)(y + i * kProbes + c * kLanes) -= sum; });

    const Probes alpha = dot_of(latest, y, m);
    for (int turn = 0; turn < 2; ++turn)
        for (int64_t past = t; past >= 0; --past)
            subtract(y, q + past * m * kProbes, dot_of(q + past * m * kProbes, y, m), m);
    const Probes beta = dot_of(y, y, m);
    Probes inverse;
    for (int c = 0; c < kEach; ++c) {
        *(vf_any*)(diagonal + t * kProbes + c * kLanes) = alpha.x[c];
        for (int lane = 0; lane < kLanes; ++lane) {
            const float length = std::sqrt(beta.x[c][lane]);
            // Where an invariant subspace was found the rest is rounding. Zero vectors decouple T, with no weight.
            const bool alive = length > 0x1p-23f * diagonal[c * kLanes + lane];
            off[t * kProbes + c * kLanes + lane] = alive ? length : 0;
            inverse.x[c][lane] = alive ? 1 / length : 0;
        }
    }
    for (int64_t i = 0; i < m; ++i)
        for (int c = 0; c < kEach; ++c) {
            vf_any* const to = (vf_any*)(y + i * kProbes + c * kLanes);
            *to = inverse.x[c] == 0 ? vf{} : *to * inverse.x[c];
        }
}
