// Cooperative thread arrays (CTAs, blocks of GPU threads) as the kernel bodies see them: a sequence
// of bulk-synchronous phases.
//
// A kernel body consists of code that every thread runs with the same values, and of phases in
// which each thread does its own part of the work. A phase ends with a barrier. nvcc compiles this
// file to a thin layer over threads, shuffles and barriers. Any other compiler gets the Cta of
// testing/host_cta.h, which runs the same bodies on the CPU with the threads in random order, so
// that the tests can check their logic without a GPU.
//
//   cta.threads(f)            calls f(t) for every thread t
//   cta.start(f)              like threads, but without a barrier: its writes are visible
//                             after the next barrier
//   cta.each(n, f)            calls f(i) for i in [0, n), divided among the threads
//   cta.sum(n, f), max(n, f)  like each, and reduces the results of f; every thread gets the result
//   cta.warps(n, f)           calls f(warp, i) for i in [0, n), divided among the warps;
//                             a Warp has its own each, sum, max and min
//   cta.read(x)               reads x, which phases write, in all threads; the next phase
//                             must not write x
//   cta.barrier()             a barrier without a phase
//   PerThread<V>              a variable that each thread keeps for itself from phase to phase
//   cta.copy_async(to, from, valid), copy_16_bytes_async(to, from, valid), commit(), wait<N>()
//                             asynchronous copies to shared memory, which write zero if not valid;
//                             wait returns when all commits but the last N have arrived
//
// Cta<32> is a single warp and uses the barriers of a warp; several of them can share a block.
#pragma once

#include <cstdint>

#include "gpu.h"

namespace kdkernels {

namespace reduce {
struct Sum {
  template <typename T>
  KDKERNELS_GPU static T join(T a, T b) {
    return a + b;
  }
};
struct Max {
  template <typename T>
  KDKERNELS_GPU static T join(T a, T b) {
    return b > a ? b : a;
  }
};
struct Min {
  template <typename T>
  KDKERNELS_GPU static T join(T a, T b) {
    return b < a ? b : a;
  }
};
}  // namespace reduce

}  // namespace kdkernels

#ifndef __CUDACC__
#include "../testing/host_cta.h"
#else

namespace kdkernels {

class Warp {
 public:
  static constexpr int kThreads = 32;
  template <typename F>
  KDKERNELS_GPU void each(int n, F f) const {
    for (int i = lane(); i < n; i += 32) f(i);
    __syncwarp();
  }
  template <typename T, typename F>
  KDKERNELS_GPU T sum(int n, F f) const {
    return reduce_over<reduce::Sum>(T(0), n, f);
  }
  template <typename T, typename F>
  KDKERNELS_GPU T max(T initial, int n, F f) const {
    return reduce_over<reduce::Max>(initial, n, f);
  }
  template <typename T, typename F>
  KDKERNELS_GPU T min(T initial, int n, F f) const {
    return reduce_over<reduce::Min>(initial, n, f);
  }

  // A butterfly reduction: every lane ends with the same bits.
  template <typename Op, typename T, typename F>
  KDKERNELS_GPU static T reduce_over(T value, int n, F f) {
    for (int i = lane(); i < n; i += 32) value = Op::join(value, static_cast<T>(f(i)));
    return reduce_lanes<Op>(value);
  }
  template <typename Op, typename T>
  KDKERNELS_GPU static T reduce_lanes(T value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value = Op::join(value, __shfl_xor_sync(0xffffffffu, value, step));
    return value;
  }

 private:
  KDKERNELS_GPU static int lane() { return threadIdx.x % 32; }
};

template <typename V>
class PerThread {
 public:
  KDKERNELS_GPU V& operator[](int) { return value_; }

 private:
  V value_;
};

template <int Threads>
class Cta {
 public:
  static constexpr int kThreads = Threads, kWarps = Threads / 32;

  KDKERNELS_GPU explicit Cta(void* scratch) : scratch_(static_cast<char*>(scratch)), buffer_(0) {}

  template <typename F>
  KDKERNELS_GPU void threads(F f) const {
    f(thread());
    barrier();
  }
  template <typename F>
  KDKERNELS_GPU void start(F f) const {
    f(thread());
  }
  template <typename F>
  KDKERNELS_GPU void each(int n, F f) const {
    for (int i = thread(); i < n; i += Threads) f(i);
    barrier();
  }
  template <typename T, typename F>
  KDKERNELS_GPU T sum(int n, F f) {
    return reduce_over<reduce::Sum>(T(0), n, f);
  }
  template <typename T, typename F>
  KDKERNELS_GPU T max(T initial, int n, F f) {
    return reduce_over<reduce::Max>(initial, n, f);
  }
  template <typename F>
  KDKERNELS_GPU void warps(int n, F f) const {
    for (int i = thread() / 32; i < n; i += kWarps) f(Warp(), i);
    barrier();
  }
  KDKERNELS_GPU static void barrier() {
    if (Threads == 32)
      __syncwarp();
    else
      __syncthreads();
  }
  template <typename T>
  KDKERNELS_GPU T read(const T& x) const {
    return x;
  }

  template <typename T>
  KDKERNELS_GPU void copy_async(T* to, const T* from, bool valid) const {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "cp.async copies 4, 8 or 16 bytes");
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(sizeof(T)),
                 "r"(valid ? static_cast<int>(sizeof(T)) : 0)
                 : "memory");
  }
  template <typename T>
  KDKERNELS_GPU void copy_16_bytes_async(T* to, const T* from, bool valid) const {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0) : "memory");
  }
  KDKERNELS_GPU void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int N>
  KDKERNELS_GPU void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
    barrier();
  }

 private:
  KDKERNELS_GPU static int thread() { return threadIdx.x % Threads; }
  // Needs only one barrier per reduction: consecutive reductions alternate between two buffers, so
  // the results of the previous one may still be read.
  template <typename Op, typename T, typename F>
  KDKERNELS_GPU T reduce_over(T value, int n, F f) {
    const T neutral = value;
    for (int i = thread(); i < n; i += Threads) value = Op::join(value, static_cast<T>(f(i)));
    value = Warp::reduce_lanes<Op>(value);
    if (Threads == 32) {
      __syncwarp();
      return value;
    }
    T* partials = reinterpret_cast<T*>(scratch_ + buffer_ * kWarps * sizeof(double));
    buffer_ ^= 1;
    if (threadIdx.x % 32 == 0) partials[thread() / 32] = value;
    __syncthreads();
    value = neutral;
    for (int w = 0; w < kWarps; ++w) value = Op::join(value, partials[w]);
    return value;
  }

  char* scratch_;
  int buffer_;
};

}  // namespace kdkernels

#endif
