// A step of the Lanczos process with G (M, M), outside of span(V), for as many starting vectors as a vector has lanes:
// what they have at one place lies side by side, so that sums over places are additions of vectors. After
// lowrank_products.h.

INLINE vf& at_place(float* y, int64_t i) { return *(vf*)(y + i * kLanes); }
INLINE vf at_place(const float* y, int64_t i) { return *(const vf_any*)(y + i * kLanes); }

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

// put(row, sums) of the product of left (rows, terms) and right (terms, lanes); rows are even.
template <class Put>
INLINE void narrow_product(Terms left, int64_t rows, const float* right, int64_t terms, const Put& put) {
    product<false>(left, rows, (const uint32_t*)right, kLanes, terms,
                   [&](int64_t i, int, const vf* even, const vf* odd, int) { put(i, *even), put(i + 1, *odd); });
}

// Step t of q (…, M, lanes), which has q[0 … t]: fills in q[t + 1], diagonal[t] and off[t]. scale: of G. M, K are even.
static void lanczos_step(const float* g, int64_t m, float scale, const float* v, int64_t k, float* q, int64_t t,
                         float* diagonal, float* off) {
    const auto past = [&](int64_t s) { return q + s * m * kLanes; };
    float *const y = (float*)scratch((m + k) * kLanes), *const inside = y + m * kLanes;
    memset(y, 0, (m + k) * kLanes * 4);
    constexpr int64_t kSome = 96;  // rows, whose sums stay in the first-level cache
    for (int64_t row = 0; row < m; row += kSome)
        for (int64_t start = 0; start < m; start += kTerms)  // sums of some terms, then sums of those
            narrow_product({(const uint32_t*)g + row * m + start, m, 1}, std::min(kSome, m - row),
                           past(t) + start * kLanes, std::min(kTerms, m - start),
                           [&](int64_t i, vf sum) { at_place(y, row + i) += sum * scale; });
    for (int64_t start = 0; start < m; start += kTerms)
        narrow_product({(const uint32_t*)(v + start * k), 1, k}, k, y + start * kLanes, std::min(kTerms, m - start),
                       [&](int64_t i, vf sum) { at_place(inside, i) += sum; });
    narrow_product({(const uint32_t*)v, k, 1}, m, inside, k, [&](int64_t i, vf sum) { at_place(y, i) -= sum; });

    const vf alpha = dot_of(past(t), y, m);
    for (int turn = 0; turn < 2; ++turn)
        for (int64_t s = t; s >= 0; --s) {
            const vf factor = dot_of(past(s), y, m);
            for (int64_t i = 0; i < m; ++i) at_place(y, i) -= factor * at_place((const float*)past(s), i);
        }
    const vf length = (vf)_mm512_sqrt_ps((__m512)dot_of(y, y, m));
    *(vf_any*)(diagonal + t * kLanes) = alpha;
    // Where an invariant subspace was found the rest is rounding. Zero vectors decouple T, with no weight.
    const vi alive = length > 0x1p-23f * at_place((const float*)diagonal, 0);
    *(vf_any*)(off + t * kLanes) = alive ? length : vf{};
    for (int64_t i = 0; i < m; ++i) *(vf_any*)(past(t + 1) + i * kLanes) = alive ? at_place(y, i) / length : vf{};
}
