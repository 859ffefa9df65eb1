// Memory for large gradients and scratch, and for tensors read from files. A page touched for the first time costs more
// than the arithmetic that fills it: the system clears it, and on a virtual machine the host may as well. So pages that
// were freed are kept for the next buffer of about their size, as a GPU's caching allocator does: each step of a
// training loop asks for the same ones, each layer of a file for the same shapes. Meanwhile they are marked MADV_FREE,
// so the system takes them back whenever it is short. A few are kept at most.
#include "tensors.h"

#ifdef __linux__
#include <sys/mman.h>

#include <mutex>
#include <vector>

namespace {

// What torch.from_dlpack takes memory over by: the unversioned one of dlpack.h (https://dmlc.github.io/dlpack).
struct DLManagedTensor {
    DLTensor tensor;
    void* context;
    void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kCPU = 1;

struct Pages {
    char* data = nullptr;
    size_t bytes = 0;
};

void unmap(Pages pages) {
    if (pages.data) munmap(pages.data, pages.bytes);
}

class Idle {
   public:
    explicit Idle(size_t kept) : kept_(kept) {}

    Pages take(size_t bytes) {
        std::lock_guard<std::mutex> guard(lock_);
        for (size_t i = pages_.size(); i-- > 0;) {
            const Pages pages = pages_[i];
            if (pages.bytes < bytes || pages.bytes > bytes + bytes / 4 + (size_t(4) << 20)) continue;
            pages_.erase(pages_.begin() + i);
            return pages;
        }
        return {};
    }

    void put(Pages pages) {
        Pages oldest;
        {
            std::lock_guard<std::mutex> guard(lock_);
            if (pages_.size() == kept_) {
                oldest = pages_.front();
                pages_.erase(pages_.begin());
            }
            pages_.push_back(pages);
        }
        unmap(oldest);
    }

    void release() {
        std::lock_guard<std::mutex> guard(lock_);
        for (const Pages& pages : pages_) unmap(pages);
        pages_.clear();
    }

   private:
    const size_t kept_;
    std::mutex lock_;
    std::vector<Pages> pages_;  // the one freed last at the end
};

// Never destroyed: a tensor may be freed as late as the process's own end. A loss from hidden states has dW, the logits
// of both sides and a block of them; of a file a few threads each hold a tensor or two, of two sizes.
Idle &idle_rows = *new Idle(4), &idle_reads = *new Idle(8);

void release_idle() { idle_rows.release(), idle_reads.release(); }

Pages map(size_t bytes) {
    constexpr size_t huge = size_t(2) << 20;  // pages of 2 MB: 512 times fewer faults
    bytes = (bytes + huge - 1) / huge * huge;
    void* mapped = mmap(nullptr, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(mapped);
    char* const data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + huge - 1) / huge * huge);
    if (data != begin) munmap(begin, data - begin);
    if (begin + huge != data) munmap(data + bytes, begin + huge - data);
    madvise(data, bytes, MADV_HUGEPAGE);
    return {data, bytes};
}

struct Rows {
    DLManagedTensor managed;
    int64_t shape[2];
    Pages pages;
    Idle* idle;
};

// Called by whoever holds the tensor last, on any thread and with or without the GIL.
void give_back(DLManagedTensor* managed) {
    Rows* const rows = reinterpret_cast<Rows*>(managed);
    madvise(rows->pages.data, rows->pages.bytes, MADV_FREE);
    rows->idle->put(rows->pages);
    delete rows;
}

void drop_capsule(PyObject* capsule) {  // of a tensor that nobody took over
    if (PyCapsule_IsValid(capsule, "dltensor"))
        give_back(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

nb::object fresh(Idle& idle, int64_t N, int64_t V, int code, int bits) {
    const size_t bytes = size_t(N) * V * bits / 8;
    Pages pages = idle.take(bytes);
    if (!pages.data) pages = map(bytes);
    Rows* const rows = new Rows{{}, {N, V}, pages, &idle};
    rows->managed.tensor = {pages.data, kCPU, 0, 2, uint8_t(code), uint8_t(bits), 1, rows->shape, nullptr, 0};
    rows->managed.deleter = give_back;
    return nb::steal(PyCapsule_New(rows, "dltensor", drop_capsule));
}

// An uninitialised (N, V) tensor as a DLPack capsule. code and bits: of the DLPack dtype.
nb::object fresh_rows(int64_t N, int64_t V, int code, int bits) { return fresh(idle_rows, N, V, code, bits); }

// The same of bytes (1, size).
nb::object fresh_bytes(int64_t size) { return fresh(idle_reads, 1, size, 1, 8); }

}  // namespace

void bind_buffers(nb::module_& m) {
    m.def("fresh_rows", &fresh_rows);
    m.def("fresh_bytes", &fresh_bytes);
    m.def("release_rows", &release_idle);
}

#else
void bind_buffers(nb::module_&) {}
#endif
