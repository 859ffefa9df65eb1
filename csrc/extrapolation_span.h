// A span of one tensor's extrapolation, included once per instruction set (csrc/clones.h) after csrc/vectors.h.

struct Sums {
    double delta_sq = 0, weight_sq = 0, nonfinite = 0;
};

// count ≤ kBlock elements at a, c and w; m null where there is no master. What is stored goes past the caches from
// registers if it can, else through a buffer in the L1 cache. Whole vectors are read and written only where whole ones
// are.
INLINE void block(const char* a, const char* c, char* w, char* m, int count, float alpha, const int a_dtype,
                  const int c_dtype, const int w_dtype, const int m_dtype, const bool by_turns, bool stream,
                  const bool stats, Sums& sums) {
    alignas(64) char out[kBlock * 4], master[kBlock * 4], a_rest[128] = {}, c_rest[128] = {};
    const int64_t a_size = size_of(a_dtype), c_size = size_of(c_dtype), w_size = size_of(w_dtype),
                  m_size = size_of(m_dtype);
    const bool at_a = alpha == 0, at_c = alpha == 1;
    const bool direct = (w_dtype == kFloat32 || by_turns) && count % kStep == 0 &&
                        (!stream || (kStreams && uintptr_t(w) % sizeof(vf) == 0));
    char* const to = direct ? w : out;
    vf delta_sq[2] = {}, weight_sq[2] = {};
    for (int i = 0; i < count; i += kStep) {
        const char *pa = a + i * a_size, *pc = c + i * c_size;
        if (count - i < kStep) {  // both sides padded by zeros, which add nothing
            memcpy(a_rest, pa, (count - i) * a_size);
            memcpy(c_rest, pc, (count - i) * c_size);
            pa = a_rest, pc = c_rest;
        }
        fetch_ahead(pa, kStep * a_size), fetch_ahead(pc, kStep * c_size);
        const Two x = load_two(pa, a_dtype, by_turns), y = load_two(pc, c_dtype, by_turns);
        Two value;
        for (int k = 0; k < 2; ++k) {
            const vf delta = y.x[k] - x.x[k];
            value.x[k] = at_c ? y.x[k] : at_a ? x.x[k] : alpha * delta + x.x[k];
            if (stats) delta_sq[k] += delta * delta;
        }
        const Two written = store_two(to + i * w_size, value, w_dtype, by_turns, direct && stream);
        if (m) store_two(master + i * m_size, value, m_dtype, false, false);
        if (stats)
            for (int k = 0; k < 2; ++k) weight_sq[k] += written.x[k] * written.x[k];
    }
    if (stats) {
        sums.delta_sq += sum(delta_sq[0] + delta_sq[1]);
        const double square = sum(weight_sq[0] + weight_sq[1]);
        sums.weight_sq += square;
        if (!(square - square == 0))  // an element is not finite, or only its square
            for (int i = 0; i < count; i += kLanes) {
                const vf written = load(to + i * w_size, w_dtype);
                for (int j = 0; j < kLanes && i + j < count; ++j) sums.nonfinite += !(written[j] - written[j] == 0);
            }
    }
    if (m) copy_out(m, master, count * m_size, stream);
    if (direct) return;
    const char* const end = at_c && c_dtype == w_dtype   ? c
                            : at_a && a_dtype == w_dtype ? a
                                                         : out;  // bit for bit, NaN too
    if (end != w) copy_out(w, end, count * w_size, stream);
}

INLINE void span_as(const Span& s, const int a_dtype, const int c_dtype, const int w_dtype, const int m_dtype,
                    const bool by_turns, const bool stats, Sums& sums) {
    for (int64_t i = s.begin; i < s.end; i += kBlock) {
        const int count = int(s.end - i < kBlock ? s.end - i : kBlock);
        block(s.anchor + i * size_of(a_dtype), s.current + i * size_of(c_dtype), s.param + i * size_of(w_dtype),
              s.master ? s.master + i * size_of(m_dtype) : nullptr, count, s.alpha, a_dtype, c_dtype, w_dtype, m_dtype,
              by_turns, s.stream, stats, sums);
    }
}

template <bool stats>
static void span_of(const Span& s, Sums& sums) {  // the usual mixes as constants
    const bool wide_master = !s.master || s.m_dtype == kFloat32,
               alike = s.a_dtype == s.c_dtype && s.c_dtype == s.w_dtype && wide_master;
    if (alike && s.w_dtype == kFloat32) span_as(s, kFloat32, kFloat32, kFloat32, kFloat32, false, stats, sums);
    else if (alike && s.w_dtype == kFloat16) span_as(s, kFloat16, kFloat16, kFloat16, kFloat32, false, stats, sums);
    else if (alike && s.master) span_as(s, kBFloat16, kBFloat16, kBFloat16, kFloat32, false, stats, sums);
    else if (alike) span_as(s, kBFloat16, kBFloat16, kBFloat16, kFloat32, true, stats, sums);
    else span_as(s, s.a_dtype, s.c_dtype, s.w_dtype, s.m_dtype, false, stats, sums);
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
