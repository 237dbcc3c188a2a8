// Memory for large results.
//
// A fresh tensor of many megabytes is mostly page faults: the system clears every page before the kernel writes it, which takes longer than
// the arithmetic of a memory-bound kernel, and the C library gives large blocks back as soon as they are freed. A training step asks for a
// gradient of the same size again and again. So large blocks come from here: mapped on huge pages where the system lets programs ask for
// them, and kept for the next step when they are freed. A kept block is marked as free to take (MADV_FREE), so the system can have it back
// whenever memory is short.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Allocator.h>
#include <c10/util/strides.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kdkernels {

#if defined(__linux__)

class RecyclingAllocator final : public c10::Allocator {
 public:
  static constexpr size_t smallest = size_t(1) << 20;  // below this the C library recycles by itself

  static RecyclingAllocator& instance() {
    static auto* allocator = new RecyclingAllocator;  // never destroyed: tensors may outlive static objects
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    Block* block = take(bytes);
    return {block->data, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }  // the context is not the data
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  // Gives all that is kept back to the system.
  void release() {
    std::vector<Block*> all;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      all.swap(kept_);
      kept_bytes_ = 0;
    }
    for (Block* block : all) unmap(block);
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  RecyclingAllocator() {
    const char* megabytes = std::getenv("KDKERNELS_KEEP_MB");
    most_kept_ = size_t(megabytes ? std::max(0L, std::atol(megabytes)) : 1024) << 20;
  }

  Block* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = kept_.size(); i-- > 0;) {  // the latest first: its pages may still be in a cache
        Block* block = kept_[i];
        if (block->bytes < bytes || block->bytes > 2 * bytes) continue;
        kept_.erase(kept_.begin() + static_cast<ptrdiff_t>(i));
        kept_bytes_ -= block->bytes;
        return block;
      }
    }
    constexpr size_t huge = size_t(2) << 20;
    const size_t rounded = (bytes + huge - 1) / huge * huge;
    // One huge page more than needed, to start on a boundary; what sticks out is unmapped again.
    auto* raw = static_cast<char*>(mmap(nullptr, rounded + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    TORCH_CHECK_WITH(OutOfMemoryError, raw != MAP_FAILED, "kdkernels: cannot allocate ", bytes, " bytes");
    const size_t head = (huge - reinterpret_cast<uintptr_t>(raw) % huge) % huge;
    if (head > 0) munmap(raw, head);
    munmap(raw + head + rounded, huge - head);
#if defined(MADV_HUGEPAGE)
    madvise(raw + head, rounded, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
    return new Block{raw + head, rounded};
  }

  static void give_back(void* context) {
    auto* block = static_cast<Block*>(context);
    RecyclingAllocator& self = instance();
    std::vector<Block*> surplus;
    {
      const std::lock_guard<std::mutex> lock(self.mutex_);
      self.kept_.push_back(block);
      self.kept_bytes_ += block->bytes;
      while (self.kept_bytes_ > self.most_kept_ || self.kept_.size() > 8) {
        surplus.push_back(self.kept_.front());
        self.kept_bytes_ -= surplus.back()->bytes;
        self.kept_.erase(self.kept_.begin());
      }
#if defined(MADV_FREE)
      if (surplus.empty()) madvise(block->data, block->bytes, MADV_FREE);
#endif
    }
    for (Block* old : surplus) unmap(old);
  }

  static void unmap(Block* block) {
    munmap(block->data, block->bytes);
    delete block;
  }

  std::mutex mutex_;
  std::vector<Block*> kept_;  // oldest first
  size_t kept_bytes_ = 0, most_kept_ = 0;
};

inline void release_memory() {
  RecyclingAllocator::instance().release();
}

// An uninitialised tensor on recycled memory.
inline at::Tensor recycled_empty(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  at::Tensor out =
      at::detail::empty_strided_generic(sizes, strides, &RecyclingAllocator::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU), dtype);
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    out.fill_(std::numeric_limits<double>::quiet_NaN());
  return out;
}

// empty_like(x) on recycled memory where it is large.
inline at::Tensor recycled_empty_like(const at::Tensor& x) {
  if (x.nbytes() < RecyclingAllocator::smallest || !x.is_non_overlapping_and_dense()) return at::empty_like(x);
  return recycled_empty(x.sizes(), x.strides(), x.scalar_type());
}

// A contiguous tensor, on recycled memory where it is large.
inline at::Tensor recycled_empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  const size_t bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
  if (bytes < RecyclingAllocator::smallest) return at::empty(sizes, dtype);
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

}  // namespace kdkernels
