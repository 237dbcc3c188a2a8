// Clusters of cooperative thread arrays as a kernel body sees them: blocks of threads that run at
// the same time, on neighbouring multiprocessors, and write to each other's shared memory.
//
// A kernel body consists of code that every thread runs with the same values, of parts in which each
// thread works on what it alone reads and writes, and of reductions over all threads, which are the
// only barriers. nvcc compiles this file to a thin layer over threads, shuffles and barriers. Any
// other compiler gets the Cluster of testing/host_cluster.h, which runs the same bodies on the CPU.
//
//   cluster.threads(f)        calls f(rank, t) for every thread t of every block
//   cluster.shared(rank)      the shared memory of a block, behind the memory of the reductions
//   cluster.copy_16_bytes_async(rank, t, to, from, bytes), commit(), wait<N>()
//                             asynchronous copies to shared memory, for the thread that makes them;
//                             the bytes that are not copied become 0; wait returns when all commits
//                             of this thread but the last N have arrived
//   cluster.reduce<Merge>(values)
//                             merges a value of every thread, in the same order on every GPU; every
//                             thread gets the result
//   cluster.barrier()         at the end of the kernel
//   cluster.add(to, value)    adds to a number in memory to which other clusters add, too
//   OfThread<V>               a variable that each thread keeps for itself
//
// Merge::lanes(lanes) merges the values of a warp with lanes.butterfly<Op>(member, after), which
// reduces a member of the values, so that every lane has the result, and then calls after(value,
// before) in each lane, where `before` is what the member was. Merge::join(a, b) merges two values,
// and Merge::neutral() changes nothing.
#pragma once

#include "cluster_memory.h"
#include "cta.h"

#ifndef __CUDACC__
#include "../testing/host_cluster.h"
#else

namespace kdkernels {

template <typename V>
class OfThread {
 public:
  KDKERNELS_GPU V& operator()(int, int) { return value_; }

 private:
  V value_;
};

template <typename V>
class Lanes {
 public:
  KDKERNELS_GPU explicit Lanes(V& value) : value_(value) {}
  template <typename Op, typename After>
  KDKERNELS_GPU void butterfly(float V::* member, After after) {
    const float before = value_.*member;
    value_.*member = Warp::reduce_lanes<Op>(before);
    after(value_, before);
  }

 private:
  V& value_;
};

template <int Threads>
class Cluster {
 public:
  static constexpr int kThreads = Threads, kWarps = Threads / 32;

  KDKERNELS_GPU explicit Cluster(char* memory) : memory_(memory), buffer_(0) {
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(ranks_));
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank_));
#else
    ranks_ = 1, rank_ = 0;
#endif
    // No block writes to the memory of another that has not started.
    barrier();
  }

  KDKERNELS_GPU int ranks() const { return ranks_; }
  KDKERNELS_GPU char* shared(int) const { return memory_ + reduction_bytes(Threads, ranks_); }

  template <typename F>
  KDKERNELS_GPU void threads(F f) const {
    f(rank_, static_cast<int>(threadIdx.x));
  }

  KDKERNELS_GPU void copy_16_bytes_async(int, int, void* to, const void* from, int bytes) const {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  }
  KDKERNELS_GPU void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int N>
  KDKERNELS_GPU void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
  }

  // One barrier for each reduction: consecutive ones alternate between two buffers, so the results
  // of the previous one may still be read.
  template <typename Merge, typename V>
  KDKERNELS_GPU V reduce(OfThread<V>& values) {
    static_assert(sizeof(V) == 8 || sizeof(V) == 16, "a value is written to another block at once");
    V value = values(0, 0);
    Lanes<V> lanes(value);
    Merge::lanes(lanes);
    V* partials = reinterpret_cast<V*>(memory_ + buffer_ * ranks_ * kWarps * 16);
    buffer_ ^= 1;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane < ranks_) write(partials + rank_ * kWarps + warp, lane, value);
    barrier();
    value = Merge::neutral();
    for (int i = lane; i < ranks_ * kWarps; i += 32) value = i == lane ? partials[i] : Merge::join(value, partials[i]);
    Merge::lanes(lanes);
    return value;
  }

  // Adds to a number in memory to which other clusters add, too.
  KDKERNELS_GPU void add(int32_t* to, int32_t value) const { atomicAdd(to, value); }

  // For reductions, and at both ends of a kernel: no block ends while another may still write to its
  // memory.
  KDKERNELS_GPU void barrier() const {
#if __CUDA_ARCH__ >= 900
    if (ranks_ > 1) {
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }

 private:
  template <typename V>
  KDKERNELS_GPU void write(V* to, int rank, const V& value) const {
#if __CUDA_ARCH__ >= 900
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
    const float* x = reinterpret_cast<const float*>(&value);
    if (sizeof(V) == 16)
      asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                   : "memory");
    else
      asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x[0]), "f"(x[1]) : "memory");
#else
    *to = value;
#endif
  }

  char* memory_;
  int buffer_, ranks_, rank_;
};

}  // namespace kdkernels

#endif
