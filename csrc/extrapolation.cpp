// W ← A + α·(C − A) over a list of tensors, on the CPU, in one pass with its statistics.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "cpu.h"

namespace nb = nanobind;

namespace {

constexpr int kBlock = 1024;                      // elements whose results wait in the L1 cache for their store
constexpr int64_t kSpan = int64_t(1) << 17;       // elements a thread takes at a time
constexpr int64_t kWorkPerThread = 2 * kSpan;     // elements worth starting a thread for

// Elements [begin, end) of one tensor.
struct Span {
    char* param;
    const char *anchor, *current;
    char* master;  // or null
    int w_dtype, a_dtype, c_dtype, m_dtype;
    float alpha;
    bool stream;
    int64_t begin, end;
};

#define KERNEL "extrapolation_span.h"
#include "clones.h"

const auto kRuns = supported(CLONES(run_spans));

// Per tensor: addresses (masters empty, or 0 for none), number of elements, dtypes as w | a << 2 | c << 4 | m << 6.
// alphas: fp64 (L,). stats: fp32 (L, 3), or 0 for none. All tensors contiguous; a param may be its anchor or its current.
void extrapolate(const std::vector<uintptr_t>& params, const std::vector<uintptr_t>& anchors, const std::vector<uintptr_t>& currents,
                 const std::vector<uintptr_t>& masters, const std::vector<int64_t>& sizes, const std::vector<int>& dtypes,
                 uintptr_t alphas, uintptr_t stats, int threads, int instruction_set) {
    const int64_t L = int64_t(params.size());
    int64_t elements = 0, bytes = 0;
    std::vector<Span> spans;
    std::vector<int64_t> first(L + 1, 0);  // of a tensor's spans
    for (int64_t i = 0; i < L; ++i) elements += sizes[i], bytes += sizes[i] * size_of(dtypes[i] & 3);
    for (int64_t i = 0; i < L; ++i) {
        Span s{reinterpret_cast<char*>(params[i]), reinterpret_cast<const char*>(anchors[i]), reinterpret_cast<const char*>(currents[i]),
               masters.empty() ? nullptr : reinterpret_cast<char*>(masters[i]), dtypes[i] & 3, dtypes[i] >> 2 & 3, dtypes[i] >> 4 & 3,
               dtypes[i] >> 6 & 3, float(reinterpret_cast<const double*>(alphas)[i]), false, 0, 0};
        s.stream = bytes >= kLarge && s.param != s.anchor && s.param != s.current;  // else its lines are in the caches
        for (; s.begin < sizes[i]; s.begin = s.end) {
            s.end = std::min(s.begin + kSpan, sizes[i]);
            spans.push_back(s);
        }
        first[i + 1] = int64_t(spans.size());
    }
    std::vector<double> sums(stats ? 3 * spans.size() : 0);
    const auto run = kRuns.at(instruction_set < 0 ? kRuns.size() - 1 : size_t(instruction_set));
    const int64_t count = std::clamp<int64_t>(elements / kWorkPerThread, 1, std::max(threads, 1));
    {
        nb::gil_scoped_release release;
        std::atomic<int64_t> next{0};
        std::vector<std::thread> helpers;
        auto work = [&] { run(spans, next, stats ? sums.data() : nullptr); };
        for (int64_t i = 1; i < count; ++i) helpers.emplace_back(work);
        work();
        for (auto& helper : helpers) helper.join();
    }
    for (int64_t i = 0; stats && i < L; ++i)  // in order, whoever did the spans: the same bits each time
        for (int k = 0; k < 3; ++k) {
            double total = 0;
            for (int64_t j = first[i]; j < first[i + 1]; ++j) total += sums[3 * j + k];
            reinterpret_cast<float*>(stats)[3 * i + k] = float(total);
        }
}

}  // namespace

void bind_extrapolation(nb::module_& m) { m.def("extrapolate", &extrapolate); }
