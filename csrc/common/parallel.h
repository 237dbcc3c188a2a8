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
#include <optional>
#include <vector>

#if AT_PARALLEL_OPENMP
#if defined(_OPENMP)
#error "compile without -fopenmp: parallel.h calls the OpenMP runtime that torch has loaded"
#endif
extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num();
}
#endif

namespace kdkernels {

#if AT_PARALLEL_OPENMP

// Calls body(state, first, last) on disjoint ranges that together are [begin, end). Each thread has a
// state of its own, for example working memory, which make_state() creates before its first range.
// Rethrows the first exception.
//
// Up to `grain` elements are one range, on the calling thread. More are divided into equal shares, at
// most one for each thread and one for each `grain` elements. A thread processes its share in a few
// parts, of at least `grain` elements except the last one, and then takes parts of the other shares:
// a thread whose core is busy with another program would hold up all of them. (With one of two cores
// busy, the gradient of 128 maps of 3136 x 64 takes 9 ms instead of 14.) Results must therefore not
// depend on where a range ends.
template <typename MakeState, typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const MakeState& make_state, const Body& body) {
  if (begin >= end) return;
  grain = std::max<int64_t>(grain, 1);
  if (end - begin <= grain || at::in_parallel_region() || at::get_num_threads() == 1) {
    const at::internal::ThreadIdGuard thread_id(0);
    const c10::ParallelGuard guard(true);
    auto state = make_state();
    body(state, begin, end);
    return;
  }
  constexpr int64_t parts = 8;  // of a share
  constexpr size_t cache_line = 64;
  struct alignas(cache_line) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Region {
    std::vector<Share> shares;
    int64_t part;
    const MakeState& make_state;
    const Body& body;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr exception;

    void run(int64_t thread) {
      const int64_t count = static_cast<int64_t>(shares.size());
      if (thread >= count) return;
      try {
        const at::internal::ThreadIdGuard thread_id(static_cast<int>(thread));
        const c10::ParallelGuard guard(true);
        std::optional<decltype(make_state())> state;
        for (int64_t i = 0; i < count; ++i) {
          Share& share = shares[(thread + i) % count];
          for (int64_t first; !failed.test() && (first = share.next.fetch_add(part, std::memory_order_relaxed)) < share.end;) {
            if (!state) state.emplace(make_state());
            body(*state, first, std::min(share.end, first + part));
          }
        }
      } catch (...) {
        if (!failed.test_and_set()) exception = std::current_exception();
      }
    }
  };
  const int64_t count = std::min<int64_t>(at::get_num_threads(), at::divup(end - begin, grain)), size = at::divup(end - begin, count);
  Region region{std::vector<Share>(count), at::divup(size, std::clamp<int64_t>(size / grain, 1, parts)), make_state, body};
  for (int64_t i = 0; i < count; ++i) {
    region.shares[i].next.store(begin + i * size, std::memory_order_relaxed);
    region.shares[i].end = std::min(end, begin + (i + 1) * size);
  }
  GOMP_parallel([](void* data) { static_cast<Region*>(data)->run(omp_get_thread_num()); }, &region, 0, 0);
  if (region.exception) std::rethrow_exception(region.exception);
}

#else

template <typename MakeState, typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const MakeState& make_state, const Body& body) {
  at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    auto state = make_state();
    body(state, first, last);
  });
}

#endif

// The same without a state: body(first, last).
template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  struct None {};
  parallel_for(begin, end, grain, [] { return None(); }, [&](None&, int64_t first, int64_t last) { body(first, last); });
}

}  // namespace kdkernels
