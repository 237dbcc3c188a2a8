// Working memory that a thread keeps from one call to the next.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

namespace kdkernels {

// Keeps the working memory of a thread for its next call. Fresh memory costs page faults, which
// took as long as the arithmetic.
class ScratchPool {
 public:
  static void* take(size_t bytes, size_t& allocated) {
    std::vector<Block>& kept = pool().kept;
    size_t best = kept.size();
    for (size_t i = 0; i < kept.size(); ++i)
      if (kept[i].bytes >= bytes && kept[i].bytes <= 4 * bytes + 4096 && (best == kept.size() || kept[i].bytes < kept[best].bytes))
        best = i;
    if (best < kept.size()) {
      void* data = kept[best].data;
      allocated = kept[best].bytes;
      pool().bytes -= allocated;
      kept.erase(kept.begin() + static_cast<ptrdiff_t>(best));
      return data;
    }
    allocated = (bytes + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(64, allocated);
    if (!data) throw std::bad_alloc();
    return data;
  }
  static void give_back(void* data, size_t bytes) {
    Pool& thread_pool = pool();
    if (thread_pool.bytes + bytes > kMaxBytes) return std::free(data);
    thread_pool.kept.push_back({data, bytes});
    thread_pool.bytes += bytes;
  }

 private:
  static constexpr size_t kMaxBytes = size_t(32) << 20;  // per thread
  struct Block {
    void* data;
    size_t bytes;
  };
  struct Pool {
    ~Pool() {
      for (const Block& block : kept) std::free(block.data);
    }
    std::vector<Block> kept;
    size_t bytes = 0;
  };
  static Pool& pool() {
    static thread_local Pool thread_pool;
    return thread_pool;
  }
};

// Uninitialised memory for `count` numbers, aligned for vectors. The thread that creates a buffer
// must also destroy it: the memory returns to the pool of that thread.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) : data_(count > 0 ? static_cast<T*>(ScratchPool::take(count * sizeof(T), bytes_)) : nullptr) {}
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() {
    if (data_) ScratchPool::give_back(data_, bytes_);
  }
  T* get() const { return data_; }

 private:
  size_t bytes_ = 0;
  T* data_;
};

}  // namespace kdkernels
