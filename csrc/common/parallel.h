// parallel_for, with the interface of at::parallel_for.
//
// at::parallel_for is a template, so the compiler of this package translates its OpenMP directive
// into calls of its own runtime: g++ into calls of libgomp, which torch has loaded on Linux, but
// clang into calls of LLVM's libomp, which only torch's builds for macOS have loaded. A second
// OpenMP runtime in the process would start its own threads. This package is therefore compiled
// without -fopenmp, and starts the threads with GOMP_parallel, the function that g++ calls for
// `#pragma omp parallel`. Both runtimes export this function.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/ParallelGuard.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

#if AT_PARALLEL_OPENMP
#if defined(_OPENMP)
#error "compile without -fopenmp: parallel.h calls the OpenMP runtime that torch has loaded"
#endif
extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
}
#endif

namespace kdkernels {

#if AT_PARALLEL_OPENMP

// Calls body(first, last) on disjoint ranges that together are [begin, end), each on its own thread.
// A range has at least `grain` elements, except the last one. Rethrows the first exception.
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (end - begin <= std::max<int64_t>(grain, 1) || at::in_parallel_region() || at::get_num_threads() == 1) {
    const at::internal::ThreadIdGuard thread_id(0);
    const c10::ParallelGuard guard(true);
    body(begin, end);
    return;
  }
  struct Region {
    int64_t begin, end, grain;
    const Body& body;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr exception;

    void run() {
      const int64_t ranges = std::min<int64_t>(omp_get_num_threads(), at::divup(end - begin, std::max<int64_t>(grain, 1)));
      const int64_t thread = omp_get_thread_num(), size = at::divup(end - begin, ranges), first = begin + thread * size;
      if (first >= end) return;
      try {
        const at::internal::ThreadIdGuard thread_id(static_cast<int>(thread));
        const c10::ParallelGuard guard(true);
        body(first, std::min(end, first + size));
      } catch (...) {
        if (!failed.test_and_set()) exception = std::current_exception();
      }
    }
  };
  Region region{begin, end, grain, body};
  GOMP_parallel([](void* data) { static_cast<Region*>(data)->run(); }, &region, 0, 0);
  if (region.exception) std::rethrow_exception(region.exception);
}

#else

using at::parallel_for;

#endif

}  // namespace kdkernels
