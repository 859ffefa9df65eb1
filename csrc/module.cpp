// The one extension module. Each idea binds its own kernels: csrc/<idea>.cpp defines bind_<idea>. No libtorch here:
// kernels take addresses, sizes and a thread count, or read tensors by DLPack (tensors.h), so one build serves every
// torch version.
#include <nanobind/nanobind.h>

#include "cpu.h"

namespace nb = nanobind;

void bind_buffers(nb::module_& m);
void bind_divergence(nb::module_& m);
void bind_extrapolation(nb::module_& m);
void bind_lowrank(nb::module_& m);
void bind_transpose(nb::module_& m);

NB_MODULE(_C, m) {
    m.doc() = "CPU kernels of effopd_kernels";
    bind_buffers(m);
    bind_divergence(m);
    bind_extrapolation(m);
    bind_lowrank(m);
    bind_transpose(m);
    m.def("multiplies_bf16", &multiplies_bf16);
}
