// What the CPU kernels share that is compiled once for all instruction sets: dtypes, constants, streaming stores, and
// which products this processor is good at.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __SSE2__
#include <immintrin.h>
#endif

// Vectors wider than the baseline has are passed only between functions that are inlined: no ABI is at stake.
#pragma GCC diagnostic ignored "-Wpsabi"

#define INLINE static inline __attribute__((always_inline))

enum Dtype { kFloat32, kBFloat16, kFloat16 };  // the order of DTYPES in effopd_kernels/native.py
constexpr int kInt16 = 3;                      // of what kernels write for themselves

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kLarge = int64_t(8) << 20;  // bytes from which an output outgrows the caches

constexpr int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

// Whether products of bf16 pairs outrun those of fp32 without tiles: on Intel's processors, which have tiles for it, a dot
// product takes two cycles where two of fp32 take one (measured on Emerald Rapids).
inline bool multiplies_bf16() {
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && !__builtin_cpu_is("intel");
#else
    return true;  // for all that is known
#endif
}

// While it lives, results below 2⁻¹²⁶ are 0 on this thread: x86 computes each by far more slowly.
class FlushToZero {
   public:
#ifdef __SSE2__
    FlushToZero() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
    ~FlushToZero() { _mm_setcsr(before); }

   private:
    const unsigned before = _mm_getcsr();
#else
    FlushToZero() {}  // nothing is set elsewhere
#endif
};

// Streaming stores spare reading the output's lines before overwriting them; end_stream() makes them visible to others.
inline void copy_out(char* out, const void* from, int64_t bytes, bool stream) {
#ifdef __SSE2__
    if (stream && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
        const int64_t whole = bytes / 16 * 16;
        for (int64_t i = 0; i < whole; i += 16)
            _mm_stream_si128((__m128i*)(out + i), _mm_loadu_si128((const __m128i*)((const char*)from + i)));
        memcpy(out + whole, (const char*)from + whole, bytes - whole);
        return;
    }
#endif
    memmove(out, from, bytes);
}

inline void end_stream() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}
