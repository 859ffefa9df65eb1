// torch.Tensors without libtorch: DLPack's C exchange API, which torch offers as an attribute of the class, tells
// address, dtype, device, shape and strides in one call of some 20 ns, where each attribute asked from Python takes 60
// to 100.
#pragma once

#include <nanobind/nanobind.h>

#include "cpu.h"

namespace nb = nanobind;

// The parts of dlpack.h that are needed; their layout is that of all versions 1.x.
struct DLTensor {
    void* data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;

    int64_t size() const {
        int64_t n = 1;
        for (int d = 0; d < ndim; ++d) n *= shape[d];
        return n;
    }
    bool contiguous() const {
        int64_t n = 1;
        for (int d = ndim - 1; d >= 0; --d) {
            if (shape[d] != 1 && strides && strides[d] != n && size()) return false;
            n *= shape[d];
        }
        return true;
    }
    bool floating() const { return (code == 2 || code == 4) && lanes == 1; }  // kDLFloat, kDLBfloat
    int dtype() const {                                                       // a Dtype, or -1
        return !floating() ? -1 : bits == 16 ? (code == 4 ? kBFloat16 : kFloat16) : bits == 32 ? kFloat32 : -1;
    }
    char* address() const { return static_cast<char*>(data) + byte_offset; }
};

struct Exchange {
    uint32_t major, minor;
    void *previous, *allocate, *export_owned, *import_owned;
    int (*view)(void* tensor, DLTensor* out);  // borrowed; 0, or −1 with a Python error set
    void* stream;

    static const Exchange& of(nb::handle capsule) {
        auto api = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
        if (!api) throw nb::python_error();
        if (api->major != 1 || !api->view) throw nb::type_error("this torch has another DLPack exchange API");
        return *api;
    }
};
