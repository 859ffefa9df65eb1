// Divergences between student and teacher over the vocabulary, on the CPU: value and gradient per row.
// The row kernel is in divergence_rows.h; here are its arguments, its instruction sets, its threads and its binding.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>

#include "cpu.h"
#include "threads.h"

namespace nb = nanobind;

namespace {

enum Kind { kReverse, kForward, kMixture };

constexpr int kBlock = 1024;  // logits per block: two sides and a gradient in fp32 are 12 KB of the L1 cache
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kFloor = -1e4 * kLog2e;              // FLOOR of effopd_kernels/divergence/reference.py, in bits
constexpr int64_t kWorkPerThread = int64_t(1) << 16;  // logits worth starting a thread for

// One side's logits. With a soft cap (pre != 0) the kernel reads tanh(pre·x) in their place; c takes either to base 2.
struct Side {
    const char* data;
    int64_t row_bytes, sequence_bytes;  // from one row to the next of a sequence, and from one sequence to the next
    int dtype;
    float pre, c;
};

struct Job {
    Side student, teacher;
    const uint8_t* mask;     // (N,) or null
    const float* row_scale;  // (N,) or null
    float *loss, *stats;     // (N,); (3, N) or null
    char* grad;              // (N, grad_columns) in the student's dtype, or null
    int64_t grad_row_bytes, grad_sequence_bytes, grad_columns, N, T, V, grain;  // N rows, T to a sequence
    Kind kind;
    float a, b, pi, rho, kappa;  // rho = 1 − pi, which fp32 keeps near pi = 1
    double chain;                // dz/dx of the student's logits at tanh = 0
    bool stream;                 // store past the caches
};

#define KERNEL "divergence_rows.h"
#include "clones.h"

const auto kRuns = supported(CLONES(run_rows));

Side make_side(uintptr_t data, int64_t row_stride, int64_t sequence_stride, int dtype, double temperature, double scale,
               double softcap) {
    const float pre = softcap != 0 ? float(scale / softcap) : 0.0f;
    const double c = (softcap != 0 ? softcap : scale) / temperature * kLog2e;
    const int64_t size = size_of(dtype);
    return {reinterpret_cast<const char*>(data), row_stride * size, sequence_stride * size, dtype, pre, float(c)};
}

// Addresses, sizes and strides in elements; 0 for a tensor that is absent. The schema in ops.py says what each means.
// instruction_set: an index below num_instruction_sets(), or −1 for the best.
void divergence_rows(uintptr_t student, int64_t student_stride, int64_t student_sequence, int student_dtype,
                     uintptr_t teacher, int64_t teacher_stride, int64_t teacher_sequence, int teacher_dtype, int64_t N,
                     int64_t T, int64_t V, uintptr_t mask, uintptr_t row_scale, double a, double b, double pi,
                     double student_temperature, double teacher_temperature, double student_scale, double teacher_scale,
                     double student_softcap, double teacher_softcap, uintptr_t grad, int64_t grad_stride,
                     int64_t grad_sequence, int64_t grad_columns, uintptr_t loss, uintptr_t stats, int threads,
                     int instruction_set) {
    const int64_t size = size_of(student_dtype);
    Job job{};
    job.student = make_side(student, student_stride, student_sequence, student_dtype, student_temperature,
                            student_scale, student_softcap);
    job.teacher = make_side(teacher, teacher_stride, teacher_sequence, teacher_dtype, teacher_temperature,
                            teacher_scale, teacher_softcap);
    job.mask = reinterpret_cast<const uint8_t*>(mask);
    job.row_scale = reinterpret_cast<const float*>(row_scale);
    job.loss = reinterpret_cast<float*>(loss);
    job.stats = reinterpret_cast<float*>(stats);
    job.grad = reinterpret_cast<char*>(grad);
    job.grad_row_bytes = grad_stride * size;
    job.grad_sequence_bytes = grad_sequence * size;
    job.grad_columns = grad_columns;
    job.N = N;
    job.T = T;
    job.V = V;
    job.grain = std::max<int64_t>(1, kWorkPerThread / 4 / V);
    job.kind = pi == 1 ? kReverse : pi == 0 ? kForward : kMixture;
    job.a = float(a);
    job.b = float(b);
    job.pi = float(pi);
    job.rho = float(1 - pi);
    job.kappa = float(a * (1 - pi) - b * pi);
    job.chain = student_scale / student_temperature;
    job.stream = grad && grad != student && N * grad_columns * size >= kLarge;

    const auto run = kRuns.at(instruction_set < 0 ? kRuns.size() - 1 : size_t(instruction_set));
    std::atomic<int64_t> next{0};
    const int64_t count = std::clamp<int64_t>(std::min<int64_t>(N, N * V / kWorkPerThread), 1, std::max(threads, 1));
    const int64_t scratch = job.kind == kMixture && grad ? (V + kBlock - 1) / kBlock * kBlock : 0;
    constexpr int64_t kLine = 64 / sizeof(float);
    const std::unique_ptr<float[]> memory(new float[count * scratch + kLine]);  // here: in a thread it must not fail
    void* start = memory.get();
    size_t space = (count * scratch + kLine) * sizeof(float);
    const auto aligned = static_cast<float*>(std::align(64, count * scratch * sizeof(float), start, space));
    std::atomic<int64_t> started{0};
    on_new_threads(count, [&] {
        const FlushToZero flush;  // where logits span 90 nats, exponentials are such; beside a sum of 2⁻¹¹ and more
        run(job, next, aligned + scratch * started++);
    });
}

}  // namespace

void bind_divergence(nb::module_& m) {
    m.def("divergence_rows", &divergence_rows, nb::call_guard<nb::gil_scoped_release>());
    m.def("num_instruction_sets", [] { return kRuns.size(); });
}
