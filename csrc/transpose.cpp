// Transposition, rows any distance apart: it stands between the products with a head, which are fastest where each
// entry of the vocabulary is a row, and the row kernels, which read each token's logits side by side.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "cpu.h"
#include "threads.h"

namespace nb = nanobind;

namespace {

constexpr int kRegister = 16;                         // bytes; some machines have no wider
constexpr int64_t kColumns = 32, kStrip = 256;        // at a time: columns, and bytes of an output row
constexpr int64_t kWorkPerThread = int64_t(1) << 19;  // bytes worth starting a thread for

template <class T>
struct Square {  // L rows of L elements, in registers
    static constexpr int L = kRegister / sizeof(T);
    typedef T Vector __attribute__((vector_size(kRegister)));
    typedef T AnyVector __attribute__((vector_size(kRegister), aligned(sizeof(T)), may_alias));

    template <int from, size_t... J>
    INLINE Vector zip(Vector a, Vector b, std::index_sequence<J...>) {
        return Vector{(J % 2 ? b : a)[from + J / 2]...};
    }

    // Zipping the first half of the rows with the second rotates the bits of (row, column) by one place: after log2 L
    // times the two have changed places.
    INLINE void transpose(Vector (&x)[L]) {
        for (int bit = 1; bit < L; bit *= 2) {
            Vector y[L];
            for (int i = 0; i < L / 2; ++i) {
                y[2 * i] = zip<0>(x[i], x[i + L / 2], std::make_index_sequence<L>());
                y[2 * i + 1] = zip<L / 2>(x[i], x[i + L / 2], std::make_index_sequence<L>());
            }
            for (int i = 0; i < L; ++i) x[i] = y[i];
        }
    }

    INLINE void move(const T* in, int64_t in_row, T* out, int64_t out_row) {
        Vector x[L];
        for (int i = 0; i < L; ++i) x[i] = *(const AnyVector*)(in + i * in_row);
        transpose(x);
        for (int i = 0; i < L; ++i) *(AnyVector*)(out + i * out_row) = x[i];
    }
};

// Columns drawn from `next`, a few at a time so that each output row is written from end to end; down them in strips, of
// which an output row takes whole cache lines.
template <class T>
void columns_of(const T* in, int64_t in_row, T* out, int64_t out_row, int64_t rows, int64_t columns,
                std::atomic<int64_t>& next) {
    constexpr int64_t L = Square<T>::L, strip = kStrip / sizeof(T);
    for (int64_t begin; (begin = next.fetch_add(kColumns)) < columns;) {
        const int64_t end = std::min(begin + kColumns, columns), whole = rows / L * L;
        for (int64_t top = 0; top < rows; top += strip) {
            const int64_t bottom = std::min(top + strip, rows);
            int64_t j = begin;
            for (; j + L <= end; j += L)
                for (int64_t i = top; i < std::min(bottom, whole); i += L)
                    Square<T>::move(in + i * in_row + j, in_row, out + j * out_row + i, out_row);
            for (int64_t i = j < end ? top : std::max(top, whole); i < bottom; ++i)
                for (int64_t k = i < whole ? j : begin; k < end; ++k) out[k * out_row + i] = in[i * in_row + k];
        }
    }
}

template <class T>
void run(uintptr_t in, int64_t in_row, uintptr_t out, int64_t out_row, int64_t rows, int64_t columns, int threads) {
    const int64_t bytes = rows * columns * int64_t(sizeof(T));
    const int64_t count = std::clamp<int64_t>(bytes / kWorkPerThread, 1, std::max(threads, 1));
    std::atomic<int64_t> next{0};
    on_threads(count, [&] {
        columns_of(reinterpret_cast<const T*>(in), in_row, reinterpret_cast<T*>(out), out_row, rows, columns, next);
    });
}

// out (columns, rows) = in (rows, columns)ᵀ; distances of rows in elements, of `size` bytes.
void transpose(uintptr_t in, int64_t in_row, uintptr_t out, int64_t out_row, int64_t rows, int64_t columns, int size,
               int threads) {
    const auto as = size == 2 ? run<uint16_t> : size == 4 ? run<uint32_t> : run<uint64_t>;
    as(in, in_row, out, out_row, rows, columns, threads);
}

}  // namespace

void bind_transpose(nb::module_& m) { m.def("transpose", &transpose, nb::call_guard<nb::gil_scoped_release>()); }
