// Compiles the file named by KERNEL, after vectors.h, once per x86-64 level, each in a namespace of its own; elsewhere
// once. supported(CLONES(f)) lists those of f that this machine runs, the best last.
//
// X86_LEVEL is the level a clone is compiled for: g++ reads the whole file before it acts on the target pragmas, so
// that __FMA__ and __AVX512F__ would tell of the baseline only.

#define X86_LEVEL 1
namespace baseline {
#include "vectors.h"
#include KERNEL
}  // namespace baseline
#undef X86_LEVEL

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define X86_LEVEL 3
namespace v3 {
#include "vectors.h"
#include KERNEL
}  // namespace v3
#undef X86_LEVEL
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define X86_LEVEL 4
namespace v4 {
#include "vectors.h"
#include KERNEL
}  // namespace v4
#undef X86_LEVEL
#pragma GCC pop_options

#define CLONES(f) {baseline::f, v3::f, v4::f}

template <class F>
std::vector<F*> supported(std::initializer_list<F*> clones) {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return {clones.begin(), clones.begin() + 1 + v3 + v4};
}
#else
#define CLONES(f) {baseline::f}

template <class F>
std::vector<F*> supported(std::initializer_list<F*> clones) {
    return clones;
}
#endif
