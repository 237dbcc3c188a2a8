// Which block of a launch does what, on either side: several problems share a launch, each with blocks of its own.
#pragma once

#include "align.h"
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

}  // namespace kdkernels::truncated_svd::gpu
