// Work on several threads: on those of the OpenMP runtime that torch has loaded, where there is one. After a product
// they wait for the next by spinning, for milliseconds, and would take turns with threads started beside them.
#pragma once

#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#if defined(__linux__) && defined(__GNUC__)
// Of libgomp, and for its sake of LLVM's and Intel's runtimes; null unless loaded for all to see, as torch does.
extern "C" __attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned threads, unsigned flags);
#else
constexpr void (*GOMP_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
#endif

// work() here and on count − 1 new threads, or as many as can be started: they share it out among themselves.
template <class Work>
void on_new_threads(int64_t count, Work work) {
    std::vector<std::thread> helpers;
    helpers.reserve(size_t(count));
    try {
        while (int64_t(helpers.size()) < count - 1) helpers.emplace_back([&] { work(); });
    } catch (const std::exception&) {  // a limit on memory or processes
    }
    work();
    for (auto& helper : helpers) helper.join();
}

// work() on about `count` threads at once, which share it out among themselves.
template <class Work>
void on_threads(int64_t count, Work work) {
    // 0: as many as torch has set, since libgomp ends those that a smaller number leaves over.
    if (count > 1 && GOMP_parallel) return GOMP_parallel([](void* p) { (*static_cast<Work*>(p))(); }, &work, 0, 0);
    on_new_threads(count, work);
}
