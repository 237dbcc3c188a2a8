// The class Cluster of common/cluster.h, which includes this file, for the CPU. It runs the bodies
// of kernels so that errors in their synchronisation become visible:
//
//   - The threads of all blocks run in random order between two reductions.
//   - The shared memory of a block starts as NaN.
//   - The destination of an asynchronous copy is NaN until the thread that made it has waited.
//
// Reductions use the same order of operations as the device.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <vector>

#include "host_cta.h"

namespace kdkernels {

template <typename V>
class OfThread {
 public:
  V& operator()(int rank, int t) { return values_[rank * 1024 + t]; }

 private:
  std::vector<V> values_ = std::vector<V>(8 * 1024);
};

// The values of the lanes of a warp.
template <typename V>
class Lanes {
 public:
  explicit Lanes(std::array<V, 32>& values) : values_(values) {}
  template <typename Op, typename After>
  void butterfly(float V::* member, After after) {
    std::array<float, 32> before, x;
    for (int lane = 0; lane < 32; ++lane) before[lane] = x[lane] = values_[lane].*member;
    for (int step = 16; step > 0; step /= 2) {
      const auto old = x;
      for (int lane = 0; lane < 32; ++lane) x[lane] = Op::join(old[lane], old[lane ^ step]);
    }
    for (int lane = 0; lane < 32; ++lane) {
      values_[lane].*member = x[lane];
      after(values_[lane], before[lane]);
    }
  }

 private:
  std::array<V, 32>& values_;
};

template <int Threads>
class Cluster {
 public:
  static constexpr int kThreads = Threads, kWarps = Threads / 32;

  // `bytes` of shared memory for each block, of which the reductions use the first.
  Cluster(int ranks, int64_t bytes, uint64_t seed)
      : order_(seed), ranks_(ranks), bytes_(bytes), memory_(ranks * (bytes + kGuard) + kGuard) {
    poison(memory_.data(), memory_.size());
    pending_.resize(static_cast<size_t>(ranks) * Threads);
  }
  void check() const {
    for (int rank = 0; rank < ranks_; ++rank)
      for (int64_t i = 0; i < kGuard; ++i)
        if (begin(rank)[bytes_ + i] != char(0xff)) throw std::logic_error("a kernel wrote past the end of its shared memory");
  }

  int ranks() const { return ranks_; }
  char* shared(int rank) const { return begin(rank) + reduction_bytes(Threads, ranks_); }

  template <typename F>
  void threads(F f) {
    order_.visit(Threads * ranks_, [&](int i) { f(i / Threads, i % Threads); });
  }

  void copy_16_bytes_async(int rank, int t, void* to, const void* from, int bytes) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
      throw std::logic_error("a copy of 16 bytes is not aligned");
    poison(to, 16);
    pending_[rank * Threads + t].push_back({to, from, bytes, group_});
  }
  void commit() { ++group_; }
  template <int N>
  void wait() {
    for (auto& copies : pending_) {
      while (!copies.empty() && copies.front().group < group_ - N) {
        const Copy& copy = copies.front();
        std::memset(copy.to, 0, 16);
        std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        copies.pop_front();
      }
    }
  }

  template <typename Merge, typename V>
  V reduce(OfThread<V>& values) {
    static_assert(sizeof(V) == 8 || sizeof(V) == 16, "a value is written to another block at once");
    std::vector<V> partials;
    std::array<V, 32> warp;
    for (int rank = 0; rank < ranks_; ++rank) {
      for (int first = 0; first < Threads; first += 32) {
        for (int lane = 0; lane < 32; ++lane) warp[lane] = values(rank, first + lane);
        partials.push_back(merged<Merge>(warp));
      }
    }
    warp.fill(Merge::neutral());
    for (size_t i = 0; i < partials.size(); ++i) warp[i % 32] = i < 32 ? partials[i] : Merge::join(warp[i % 32], partials[i]);
    return merged<Merge>(warp);
  }

  void add(int32_t* to, int32_t value) { *to += value; }
  void barrier() {}

 private:
  struct Copy {
    void* to;
    const void* from;
    int bytes;
    int64_t group;
  };
  static constexpr int64_t kGuard = 64;

  template <typename Merge, typename V>
  static V merged(std::array<V, 32>& warp) {
    Lanes<V> lanes(warp);
    Merge::lanes(lanes);
    return warp[0];
  }
  char* begin(int rank) const {
    char* aligned = const_cast<char*>(memory_.data()) + (kGuard - reinterpret_cast<uintptr_t>(memory_.data()) % kGuard) % kGuard;
    return aligned + rank * (bytes_ + kGuard);
  }

  RandomOrder order_;
  int ranks_;
  int64_t bytes_, group_ = 0;
  std::vector<char> memory_;
  std::vector<std::deque<Copy>> pending_;
};

}  // namespace kdkernels
