// Assigns problems to the blocks of a launch, on the device and on the host. Several problems share
// a launch, and each of them has a range of blocks.
#pragma once

#include <type_traits>

#include "backward.h"

namespace kdkernels::truncated_svd::gpu {

template <typename Problem>
struct Group {
  Problem problems[kMaxProblems];
  int64_t first_block[kMaxProblems + 1];
  int count;
};

// The problem to which a block of the launch belongs; `block` becomes its index within the problem.
template <typename Problem>
KDKERNELS_GPU const Problem& problem_of(const Group<Problem>& group, int64_t& block) {
  int i = 0;
  while (i + 1 < group.count && block >= group.first_block[i + 1]) ++i;
  block -= group.first_block[i];
  return group.problems[i];
}

// slot: the number of the matrix among those that share the block.
template <typename T, typename Cta>
KDKERNELS_GPU void forward_block(Cta& cta, const Group<ForwardProblem>& group, int64_t block, int slot, char* shared, int64_t limit) {
  const ForwardProblem& problem = problem_of(group, block);
  const int64_t b = block * matrices_per_block(Cta::kThreads) + slot;
  if (b < problem.batch) forward<T>(cta, problem, b, shared + slot * limit, limit);
}
template <typename T, typename Cta>
KDKERNELS_GPU void solve_block(Cta& cta, const Group<BackwardProblem>& group, int64_t block, int slot, char* shared, int64_t limit) {
  const BackwardProblem& problem = problem_of(group, block);
  const int64_t b = block * matrices_per_block(Cta::kThreads) + slot;
  if (b < problem.batch) solve<T>(cta, problem, b, shared + slot * limit, limit);
}
template <typename T, typename Cta>
KDKERNELS_GPU void update_block(Cta& cta, const Group<BackwardProblem>& group, int64_t block, char* shared) {
  const BackwardProblem& problem = problem_of(group, block);
  const int64_t blocks = update_blocks(problem) / problem.batch;
  update<T>(cta, problem, block / blocks, static_cast<int>(block % blocks), shared);
}

// The following functions run on the host, which launches the kernels.

template <typename Problem>
int number_size(const Problem& problem) {  // bytes per number of the computation
  return problem.x.storage == Storage::float64 ? 8 : 4;
}

// Calls f(T()), where T is the type in which numbers of this storage type are computed.
template <typename F>
const char* with_type(Storage storage, F f) {
  return storage == Storage::float64 ? f(double()) : f(float());
}
// Calls f(T(), threads) for the kernel of a problem. Only combinations that threads_for can return
// are compiled.
template <typename Problem, typename F>
const char* with_kernel(const Problem& problem, F f) {
  const int threads = threads_for(problem.p, number_size(problem));
  return with_type(problem.x.storage, [&](auto t) {
    if constexpr (sizeof(t) == 4) {
      if (threads == 32) return f(t, std::integral_constant<int, 32>());
      if (threads == 512) return f(t, std::integral_constant<int, 512>());
    }
    return f(t, std::integral_constant<int, 256>());
  });
}

// Divides the problems into groups that run the same kernel, and calls f(group) for every group.
template <typename Problem, typename Key, typename Blocks, typename F>
const char* for_each_group(const Problem* problems, int count, Key key, Blocks blocks, F f) {
  for (int i = 0; i < count; ++i) {
    bool done = false;
    for (int before = 0; before < i; ++before) done = done || key(problems[before]) == key(problems[i]);
    if (done) continue;
    for (int next = i; next < count;) {
      Group<Problem> group{};
      for (; next < count && group.count < kMaxProblems; ++next) {
        if (key(problems[next]) != key(problems[i])) continue;
        group.problems[group.count] = problems[next];
        group.first_block[group.count + 1] = group.first_block[group.count] + blocks(problems[next]);
        ++group.count;
      }
      if (const char* error = f(group)) return error;
    }
  }
  return nullptr;
}

template <typename Problem>
int64_t matrix_blocks(const Problem& problem) {
  const int matrices = matrices_per_block(threads_for(problem.p, number_size(problem)));
  return (problem.batch + matrices - 1) / matrices;
}
template <typename Problem>
int kernel_key(const Problem& problem) {
  return threads_for(problem.p, number_size(problem)) * 2 + (problem.x.storage == Storage::float64);
}
// The largest f(problem) of a group, where f is the shared memory of a matrix or of a block.
template <typename Problem, typename F>
int64_t largest_of_group(const Group<Problem>& group, F f) {
  int64_t result = 0;
  for (int i = 0; i < group.count; ++i) result = f(group.problems[i]) > result ? f(group.problems[i]) : result;
  return result;
}

// Calls f(group, T(), threads, blocks, bytes of shared memory per matrix) for every group. The
// memory of a matrix starts where that of the matrix before it ends, and is as large as the largest
// plan.
template <typename F>
const char* for_each_forward_group(const ForwardProblem* problems, int count, int64_t limit, F f) {
  return for_each_group(
      problems, count, kernel_key<ForwardProblem>, matrix_blocks<ForwardProblem>, [&](const Group<ForwardProblem>& group) {
        return with_kernel(group.problems[0], [&](auto t, auto threads) {
          const int64_t matrix_limit = limit_per_matrix(group.problems[0].p, sizeof(t), limit);
          const int64_t shared =
              largest_of_group(group, [&](const ForwardProblem& m) { return forward_plan<decltype(t)>(m.p, m.k, matrix_limit).shared(); });
          return f(group, t, threads, group.first_block[group.count], shared);
        });
      });
}
template <typename F>
const char* for_each_solve_group(const BackwardProblem* problems, int count, int64_t limit, F f) {
  return for_each_group(
      problems, count, kernel_key<BackwardProblem>, matrix_blocks<BackwardProblem>, [&](const Group<BackwardProblem>& group) {
        return with_kernel(group.problems[0], [&](auto t, auto threads) {
          const int64_t matrix_limit = limit_per_matrix(group.problems[0].p, sizeof(t), limit);
          const int64_t shared = largest_of_group(
              group, [&](const BackwardProblem& m) { return backward_plan<decltype(t)>(m.p, m.k, matrix_limit).shared(); });
          return f(group, t, threads, group.first_block[group.count], shared);
        });
      });
}
// Calls f(group, T(), blocks, bytes of shared memory per block) for every group.
template <typename F>
const char* for_each_update_group(const BackwardProblem* problems, int count, F f) {
  return for_each_group(
      problems, count, [](const BackwardProblem& m) { return m.x.storage == Storage::float64; }, update_blocks,
      [&](const Group<BackwardProblem>& group) {
        return with_type(group.problems[0].x.storage, [&](auto t) {
          const int64_t shared =
              largest_of_group(group, [&](const BackwardProblem& m) { return update_shared<decltype(t)>(m.p, m.k, m.gb != nullptr); });
          return f(group, t, group.first_block[group.count], shared);
        });
      });
}

}  // namespace kdkernels::truncated_svd::gpu
