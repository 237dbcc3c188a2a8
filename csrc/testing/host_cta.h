// The class Cta (cooperative thread array, a block of threads) of common/cta.h, which includes this
// file, for the CPU. It runs the bodies of kernels so that errors in their synchronisation become
// visible:
//
//   - The threads of a phase run in random order, so a phase whose threads depend on each other
//     gives wrong numbers.
//   - Shared memory starts as NaN.
//   - The destination of an asynchronous copy is NaN until the kernel has waited for the copy.
//   - A value that all threads read must be unchanged at the end of the next phase.
//
// Reductions use the same order of operations as the device.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace kdkernels {

class RandomOrder {
 public:
  explicit RandomOrder(uint64_t seed) : state_(seed * 2 + 1) {}
  // Visits [0, n), n a power of two, from a random start with a random odd step: a new order for
  // each call, without a list.
  template <typename F>
  void visit(int n, F&& f) {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    const unsigned start = static_cast<unsigned>(state_ >> 33), step = static_cast<unsigned>(state_ >> 45) | 1u;
    for (unsigned i = 0; i < static_cast<unsigned>(n); ++i) f(static_cast<int>((start + i * step) & static_cast<unsigned>(n - 1)));
  }

 private:
  uint64_t state_;
};

// Reduces f(i), i in [0, n), with `Width` threads, in the order of the loops and butterflies of the
// device.
template <typename Op, int Width, typename T, typename F>
T reduce_in_lanes(RandomOrder& order, T neutral, int n, F&& f) {
  std::array<T, Width> values;
  values.fill(neutral);
  order.visit(Width, [&](int t) {
    for (int i = t; i < n; i += Width) values[t] = Op::join(values[t], static_cast<T>(f(i)));
  });
  T total = neutral;
  for (int w = 0; w < Width; w += 32) {
    for (int step = 16; step > 0; step /= 2)
      for (int lane = 0; lane < step; ++lane) values[w + lane] = Op::join(values[w + lane], values[w + lane + step]);
    total = Width == 32 ? values[0] : Op::join(total, values[w]);
  }
  return total;
}

class Warp {
 public:
  explicit Warp(RandomOrder& order) : order_(order) {}
  template <typename F>
  void each(int n, F f) const {
    order_.visit(32, [&](int t) {
      for (int i = t; i < n; i += 32) f(i);
    });
  }
  template <typename T, typename F>
  T sum(int n, F f) const {
    return reduce_in_lanes<reduce::Sum, 32>(order_, T(0), n, f);
  }
  template <typename T, typename F>
  T max(T least, int n, F f) const {
    return reduce_in_lanes<reduce::Max, 32>(order_, least, n, f);
  }
  template <typename T, typename F>
  T min(T most, int n, F f) const {
    return reduce_in_lanes<reduce::Min, 32>(order_, most, n, f);
  }

 private:
  RandomOrder& order_;
};

template <typename V>
class PerThread {
 public:
  V& operator[](int t) { return values_[t]; }

 private:
  std::vector<V> values_ = std::vector<V>(1024);
};

inline void poison(void* memory, size_t bytes) {
  std::memset(memory, 0xff, bytes);  // NaN as float and as double
}

template <int Threads>
class Cta {
 public:
  static constexpr int kThreads = Threads, kWarps = Threads / 32;

  explicit Cta(uint64_t seed) : order_(seed) {}

  template <typename F>
  void threads(F f) {
    order_.visit(Threads, f);
    barrier();
  }
  template <typename F>
  void start(F f) {
    order_.visit(Threads, f);
  }
  template <typename F>
  void each(int n, F f) {
    order_.visit(Threads, [&](int t) {
      for (int i = t; i < n; i += Threads) f(i);
    });
    barrier();
  }
  template <typename T, typename F>
  T sum(int n, F f) {
    const T result = reduce_in_lanes<reduce::Sum, Threads>(order_, T(0), n, f);
    barrier();
    return result;
  }
  template <typename T, typename F>
  T max(T least, int n, F f) {
    const T result = reduce_in_lanes<reduce::Max, Threads>(order_, least, n, f);
    barrier();
    return result;
  }
  template <typename F>
  void warps(int n, F f) {
    order_.visit(kWarps, [&](int w) {
      for (int i = w; i < n; i += kWarps) f(Warp(order_), i);
    });
    barrier();
  }
  void barrier() {
    for (const Read& read : reads_)
      if (std::memcmp(read.from, read.bytes, read.size) != 0)
        throw std::logic_error("a race: a phase wrote a value that all threads were reading");
    reads_.clear();
  }
  template <typename T>
  T read(const T& x) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "read() takes a number of at most 8 bytes");
    Read entry{&x, sizeof(T), {}};
    std::memcpy(entry.bytes, &x, sizeof(T));
    reads_.push_back(entry);
    return x;
  }

  template <typename T>
  void copy_async(T* to, const T* from, bool valid) {
    poison(to, sizeof(T));
    copies_.push_back({to, from, valid ? sizeof(T) : 0, sizeof(T)});
  }
  template <typename T>
  void copy_16_bytes_async(T* to, const T* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0)
      throw std::logic_error("a copy of 16 bytes is not aligned");
    poison(to, 16);
    copies_.push_back({to, from, valid ? size_t(16) : 0, 16});
  }
  void commit() {
    groups_.push_back(std::move(copies_));
    copies_.clear();
  }
  template <int N>
  void wait() {
    while (groups_.size() > N) {
      for (const Copy& copy : groups_.front()) {
        std::memset(copy.to, 0, copy.size);
        std::memcpy(copy.to, copy.from, copy.valid);
      }
      groups_.erase(groups_.begin());
    }
    barrier();
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    size_t valid, size;
  };
  struct Read {
    const void* from;
    size_t size;
    char bytes[sizeof(uint64_t)];
  };

  RandomOrder order_;
  std::vector<Read> reads_;
  std::vector<Copy> copies_;
  std::vector<std::vector<Copy>> groups_;
};

}  // namespace kdkernels
