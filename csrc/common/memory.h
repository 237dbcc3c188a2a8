// A CPU allocator for large results, which reuses freed memory.
//
// Most of the time needed for a new tensor of many megabytes goes into page faults: the operating
// system clears every page before the kernel writes it, which takes longer than the arithmetic of a
// memory-bound kernel, and the C library returns large blocks to the system as soon as they are
// freed. A training step asks for a gradient of the same size again and again. This allocator
// therefore maps large blocks on huge pages, if the system allows programs to request them, and
// keeps freed blocks for the next step. A large kept block is marked as reclaimable (MADV_FREE), so
// the system can take it back whenever memory is short.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/strides.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace kdkernels {

// Whether a result of so many bytes is written past the caches. Writing it then takes half the
// traffic, but whoever reads it next has to wait for the memory. Writing and then reading a gradient
// takes as long either way at 32 MiB, and 7 % longer past the caches at 8 and 16 MiB (Zen 5, 32 MiB
// of L3 cache).
inline bool bypasses_caches(size_t bytes) {
  return bytes >= size_t(32) << 20;
}

#if defined(__linux__)

class RecyclingAllocator final : public c10::Allocator {
 public:
  static constexpr size_t min_bytes = size_t(1) << 20;  // the C library reuses smaller blocks itself
  // Smaller blocks are not marked as reclaimable: marking one interrupts the other threads, which
  // takes 0.1 ms, a quarter of the training step of a loss whose gradient has 8 MiB.
  static constexpr size_t min_reclaimable_bytes = size_t(32) << 20;

  static constexpr size_t max_kept_blocks = 32;  // the results of some layers, of student and teacher

  static RecyclingAllocator& instance() {
    static auto* allocator = new RecyclingAllocator;  // never destroyed: tensors may outlive static objects
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    Block* block = take(bytes);
    return {block->data, block, &release_block, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // the context differs from the data pointer
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  // Returns all kept blocks to the system.
  void release() {
    std::vector<Block*> blocks;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks.swap(kept_);
      kept_bytes_ = 0;
    }
    for (Block* block : blocks) unmap(block);
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  RecyclingAllocator() {
    const char* megabytes = std::getenv("KDKERNELS_KEEP_MB");
    max_kept_bytes_ = size_t(megabytes ? std::max(0L, std::atol(megabytes)) : 1024) << 20;
  }

  Block* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = kept_.size(); i-- > 0;) {  // the newest first: its pages may still be in a cache
        Block* block = kept_[i];
        if (block->bytes < bytes || block->bytes > 2 * bytes) continue;
        kept_.erase(kept_.begin() + static_cast<ptrdiff_t>(i));
        kept_bytes_ -= block->bytes;
        return block;
      }
    }
    // Map one huge page more than needed, so that the block can start on a huge page boundary; then
    // unmap the excess at both ends. The rest of the block after its last whole huge page has pages
    // of the usual size.
    constexpr size_t huge = size_t(2) << 20;
    static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t rounded = (bytes + page - 1) / page * page;
    auto* mapping = static_cast<char*>(mmap(nullptr, rounded + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    TORCH_CHECK_WITH(OutOfMemoryError, mapping != MAP_FAILED, "kdkernels: cannot allocate ", bytes, " bytes");
    const size_t offset = (huge - reinterpret_cast<uintptr_t>(mapping) % huge) % huge;
    if (offset > 0) munmap(mapping, offset);
    munmap(mapping + offset + rounded, huge - offset);
#if defined(MADV_HUGEPAGE)
    madvise(mapping + offset, rounded, MADV_HUGEPAGE);  // only a hint: failure is harmless
#endif
    return new Block{mapping + offset, rounded};
  }

  static void release_block(void* context) {
    auto* block = static_cast<Block*>(context);
    RecyclingAllocator& allocator = instance();
    std::vector<Block*> surplus;
    {
      const std::lock_guard<std::mutex> lock(allocator.mutex_);
      allocator.kept_.push_back(block);
      allocator.kept_bytes_ += block->bytes;
      while (allocator.kept_bytes_ > allocator.max_kept_bytes_ || allocator.kept_.size() > max_kept_blocks) {
        surplus.push_back(allocator.kept_.front());
        allocator.kept_bytes_ -= surplus.back()->bytes;
        allocator.kept_.erase(allocator.kept_.begin());
      }
#if defined(MADV_FREE)
      if (surplus.empty() && block->bytes >= min_reclaimable_bytes) madvise(block->data, block->bytes, MADV_FREE);
#endif
    }
    for (Block* expired : surplus) unmap(expired);
  }

  static void unmap(Block* block) {
    munmap(block->data, block->bytes);
    delete block;
  }

  std::mutex mutex_;
  std::vector<Block*> kept_;  // oldest first
  size_t kept_bytes_ = 0, max_kept_bytes_ = 0;
};

inline void release_memory() {
  RecyclingAllocator::instance().release();
}

// An uninitialised tensor in recycled memory.
inline at::Tensor recycled_empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  at::Tensor out =
      at::detail::empty_strided_generic(sizes, strides, &RecyclingAllocator::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    out.fill_(std::numeric_limits<double>::quiet_NaN());
  return out;
}

// empty_like(x), in recycled memory if it is large.
inline at::Tensor recycled_empty_like(const at::Tensor& x) {
  if (x.nbytes() < RecyclingAllocator::min_bytes || !x.is_non_overlapping_and_dense()) return at::empty_like(x);
  return recycled_empty(x.sizes(), x.strides(), x.scalar_type());
}

// An uninitialised contiguous tensor, in recycled memory if it is large.
inline at::Tensor recycled_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (bytes < RecyclingAllocator::min_bytes) return at::empty(sizes, dtype);
  return recycled_empty(sizes, c10::contiguous_strides(sizes), dtype);
}

#else

inline void release_memory() {}

inline at::Tensor recycled_empty_like(const at::Tensor& x) {
  return at::empty_like(x);
}

inline at::Tensor recycled_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::empty(sizes, dtype);
}

#endif

// Uninitialised memory for numbers that a kernel works with, recycled if it is large: new memory of
// many megabytes takes longer than the arithmetic.
template <typename T>
class WorkArray {
 public:
  WorkArray() = default;
  explicit WorkArray(int64_t count) : data_(allocate(count * sizeof(T))) {}
  T* get() const { return static_cast<T*>(data_.get()); }
  explicit operator bool() const { return get() != nullptr; }

 private:
  static c10::DataPtr allocate(size_t bytes) {
#if defined(__linux__)
    if (bytes >= RecyclingAllocator::min_bytes) return RecyclingAllocator::instance().allocate(bytes);
#endif
    return c10::GetCPUAllocator()->allocate(bytes);
  }
  c10::DataPtr data_;
};

}  // namespace kdkernels
