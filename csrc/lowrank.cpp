// Panels scale · (x − b) of a difference with their first-pass statistics, the products taken with them, and those of
// the bases that come of it: each on one thread, the callers' working side by side.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu.h"

namespace nb = nanobind;

namespace {

constexpr int64_t kPage = 4096;   // bytes: where one ends the processor's own prefetching stops
constexpr int64_t kAhead = 2048;  // bytes of a matrix that are asked for before they are needed
constexpr int kAtOnce = 4;        // vectors whose sums are under way
// The largest integer that X and q are written as: the squares of 256 of them sum up to less than 2^31.
constexpr float kMostWhole = 2895;

// What writing a difference in 16 bits takes off, where that is anything.
struct Rests {
    struct Entry {
        int64_t line, place;
        float value;
    };
    std::vector<Entry> held;
    size_t most;  // one more is kept at the most
};

struct Panel {
    const char *x, *b;  // b null for zero
    char* out;          // or null
    int x_dtype, b_dtype, out_dtype;
    int64_t x_pitch, b_pitch, out_pitch;  // elements from one line to the next
    int64_t lines, length;
    float scale;
    Rests* rests = nullptr;  // wanted of an `out` of 16 bits

    // Rows start … start + rows of X, which are columns of the lines if by_column.
    Panel part(bool by_column, int64_t start, int64_t rows) const {
        Panel block = *this;
        (by_column ? block.length : block.lines) = rows;
        block.x += (by_column ? start : start * x_pitch) * size_of(x_dtype);
        if (b) block.b += (by_column ? start : start * b_pitch) * size_of(b_dtype);
        return block;
    }
};

// As Python names a pair: addresses (b's 0 for zero), dtypes and pitches.
Panel panel_of(uintptr_t x, int x_dtype, int64_t x_pitch, uintptr_t b, int b_dtype, int64_t b_pitch, int64_t lines,
               int64_t length, float scale = 1) {
    return {reinterpret_cast<const char*>(x),
            reinterpret_cast<const char*>(b),
            nullptr,
            x_dtype,
            b_dtype,
            0,
            x_pitch,
            b_pitch,
            0,
            lines,
            length,
            scale};
}

// Y = X q and Z += XᵀY over the panel's rows.
struct Products {
    Panel x;
    bool by_column;         // rows of X are columns of the panel's lines
    const float* q;         // (M, L)
    const int32_t* places;  // or, of a q of `signs` ±1 in each row, their columns: column << 1 | negative
    int signs;
    int64_t columns;  // L
    float *y, *z;     // (rows, L); (M rounded up to even, L rounded up to 16). Either may be null: not wanted
    double* statistics;
    bool full;
};

#define KERNEL "lowrank_kernels.h"
#include "clones.h"

const auto kWriters = supported(CLONES(write_panel));
const auto kLineSquares = supported(CLONES(line_squares));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 10
#define HAS_BF16
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#define X86_LEVEL 5
namespace bf16 {
#include "vectors.h"
#include KERNEL
}  // namespace bf16
#undef X86_LEVEL
#pragma GCC pop_options
#endif

// Whether the processor has tiles, and Linux lets this process use them, which it wants to be asked.
bool has_tiles() {
#if defined(EMULATE_TILES)
    return true;
#elif defined(__linux__) && defined(HAS_BF16) && defined(ASSEMBLES_AMX)
    static const bool granted = [] {
        constexpr unsigned kTiles = 1u << 24 | 1u << 22;  // AMX-TILE and AMX-BF16
        constexpr int kRequestPermission = 0x1023, kTileData = 18;
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTiles) == kTiles &&
               syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return granted;
#else
    return false;
#endif
}

// What multiplies. half: operands may be rounded, and are `rounded` to bf16 or to integers of 16 bits, if that is not
// empty; then z is wanted, y is not to be had, and q may be given as places.
struct Multiplier {
    const char* rounded;
    void (*products)(const Products&, bool half);
    void (*gram_of_columns)(const float* y, int64_t pitch, int64_t n, int64_t columns, double* g);
    void (*times)(const float* y, int64_t pitch, int64_t n, int64_t columns, const double* w, int64_t k, float* out);
    double (*orthonormal)(const float* y, int64_t pitch, int64_t n, int64_t columns, float* out);
    bool (*gram)(const Panel& x, bool by_column, float* g, double* statistics, double* base_squares);
    void (*lanczos_step)(const float* g, int64_t m, float scale, const float* v, int64_t k, float* q, int64_t t,
                         float* diagonal, float* off);
};

// Those that this machine runs, the best last. Asked for, not made at import: tiles change what Linux saves of a thread.
std::vector<Multiplier> find_multipliers() {
    std::vector<Multiplier> found;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (kWriters.size() > 1)
        found.push_back(
            {"int16", v3::products, v3::gram_of_columns, v3::times, v3::orthonormal, v3::gram, v3::lanczos_step});
    if (kWriters.size() > 2) {
        found.push_back(
            {"", v4::products, v4::gram_of_columns, v4::times, v4::orthonormal, v4::gram, v4::lanczos_step});
        if (__builtin_cpu_supports("avx512vnni")) {
            Multiplier& best = found.back();
            best.rounded = "int16", best.products = v4::products_by_vnni, best.gram = v4::gram_by_vnni;
        }
    }
#ifdef HAS_BF16
    if (found.size() == 2 && __builtin_cpu_supports("avx512bf16")) {
        found.insert(found.end() - !multiplies_bf16(), {"bf16", bf16::products, bf16::gram_of_columns, bf16::times,
                                                        bf16::orthonormal, bf16::gram, bf16::lanczos_step});
#ifdef ASSEMBLES_AMX
        if (has_tiles())
            found.push_back({"bf16", bf16::products_by_tiles, bf16::gram_of_columns, bf16::times, bf16::orthonormal,
                             bf16::gram_in_tiles, bf16::lanczos_step});
#endif
    }
#endif
#endif
    return found;
}

const std::vector<Multiplier>& multipliers() {
    static const std::vector<Multiplier> found = find_multipliers();
    return found;
}

const Multiplier& multiplier(int instruction_set = -1) {
    return multipliers().at(instruction_set < 0 ? multipliers().size() - 1 : size_t(instruction_set));
}

// statistics: 5 doubles in the order of effopd_kernels/lowrank/statistics.py, or 0; those of the unscaled difference.
void difference_panel(uintptr_t x, int x_dtype, int64_t x_pitch, uintptr_t b, int b_dtype, int64_t b_pitch,
                      uintptr_t out, int out_dtype, int64_t out_pitch, int64_t lines, int64_t length, float scale,
                      uintptr_t statistics, bool full, int instruction_set) {
    const auto write = kWriters.at(instruction_set < 0 ? kWriters.size() - 1 : size_t(instruction_set));
    nb::gil_scoped_release release;
    Panel panel = panel_of(x, x_dtype, x_pitch, b, b_dtype, b_pitch, lines, length, scale);
    panel.out = reinterpret_cast<char*>(out), panel.out_dtype = out_dtype, panel.out_pitch = out_pitch;
    write(panel, reinterpret_cast<double*>(statistics), full);
}

// out (lines, 3) fp64 = (Σ(x − b)², Σx², Σb²) of every line.
void line_squares(uintptr_t x, int x_dtype, int64_t x_pitch, uintptr_t b, int b_dtype, int64_t b_pitch, int64_t lines,
                  int64_t length, uintptr_t out, int instruction_set) {
    const auto sum = kLineSquares.at(instruction_set < 0 ? kLineSquares.size() - 1 : size_t(instruction_set));
    nb::gil_scoped_release release;
    sum(panel_of(x, x_dtype, x_pitch, b, b_dtype, b_pitch, lines, length), reinterpret_cast<double*>(out));
}

// half: as Multiplier has it. places, y, z, b and statistics may be 0. instruction_set: an index below
// num_multipliers(), or −1 for the best.
void difference_products(uintptr_t x, int x_dtype, int64_t x_pitch, uintptr_t b, int b_dtype, int64_t b_pitch,
                         int64_t lines, int64_t length, float scale, bool by_column, uintptr_t q, int64_t columns,
                         uintptr_t places, uintptr_t y, uintptr_t z, uintptr_t statistics, int signs, bool full,
                         bool half, int instruction_set) {
    const Multiplier& best = multiplier(instruction_set);
    nb::gil_scoped_release release;
    best.products(
        {panel_of(x, x_dtype, x_pitch, b, b_dtype, b_pitch, lines, length, scale), by_column,
         reinterpret_cast<const float*>(q), reinterpret_cast<const int32_t*>(places), signs, columns,
         reinterpret_cast<float*>(y), reinterpret_cast<float*>(z), reinterpret_cast<double*>(statistics), full},
        half);
}

// Whether it was taken: not without a Gram, nor where that would round too much. Then g (M, M) fp32 = XᵀX. statistics, in
// full, and Σb², a double, or 0 for both.
bool difference_gram(uintptr_t x, int x_dtype, int64_t x_pitch, uintptr_t b, int b_dtype, int64_t b_pitch,
                     int64_t lines, int64_t length, bool by_column, uintptr_t g, uintptr_t statistics,
                     uintptr_t base_squares, int instruction_set) {
    const auto gram = multiplier(instruction_set).gram;
    nb::gil_scoped_release release;
    return gram(panel_of(x, x_dtype, x_pitch, b, b_dtype, b_pitch, lines, length), by_column,
                reinterpret_cast<float*>(g), reinterpret_cast<double*>(statistics),
                reinterpret_cast<double*>(base_squares));
}

// y (N, L) fp32 with rows `pitch` apart → YᵀY (L, L) fp64.
void gram_of_columns(uintptr_t y, int64_t pitch, int64_t n, int64_t columns, uintptr_t g) {
    nb::gil_scoped_release release;
    multiplier().gram_of_columns(reinterpret_cast<const float*>(y), pitch, n, columns, reinterpret_cast<double*>(g));
}

// y as above, w (L, K) fp64 → Y W (N, K) fp32.
void times(uintptr_t y, int64_t pitch, int64_t n, int64_t columns, uintptr_t w, int64_t k, uintptr_t out) {
    nb::gil_scoped_release release;
    multiplier().times(reinterpret_cast<const float*>(y), pitch, n, columns, reinterpret_cast<const double*>(w), k,
                       reinterpret_cast<float*>(out));
}

// y as above → its columns (N, L) after a round of CholeskyQR, and ‖R⁻¹‖_F; infinite, and nothing, where that fails.
double orthonormal(uintptr_t y, int64_t pitch, int64_t n, int64_t columns, uintptr_t out) {
    nb::gil_scoped_release release;
    return multiplier().orthonormal(reinterpret_cast<const float*>(y), pitch, n, columns,
                                    reinterpret_cast<float*>(out));
}

// Where something multiplies. g (M, M) fp32, v (M, K), q (more than t + 1, M, 16), diagonal and off (more than t, 16),
// all contiguous; M, K even.
void lanczos_step(uintptr_t g, int64_t m, float scale, uintptr_t v, int64_t k, uintptr_t q, int64_t t,
                  uintptr_t diagonal, uintptr_t off, int instruction_set) {
    nb::gil_scoped_release release;
    multiplier(instruction_set)
        .lanczos_step(reinterpret_cast<const float*>(g), m, scale, reinterpret_cast<const float*>(v), k,
                      reinterpret_cast<float*>(q), t, reinterpret_cast<float*>(diagonal),
                      reinterpret_cast<float*>(off));
}

}  // namespace

void bind_lowrank(nb::module_& m) {
    m.def("difference_panel", &difference_panel);
    m.def("line_squares", &line_squares);
    m.def("num_multipliers", [] { return multipliers().size(); });
    m.def("rounded", [](int instruction_set) { return multiplier(instruction_set).rounded; });
    m.def("has_tiles", &has_tiles);
    m.attr("MOST_WHOLE") = kMostWhole;
    m.def("difference_products", &difference_products);
    m.def("difference_gram", &difference_gram);
    m.def("gram_of_columns", &gram_of_columns);
    m.def("times", &times);
    m.def("orthonormal", &orthonormal);
    m.def("lanczos_step", &lanczos_step);
}
