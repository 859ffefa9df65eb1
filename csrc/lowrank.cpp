// A panel scale · (x − b) of a difference in fp32 or bf16 with its first-pass statistics, in one pass, on one thread: the
// callers' threads each make a panel that stays in their caches for the product it goes into.
#include <nanobind/nanobind.h>

#include <cmath>
#include <vector>

#include "cpu.h"

namespace nb = nanobind;

namespace {

constexpr int64_t kAhead = 2048;  // bytes of a matrix that are asked for before they are needed
constexpr int kBlock = 256;  // elements summed in fp32, 16 to a lane, before the sums go on in fp64

struct Panel {
    const char *x, *b;  // b null for zero
    char* out;          // or null
    int x_dtype, b_dtype, out_dtype;
    int64_t x_pitch, b_pitch, out_pitch;  // elements from one line to the next
    int64_t lines, length;
    float scale;
};

#define KERNEL "lowrank_panel.h"
#include "clones.h"

const auto kWriters = supported(CLONES(write_panel));

// statistics: 5 doubles in the order of effopd_kernels/lowrank/ops.py, or 0; those of the unscaled difference.
void difference_panel(uintptr_t x, int x_dtype, int64_t x_pitch, uintptr_t b, int b_dtype, int64_t b_pitch, uintptr_t out,
                      int out_dtype, int64_t out_pitch, int64_t lines, int64_t length, float scale, uintptr_t statistics,
                      bool full, int instruction_set) {
    const auto write = kWriters.at(instruction_set < 0 ? kWriters.size() - 1 : size_t(instruction_set));
    nb::gil_scoped_release release;
    write({reinterpret_cast<const char*>(x), reinterpret_cast<const char*>(b), reinterpret_cast<char*>(out), x_dtype, b_dtype, out_dtype,
           x_pitch, b_pitch, out_pitch, lines, length, scale},
          reinterpret_cast<double*>(statistics), full);
}

}  // namespace

void bind_lowrank(nb::module_& m) { m.def("difference_panel", &difference_panel); }
