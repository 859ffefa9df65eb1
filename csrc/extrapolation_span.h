// A span of one tensor's extrapolation, included once per instruction set (csrc/clones.h) after csrc/vectors.h.

struct Sums {
    double delta_sq = 0, weight_sq = 0, nonfinite = 0;
};

INLINE void put(vf x, char* p, int dtype) {
    if (dtype == kFloat32) *(vf_any*)p = x;
    else *(vh_any*)p = dtype == kBFloat16 ? narrow(x, kBFloat16) : narrow(x, kFloat16);
}

// The line of 64 bytes that ends at `out` goes past the caches to where ends `to`.
INLINE void stream_line(char* to, const char* out) {
#if X86_LEVEL >= 4
    _mm512_stream_si512((__m512i*)(to - 64), _mm512_load_si512(out - 64));
#endif
}

// count ≤ kBlock elements at a, c and w; m null where there is no master. What is stored goes through a buffer in the
// L1 cache, from which it can be streamed. Whole vectors are read and written only where whole ones are.
INLINE void block(const char* a, const char* c, char* w, char* m, int count, float alpha, const int a_dtype,
                  const int c_dtype, const int w_dtype, const int m_dtype, bool stream, const bool stats, Sums& sums) {
    alignas(64) char out[kBlock * 4], master[kBlock * 4], a_rest[64] = {}, c_rest[64] = {};
    const int64_t a_size = size_of(a_dtype), c_size = size_of(c_dtype), w_size = size_of(w_dtype),
                  m_size = size_of(m_dtype);
    const bool at_a = alpha == 0, at_c = alpha == 1;
    const char* const end = at_c && c_dtype == w_dtype   ? c
                            : at_a && a_dtype == w_dtype ? a
                                                         : out;  // bit for bit, NaN too
    // As they are filled: in bursts they would wait for one another.
    const bool by_line = X86_LEVEL >= 4 && stream && end == out && uintptr_t(w) % 64 == 0 && count * w_size % 64 == 0;
    vf delta_sq{}, weight_sq{};
    for (int i = 0; i < count; i += kLanes) {
        const char *pa = a + i * a_size, *pc = c + i * c_size;
        if (count - i < kLanes) {  // both sides padded by zeros, which add nothing
            memcpy(a_rest, pa, (count - i) * a_size);
            memcpy(c_rest, pc, (count - i) * c_size);
            pa = a_rest, pc = c_rest;
        }
        // A page ahead, since the processor's own prefetching stops where a page ends.
        __builtin_prefetch(pa + 4096, 0, 2), __builtin_prefetch(pc + 4096, 0, 2);
        const vf x = load(pa, a_dtype), y = load(pc, c_dtype), delta = y - x;
        const vf value = at_c ? y : at_a ? x : alpha * delta + x;
        put(value, out + i * w_size, w_dtype);
        if (m) put(value, master + i * m_size, m_dtype);
        if (const int64_t held = (i + kLanes) * w_size; by_line && held % 64 == 0) stream_line(w + held, out + held);
        if (stats) {
            const vf written = load(out + i * w_size, w_dtype);
            delta_sq += delta * delta;
            weight_sq += written * written;
        }
    }
    if (stats) {
        sums.delta_sq += sum(delta_sq);
        const double square = sum(weight_sq);
        sums.weight_sq += square;
        if (!(square - square == 0))  // an element is not finite, or only its square
            for (int i = 0; i < count; i += kLanes) {
                const vf written = load(out + i * w_size, w_dtype);
                for (int j = 0; j < kLanes && i + j < count; ++j) sums.nonfinite += !(written[j] - written[j] == 0);
            }
    }
    if (m) copy_out(m, master, count * m_size, stream);
    if (end != w && !by_line) copy_out(w, end, count * w_size, stream);
}

INLINE void span_as(const Span& s, const int a_dtype, const int c_dtype, const int w_dtype, const int m_dtype,
                    const bool stats, Sums& sums) {
    for (int64_t i = s.begin; i < s.end; i += kBlock) {
        const int count = int(s.end - i < kBlock ? s.end - i : kBlock);
        block(s.anchor + i * size_of(a_dtype), s.current + i * size_of(c_dtype), s.param + i * size_of(w_dtype),
              s.master ? s.master + i * size_of(m_dtype) : nullptr, count, s.alpha, a_dtype, c_dtype, w_dtype, m_dtype,
              s.stream, stats, sums);
    }
}

template <bool stats>
static void span_of(const Span& s, Sums& sums) {  // the usual mixes as constants
    const bool wide_master = !s.master || s.m_dtype == kFloat32,
               alike = s.a_dtype == s.c_dtype && s.c_dtype == s.w_dtype && wide_master;
    if (alike && s.w_dtype == kFloat32) span_as(s, kFloat32, kFloat32, kFloat32, kFloat32, stats, sums);
    else if (alike && s.w_dtype == kBFloat16) span_as(s, kBFloat16, kBFloat16, kBFloat16, kFloat32, stats, sums);
    else if (alike) span_as(s, kFloat16, kFloat16, kFloat16, kFloat32, stats, sums);
    else span_as(s, s.a_dtype, s.c_dtype, s.w_dtype, s.m_dtype, stats, sums);
}

// One thread's work: spans drawn from `next`; sums (spans, 3) or null.
static void run_spans(const std::vector<Span>& spans, std::atomic<int64_t>& next, double* all_sums) {
    for (int64_t i; (i = next.fetch_add(1)) < int64_t(spans.size());) {
        Sums sums;
        if (!all_sums) {
            span_of<false>(spans[i], sums);
            continue;
        }
        span_of<true>(spans[i], sums);
        all_sums[3 * i] = sums.delta_sq;
        all_sums[3 * i + 1] = sums.weight_sq;
        all_sums[3 * i + 2] = sums.nonfinite;
    }
    end_stream();
}
