// Divergences between student and teacher over the vocabulary, on the CPU: value and gradient per row.
// The row kernels are in divergence_rows.h and divergence_topk.h; here are their arguments, instruction sets, threads and
// bindings.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu.h"
#include "threads.h"

namespace nb = nanobind;

namespace {

enum Kind { kReverse, kForward, kMixture, kToken };

constexpr int kBlock = 1024;  // logits per block: two sides and a gradient in fp32 are 12 KB of the L1 cache
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kFloor = -1e4 * kLog2e;              // FLOOR of effopd_kernels/divergence/reference.py, in bits
constexpr int64_t kWorkPerThread = int64_t(1) << 16;  // logits worth starting a thread for

// Logits or their gradient.
struct Rows {
    char* data;                         // null for a gradient that nobody wants
    int64_t row_bytes, sequence_bytes;  // from one row to the next of a sequence, and from one sequence to the next
    int dtype;

    char* row(int64_t n, int64_t T) const { return data + n / T * sequence_bytes + n % T * row_bytes; }
};

// One side's logits. With a soft cap (pre != 0) the kernel reads tanh(pre·x) in their place; c takes either to base 2.
struct Side : Rows {
    float pre, c;
};

struct Job {
    Side student, teacher;
    Rows grad;                        // (N, columns)
    int64_t N, T, V, columns, grain;  // N rows, T to a sequence
    const uint8_t* mask;              // (N,) or null
    const float* row_scale;           // (N,) or null
    float *loss, *stats;              // (N,); (3, N) or null
    Kind kind;
    float a, b, pi, rho, kappa;  // rho = 1 − pi, which fp32 keeps near pi = 1
    double chain;                // dz/dx of the student's logits at tanh = 0
    bool stream;                 // store past the caches
};

// Of a row of V logits, of which the first may be short.
int64_t blocks_of(int64_t V) { return V / kBlock + 2; }

struct TopkJob {
    Side logits;
    const int64_t* ids;  // (N, k)
    int64_t k;
    bool tail;
    float* buckets;  // (N, k + tail), and then their gradients
    Job job;         // of the buckets (N, k + tail) against the teacher's; its grad are the buckets. kToken: not the
                     // divergence, but the log-probability of the one entry
    Rows grad;       // (N, V)
    int64_t T, V;
    double chain;  // dz/dx of the logits at tanh = 0
    bool stream;   // store past the caches
};

#define KERNEL "divergence_kernels.h"
#include "clones.h"

const auto kRuns = supported(CLONES(run_rows));
const auto kTopkRuns = supported(CLONES(run_topk_rows));

// Address, strides in elements from row to row and from sequence to sequence, and dtype.
using Place = std::tuple<uintptr_t, int64_t, int64_t, int>;

Rows rows_at(const Place& place) {
    const auto [data, row_stride, sequence_stride, dtype] = place;
    const int64_t size = size_of(dtype);
    return {reinterpret_cast<char*>(data), row_stride * size, sequence_stride * size, dtype};
}

Side side_of(const Rows& rows, double temperature, double scale, double softcap) {
    const float pre = softcap != 0 ? float(scale / softcap) : 0.0f;
    return {rows, pre, float((softcap != 0 ? softcap : scale) / temperature * kLog2e)};
}

void set_divergence(Job& job, double a, double b, double pi, uintptr_t mask, uintptr_t row_scale, uintptr_t loss,
                    uintptr_t stats) {
    job.kind = pi == 1 ? kReverse : pi == 0 ? kForward : kMixture;
    job.a = float(a);
    job.b = float(b);
    job.pi = float(pi);
    job.rho = float(1 - pi);
    job.kappa = float(a * (1 - pi) - b * pi);
    job.mask = reinterpret_cast<const uint8_t*>(mask);
    job.row_scale = reinterpret_cast<const float*>(row_scale);
    job.loss = reinterpret_cast<float*>(loss);
    job.stats = reinterpret_cast<float*>(stats);
}

template <class F>
F* chosen(const std::vector<F*>& clones, int instruction_set) {
    return clones.at(instruction_set < 0 ? clones.size() - 1 : size_t(instruction_set));
}

// run(next, scratch, lists) on threads that draw rows of V logits from `next`, each with memory of its own: `scratch`
// floats, from a whole cache line on, and `lists` int32.
template <class Run>
void on_rows(int64_t N, int64_t V, int threads, int64_t scratch, int64_t lists, Run run) {
    std::atomic<int64_t> next{0}, started{0};
    const int64_t count = std::clamp<int64_t>(std::min<int64_t>(N, N * V / kWorkPerThread), 1, std::max(threads, 1));
    constexpr int64_t kLine = 64 / sizeof(float);
    const std::unique_ptr<float[]> memory(new float[count * scratch + kLine]);  // here: in a thread it must not fail
    const std::unique_ptr<int32_t[]> integers(new int32_t[count * lists]);
    void* start = memory.get();
    size_t space = (count * scratch + kLine) * sizeof(float);
    const auto aligned = static_cast<float*>(std::align(64, count * scratch * sizeof(float), start, space));
    on_threads(count, [&] {
        const FlushToZero flush;  // where logits span 90 nats, exponentials are such; beside a sum of 2⁻¹¹ and more
        const int64_t own = started++;
        if (own >= count) return;  // of OpenMP's threads there may be more
        run(next, aligned + scratch * own, integers.get() + lists * own);
    });
}

// What a mixture keeps of a row in between.
int64_t mixture_scratch(const Job& job, int64_t V) {
    return job.kind == kMixture && job.grad.data ? (V + kBlock - 1) / kBlock * kBlock : 0;
}

int64_t grain_of(int64_t V) { return std::max<int64_t>(1, kWorkPerThread / 4 / V); }

// Whether a gradient outgrows the caches, and does not overwrite logits that are in them.
bool streams(const Rows& grad, const Rows& logits, int64_t elements) {
    return grad.data && grad.data != logits.data && elements * size_of(grad.dtype) >= kLarge;
}

// Addresses are 0 where a tensor is absent; of the student's `columns` both sides have V. spec: the numbers of Spec in
// effopd_kernels/divergence/family.py, below TopKSpec's. instruction_set: an index below num_instruction_sets(), or −1
// for the best.
void divergence_rows(Place student, Place teacher, Place grad, int64_t N, int64_t T, int64_t V, int64_t columns,
                     uintptr_t mask, uintptr_t row_scale, std::array<double, 9> spec, uintptr_t loss, uintptr_t stats,
                     int threads, int instruction_set) {
    const auto [a, b, pi, student_temperature, teacher_temperature, student_scale, teacher_scale, student_softcap,
                teacher_softcap] = spec;
    Job job{};
    job.student = side_of(rows_at(student), student_temperature, student_scale, student_softcap);
    job.teacher = side_of(rows_at(teacher), teacher_temperature, teacher_scale, teacher_softcap);
    job.grad = rows_at(grad);
    set_divergence(job, a, b, pi, mask, row_scale, loss, stats);
    job.N = N;
    job.T = T;
    job.V = V;
    job.columns = columns;
    job.grain = grain_of(V);
    job.chain = student_scale / student_temperature;
    job.stream = streams(job.grad, job.student, N * columns);
    const auto run = chosen(kRuns, instruction_set);
    on_rows(N, V, threads, mixture_scratch(job, V), 0,
            [&](std::atomic<int64_t>& next, float* scratch, int32_t*) { run(job, next, scratch); });
}

// As divergence_rows, of logits (N, V) whose teacher (N, k + tail) knows the entries `ids` (N, k), int64, negative for
// none, and with a tail the rest as one. Without a teacher: log-probabilities of ids (N, 1), with a tail. buckets, fp32
// and of the teacher's shape, is for the kernel to write to.
void topk_rows(Place logits, Place grad, int64_t N, int64_t T, int64_t V, uintptr_t ids, int64_t k, uintptr_t teacher,
               uintptr_t buckets, uintptr_t mask, uintptr_t row_scale,
               std::tuple<double, double, double, bool, double, double, double> spec, uintptr_t loss, uintptr_t stats,
               int threads, int instruction_set) {
    const auto [a, b, pi, tail, temperature, scale, softcap] = spec;
    const int64_t columns = k + tail;
    TopkJob topk{};
    for (int64_t i = 0; i < N * k; ++i)  // under torch.compile nobody has looked
        if (const int64_t id = reinterpret_cast<const int64_t*>(ids)[i]; id >= V)
            throw std::out_of_range("ids must be token ids below " + std::to_string(V) + ", got " + std::to_string(id));
    topk.logits = side_of(rows_at(logits), temperature, scale, softcap);
    topk.ids = reinterpret_cast<const int64_t*>(ids);
    topk.k = k;
    topk.tail = tail;
    topk.buckets = reinterpret_cast<float*>(buckets);
    topk.grad = rows_at(grad);
    topk.T = T;
    topk.V = V;
    topk.chain = scale / temperature;
    topk.stream = streams(topk.grad, topk.logits, N * V);
    Job& job = topk.job;
    job.student = side_of(rows_at({buckets, columns, 0, kFloat32}), 1, 1, 0);
    job.teacher = side_of(rows_at({teacher, columns, 0, kFloat32}), 1, 1, 0);
    job.grad = rows_at({topk.grad.data ? buckets : 0, columns, 0, kFloat32});
    set_divergence(job, a, b, pi, mask, row_scale, loss, stats);
    if (!teacher) job.kind = kToken;
    job.N = job.T = N;
    job.V = job.columns = columns;
    job.grain = grain_of(V);
    job.chain = 1;
    const auto run = chosen(kTopkRuns, instruction_set);
    on_rows(N, V, threads, mixture_scratch(job, columns), blocks_of(V) + k,
            [&](std::atomic<int64_t>& next, float* scratch, int32_t* lists) { run(topk, next, scratch, lists); });
}

// An id that stands more than once in its row of ids (N, k), −1 where none does; of ids from 0 to V − 1, or negative for
// none.
int64_t repeated_id(uintptr_t address, int64_t N, int64_t k, int64_t V) {
    const auto ids = reinterpret_cast<const int64_t*>(address);
    thread_local std::vector<int64_t> last;  // row that met an id, counted over all calls: nothing to clear
    thread_local int64_t row = 0;
    if (int64_t(last.size()) < V) last.resize(V, 0);
    for (int64_t n = 0; n < N; ++n) {
        ++row;
        for (int64_t j = 0; j < k; ++j) {
            const int64_t id = ids[n * k + j];
            if (id >= 0 && std::exchange(last[id], row) == row) return id;
        }
    }
    return -1;
}

}  // namespace

void bind_divergence(nb::module_& m) {
    m.def("divergence_rows", &divergence_rows, nb::call_guard<nb::gil_scoped_release>());
    m.def("topk_rows", &topk_rows, nb::call_guard<nb::gil_scoped_release>());
    m.def("repeated_id", &repeated_id, nb::call_guard<nb::gil_scoped_release>());
    m.def("num_instruction_sets", [] { return kRuns.size(); });
}
