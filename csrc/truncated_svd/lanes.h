// Functions for matrices in lanes: lane l of every vector belongs to matrix l of a group. Code that
// is written as if for one scalar matrix then processes as many matrices as a vector has lanes. It
// needs no padded matrices and no sums across lanes. This file converts data to that layout and
// back.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "../common/transpose.h"

namespace kdkernels::truncated_svd {

using simd::first_lanes;
using simd::kLanes;
using simd::Mask;
using simd::sum_groups;
using simd::sums;
using simd::transpose;
using simd::transpose_groups;
using simd::Vec;

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

// `count`, rounded up to whole vectors.
template <typename T>
constexpr int64_t padded(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
KDKERNELS_INLINE Vec<T> abs(Vec<T> v) {
  using Int = typename simd::IntOf<T>::type;
  return (Vec<T>)((Mask<T>)v & std::numeric_limits<Int>::max());
}

// Converts the lower triangles of a group of matrices, [lanes][p][stride], to packed triangles in
// lanes: element (i, j <= i) is at i (i + 1) / 2 + j.
template <typename T>
void interleave_triangle(const T* matrices, int64_t p, int64_t stride, Vec<T>* packed) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < p; ++i) {
    for (int64_t j = 0; j <= i; j += lanes) {
      Vec<T> block[lanes];
      for (int l = 0; l < lanes; ++l) block[l] = simd::load<T>(matrices + (l * p + i) * stride + j);
      transpose<T>(block);
      const int64_t count = std::min<int64_t>(lanes, i + 1 - j);
      for (int64_t c = 0; c < count; ++c) packed[j + c] = block[c];
    }
    packed += i + 1;
  }
}

// Converts vectors of `count` numbers from lanes, [count], to rows, [lanes][stride].
template <typename T>
void deinterleave(const Vec<T>* in, int64_t count, T* out, int64_t stride) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < count; i += lanes) {
    Vec<T> block[lanes];
    for (int l = 0; l < lanes; ++l) block[l] = i + l < count ? in[i + l] : Vec<T>{};
    transpose<T>(block);
    for (int l = 0; l < lanes; ++l) simd::store<T>(out + l * stride + i, block[l]);
  }
}

// Converts vectors of `count` numbers from rows, [lanes][stride], to lanes, [count].
template <typename T>
void interleave(const T* in, int64_t stride, int64_t count, Vec<T>* out) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < count; i += lanes) {
    Vec<T> block[lanes];
    for (int l = 0; l < lanes; ++l) block[l] = simd::load<T>(in + l * stride + i);
    transpose<T>(block);
    for (int l = 0; l < lanes && i + l < count; ++l) out[i + l] = block[l];
  }
}

}  // namespace kdkernels::truncated_svd
