#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_divergence(nb::module_ &) {}
