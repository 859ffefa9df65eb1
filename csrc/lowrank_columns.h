// fp64 products of tall fp32 matrices with few columns: the Gram matrix YᵀY, one triangle of it computed, and Y W
// rounded once. Rows are widened a block at a time and stay in cache. Included after vectors.h, where
// lowrank_products.h is.

constexpr int kWide = kLanes / 2;              // lanes of a vector of doubles
constexpr int kTall = X86_LEVEL >= 4 ? 8 : 4;  // rows of a tile; three vectors of their sums take most registers
constexpr int64_t kBlockRows = 64;             // of a tall matrix, widened to fp64

typedef double vd __attribute__((vector_size(8 * kWide)));
typedef double vd_any __attribute__((vector_size(8 * kWide), aligned(8), may_alias));
typedef float vf_half __attribute__((vector_size(4 * kWide), aligned(4), may_alias));

// R rows and C vectors of columns of A B; term k of A's row i at left[i · row + k · step]; store(i, c, sum).
template <int R, int C, class Store>
INLINE void wide_tile(const double* left, int64_t row, int64_t step, const double* right, int64_t pitch, int64_t terms,
                      const Store& store) {
    vd sums[R][C] = {};
    for (int64_t k = 0; k < terms; ++k, left += step, right += pitch) {
        vd columns[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) columns[c] = *(const vd_any*)(right + c * kWide);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[i][c] += (left[i * row] - vd{}) * columns[c];
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) store(i, c, sums[i][c]);
}

// store(i, column, sum of kWide columns) for the first `rows` rows (a multiple of kTall) and `width` columns.
template <class Store>
static void wide_product(const double* left, int64_t row, int64_t step, int64_t rows, const double* right,
                         int64_t pitch, int64_t from, int64_t width, int64_t terms, const Store& store) {
    for (int64_t i = 0; i < rows; i += kTall) {
        int64_t j = from;
        const double* const a = left + i * row;
        const auto put = [&](int r, int c, vd sum) { store(i + r, j + c * kWide, sum); };
        for (; j + 3 * kWide <= width; j += 3 * kWide) wide_tile<kTall, 3>(a, row, step, right + j, pitch, terms, put);
        for (; j < width; j += kWide) wide_tile<kTall, 1>(a, row, step, right + j, pitch, terms, put);
    }
}

// Rows of y as doubles, `pitch` apart, with zeros to the next multiple of kWide.
static void widen(const float* y, int64_t y_pitch, int64_t rows, int64_t columns, double* out, int64_t pitch) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; c += kWide) {
            const float* const at = y + i * y_pitch + c;
            float rest[kWide] = {};
            if (columns - c < kWide) memcpy(rest, at, (columns - c) * 4);
            *(vd_any*)(out + i * pitch + c) =
                __builtin_convertvector(*(const vf_half*)(columns - c < kWide ? rest : at), vd);
        }
}

static int64_t padded(int64_t columns) { return (columns + kWide - 1) / kWide * kWide; }
// At least so many doubles, in an odd number of cache lines: rows so far apart fall into all sets of a cache.
static int64_t odd_lines(int64_t columns) { return (columns + 7) / 8 * 8 | 8; }

// g (L, L) fp64.
static void gram_of_columns(const float* y, int64_t y_pitch, int64_t n, int64_t columns, double* g) {
    const int64_t width = padded(columns), pitch = odd_lines(columns);
    double* const block = (double*)scratch(2 * (kBlockRows * pitch + width * width));
    double* const sums = block + kBlockRows * pitch;
    memset(sums, 0, width * width * 8);
    for (int64_t start = 0; start < n; start += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, n - start);
        widen(y + start * y_pitch, y_pitch, rows, columns, block, pitch);
        for (int64_t i = 0; i < width; i += kTall)  // the upper triangle
            wide_product(block + i, 1, pitch, kTall, block, pitch, i, width, rows,
                         [&](int64_t r, int64_t c, vd sum) { *(vd_any*)(sums + (i + r) * width + c) += sum; });
    }
    for (int64_t i = 0; i < columns; ++i)
        for (int64_t j = i; j < columns; ++j) g[i * columns + j] = g[j * columns + i] = sums[i * width + j];
}

// out (N, K) fp32 = y (N, L) w (L, K) fp64.
static void times(const float* y, int64_t y_pitch, int64_t n, int64_t columns, const double* w, int64_t k, float* out) {
    const int64_t pitch = odd_lines(columns), width = padded(k);
    double* const block = (double*)scratch(2 * (kBlockRows * pitch + columns * width));
    double* const right = block + kBlockRows * pitch;
    for (int64_t i = 0; i < columns; ++i) {
        memcpy(right + i * width, w + i * k, k * 8);
        memset(right + i * width + k, 0, (width - k) * 8);
    }
    for (int64_t start = 0; start < n; start += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, n - start);
        widen(y + start * y_pitch, y_pitch, rows, columns, block, pitch);
        wide_product(block, pitch, 1, (rows + kTall - 1) / kTall * kTall, right, width, 0, width, columns,
                     [&](int64_t i, int64_t c, vd sum) {
                         if (i >= rows) return;
                         const vf_half narrow = __builtin_convertvector(sum, vf_half);
                         memcpy(out + (start + i) * k + c, &narrow, std::min<int64_t>(kWide, k - c) * 4);
                     });
    }
}

// A round of CholeskyQR: out (N, L) = Y D R⁻¹ for RᵀR = D YᵀY D, D such that its diagonal is 1. Returns ‖R⁻¹‖_F, infinite
// where there is no R, and then nothing of out is written.
static double orthonormal(const float* y, int64_t y_pitch, int64_t n, int64_t columns, float* out) {
    const int64_t size = columns;
    std::vector<double> held(size * size + size), inverse(size * size);
    double *const r = held.data(), *const d = r + size * size, *const w = inverse.data();
    gram_of_columns(y, y_pitch, n, size, r);
    for (int64_t i = 0; i < size; ++i) d[i] = 1 / std::sqrt(r[i * size + i]);
    for (int64_t i = 0; i < size; ++i)
        for (int64_t j = i; j < size; ++j) r[i * size + j] *= d[i] * d[j];
    for (int64_t k = 0; k < size; ++k) {
        const double pivot = r[k * size + k];
        if (!(pivot > 0)) return kInf;
        const double unit = 1 / std::sqrt(pivot);
        for (int64_t j = k; j < size; ++j) r[k * size + j] *= unit;
        for (int64_t i = k + 1; i < size; ++i) {
            const double factor = r[k * size + i];
            for (int64_t j = i; j < size; ++j) r[i * size + j] -= factor * r[k * size + j];
        }
    }
    double squares = 0;
    for (int64_t i = size - 1; i >= 0; --i) {  // R⁻¹ from below: its row i is that of 1 − R R⁻¹ beyond i, over r_ii
        const double unit = 1 / r[i * size + i];
        w[i * size + i] = 1;
        for (int64_t k = i + 1; k < size; ++k) {
            const double factor = r[i * size + k];
            for (int64_t j = k; j < size; ++j) w[i * size + j] -= factor * w[k * size + j];
        }
        for (int64_t j = i; j < size; ++j) w[i * size + j] *= unit, squares += w[i * size + j] * w[i * size + j];
    }
    if (!(squares < kInf)) return kInf;
    for (int64_t i = 0; i < size; ++i)
        for (int64_t j = i; j < size; ++j) w[i * size + j] *= d[i];
    times(y, y_pitch, n, size, w, size, out);
    return std::sqrt(squares);
}
