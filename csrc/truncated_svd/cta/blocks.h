// Which block of a launch does what, on either side: several problems share a launch, each with blocks of its own.
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

template <typename Problem>
KDKERNELS_GPU const Problem& problem_of(const Group<Problem>& group, int64_t& block) {
  int i = 0;
  while (i + 1 < group.count && block >= group.first_block[i + 1]) ++i;
  block -= group.first_block[i];
  return group.problems[i];
}

template <typename T, typename Cta>
KDKERNELS_GPU void forward_block(Cta& cta, const Group<ForwardProblem>& group, int64_t block, int part, char* shared, int64_t limit) {
  const ForwardProblem& problem = problem_of(group, block);
  const int64_t b = block * matrices_together(Cta::kThreads) + part;
  if (b < problem.batch) forward<T>(cta, problem, b, shared + part * limit, limit);
}
template <typename T, typename Cta>
KDKERNELS_GPU void solve_block(Cta& cta, const Group<BackwardProblem>& group, int64_t block, int part, char* shared, int64_t limit) {
  const BackwardProblem& problem = problem_of(group, block);
  const int64_t b = block * matrices_together(Cta::kThreads) + part;
  if (b < problem.batch) solve<T>(cta, problem, b, shared + part * limit, limit);
}
template <typename T, typename Cta>
KDKERNELS_GPU void update_block(Cta& cta, const Group<BackwardProblem>& group, int64_t block, char* shared) {
  const BackwardProblem& problem = problem_of(group, block);
  const int64_t blocks = update_blocks(problem) / problem.batch;
  update<T>(cta, problem, block / blocks, static_cast<int>(block % blocks), shared);
}

// What follows runs where problems are launched, on the host.

template <typename Problem>
int size_of(const Problem& problem) {  // of the numbers that are computed with
  return problem.x.storage == Storage::float64 ? 8 : 4;
}

// f(T()) of the type that computes a storage type
template <typename F>
const char* with_type(Storage storage, F f) {
  return storage == Storage::float64 ? f(double()) : f(float());
}
// f(T(), threads) of the types that compute a problem: only what threads_for can give.
template <typename Problem, typename F>
const char* with_kernel(const Problem& problem, F f) {
  const int threads = threads_for(problem.p, size_of(problem));
  return with_type(problem.x.storage, [&](auto t) {
    if constexpr (sizeof(t) == 4) {
      if (threads == 32) return f(t, std::integral_constant<int, 32>());
      if (threads == 512) return f(t, std::integral_constant<int, 512>());
    }
    return f(t, std::integral_constant<int, 256>());
  });
}

// Puts problems into groups of one kernel each: f(group, indices) for every group.
template <typename Problem, typename Key, typename Blocks, typename F>
const char* in_groups(const Problem* problems, int count, Key key, Blocks blocks, F f) {
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
  const int together = matrices_together(threads_for(problem.p, size_of(problem)));
  return (problem.batch + together - 1) / together;
}
template <typename Problem>
int kernel_key(const Problem& problem) {
  return threads_for(problem.p, size_of(problem)) * 2 + (problem.x.storage == Storage::float64);
}
// What a group needs of shared memory, and the part of each matrix.
template <typename Problem, typename F>
int64_t largest(const Group<Problem>& group, F f) {
  int64_t most = 0;
  for (int i = 0; i < group.count; ++i) most = f(group.problems[i]) > most ? f(group.problems[i]) : most;
  return most;
}

// f(group, T(), threads, blocks, bytes of shared memory of a matrix): a matrix's part begins where the one before ends, as far as the
// largest plan goes.
template <typename F>
const char* in_forward_groups(const ForwardProblem* problems, int count, int64_t limit, F f) {
  return in_groups(problems, count, kernel_key<ForwardProblem>, matrix_blocks<ForwardProblem>, [&](const Group<ForwardProblem>& group) {
    return with_kernel(group.problems[0], [&](auto t, auto threads) {
      const int64_t own = limit_for(group.problems[0].p, sizeof(t), limit);
      const int64_t shared = largest(group, [&](const ForwardProblem& m) { return forward_plan<decltype(t)>(m.p, m.k, own).shared(); });
      return f(group, t, threads, group.first_block[group.count], shared);
    });
  });
}
template <typename F>
const char* in_solve_groups(const BackwardProblem* problems, int count, int64_t limit, F f) {
  return in_groups(problems, count, kernel_key<BackwardProblem>, matrix_blocks<BackwardProblem>, [&](const Group<BackwardProblem>& group) {
    return with_kernel(group.problems[0], [&](auto t, auto threads) {
      const int64_t own = limit_for(group.problems[0].p, sizeof(t), limit);
      const int64_t shared = largest(group, [&](const BackwardProblem& m) { return backward_plan<decltype(t)>(m.p, m.k, own).shared(); });
      return f(group, t, threads, group.first_block[group.count], shared);
    });
  });
}
// f(group, T(), blocks, bytes of shared memory of a block)
template <typename F>
const char* in_update_groups(const BackwardProblem* problems, int count, F f) {
  return in_groups(
      problems, count, [](const BackwardProblem& m) { return m.x.storage == Storage::float64; }, update_blocks,
      [&](const Group<BackwardProblem>& group) {
        return with_type(group.problems[0].x.storage, [&](auto t) {
          const int64_t shared = largest(group, [&](const BackwardProblem& m) { return update_shared<decltype(t)>(m.p, m.k); });
          return f(group, t, group.first_block[group.count], shared);
        });
      });
}

}  // namespace kdkernels::truncated_svd::gpu
