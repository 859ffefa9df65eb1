// W ← A + α·(C − A) over a list of tensors, on the CPU, in one pass with its statistics.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "tensors.h"
#include "threads.h"

namespace {

constexpr int kBlock = 1024;                   // elements whose results wait in the L1 cache for their store
constexpr int64_t kSpan = int64_t(1) << 17;    // elements a thread takes at a time
constexpr int64_t kWorkPerThread = 2 * kSpan;  // elements worth starting a thread for

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

// Lists of L torch.Tensors (masters may be empty). alphas: fp64 (L,). stats: fp32 (L, 3), or 0 for none. A param may be
// its anchor or its current. False, with nothing done, if a tensor is not contiguous or its dtype is not one of ours.
bool extrapolate(nb::handle exchange, nb::list params, nb::list anchors, nb::list currents, nb::list masters,
                 uintptr_t alphas, uintptr_t stats, int threads, int instruction_set) {
    const Exchange& api = Exchange::of(exchange);
    const int64_t L = int64_t(params.size());
    int64_t elements = 0, bytes = 0;
    std::vector<Span> tensors(L), spans;
    std::vector<int64_t> first(L + 1, 0);  // of a tensor's spans
    for (int64_t i = 0; i < L; ++i) {
        DLTensor t[4];
        for (int k = 0; k < (masters.size() ? 4 : 3); ++k) {
            const nb::list& column = k == 0 ? params : k == 1 ? anchors : k == 2 ? currents : masters;
            if (api.view(PyList_GetItem(column.ptr(), i), &t[k])) throw nb::python_error();
            if (t[k].dtype() < 0 || !t[k].contiguous()) return false;
        }
        const bool master = masters.size();
        tensors[i] = {t[0].address(),
                      t[1].address(),
                      t[2].address(),
                      master ? t[3].address() : nullptr,
                      t[0].dtype(),
                      t[1].dtype(),
                      t[2].dtype(),
                      master ? t[3].dtype() : 0,
                      float(reinterpret_cast<const double*>(alphas)[i]),
                      false,
                      0,
                      t[0].size()};
        elements += tensors[i].end, bytes += tensors[i].end * size_of(tensors[i].w_dtype);
    }
    for (int64_t i = 0; i < L; ++i) {
        Span s = tensors[i];
        s.stream = bytes >= kLarge && s.param != s.anchor && s.param != s.current;  // else its lines are in the caches
        for (s.end = 0; s.begin < tensors[i].end; s.begin = s.end) {
            s.end = std::min(s.begin + kSpan, tensors[i].end);
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
        on_threads(count, [&] { run(spans, next, stats ? sums.data() : nullptr); });
    }
    for (int64_t i = 0; stats && i < L; ++i)  // in order, whoever did the spans: the same bits each time
        for (int k = 0; k < 3; ++k) {
            double total = 0;
            for (int64_t j = first[i]; j < first[i + 1]; ++j) total += sums[3 * j + k];
            reinterpret_cast<float*>(stats)[3 * i + k] = float(total);
        }
    return true;
}

// Whether four equally long lists hold plain tensors (of one of `types`, masters all or none None), floating, all on
// one device and those of a row of one shape. False too where that cannot be told.
bool alike(nb::handle exchange, nb::tuple types, nb::list params, nb::list anchors, nb::list currents,
           nb::list masters) {
    const Exchange& api = Exchange::of(exchange);
    const size_t L = params.size();
    if (!L || anchors.size() != L || currents.size() != L || masters.size() != L) return false;
    const bool no_masters = nb::handle(PyList_GetItem(masters.ptr(), 0)).is_none();
    DLTensor first{};
    for (size_t i = 0; i < L; ++i) {
        DLTensor param{};
        for (const nb::list* column : {&params, &anchors, &currents, &masters}) {
            const nb::handle tensor = PyList_GetItem(column->ptr(), Py_ssize_t(i));
            if (column == &masters && no_masters) {
                if (!tensor.is_none()) return false;
                continue;
            }
            if (!tensor.type().is(types[0]) && !tensor.type().is(types[1])) return false;
            DLTensor t;
            if (api.view(tensor.ptr(), &t)) return PyErr_Clear(), false;
            if (column == &params) param = t, first = i ? first : t;
            if (!t.floating() || t.device_type != first.device_type || t.device_id != first.device_id ||
                t.ndim != param.ndim || !std::equal(t.shape, t.shape + t.ndim, param.shape))
                return false;
        }
    }
    return true;
}

}  // namespace

void bind_extrapolation(nb::module_& m) {
    m.def("extrapolate", &extrapolate);
    m.def("alike", &alike);
}
