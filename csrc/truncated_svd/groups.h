// Distributes the stages of a batch over threads.
#pragma once

#include "../common/parallel.h"
#include "lanes.h"

namespace kdkernels::truncated_svd {

// Runs three stages over a batch: `before` and `after` for every matrix, `solve` for every group.
// If there are enough groups, or if buffers for all of them would take too much memory (`bytes`
// each), a thread runs all stages of a group, so that its data stay in the cache. Otherwise the
// matrices or groups of each stage are distributed over the threads anew. make_workspace() creates
// the working memory of a thread, make_buffers(n) the buffers of n groups. before_reads: whether
// `before` reads the matrices.
template <typename MakeBuffers, typename MakeWorkspace, typename Before, typename Group, typename After>
void for_each_group(int64_t batch, int64_t group, int64_t bytes, bool before_reads, MakeBuffers&& make_buffers,
                    MakeWorkspace&& make_workspace, Before&& before, Group&& solve, After&& after) {
  const int64_t groups = (batch + group - 1) / group, threads = at::get_num_threads();
  if (groups >= 4 * threads || groups % threads == 0 || groups * bytes > (int64_t(1) << 28)) {
    auto make_state = [&] { return std::pair(make_buffers(1), make_workspace()); };
    parallel_for(0, groups, 1, make_state, [&](auto& state, int64_t begin, int64_t end) {
      auto& [buffers, workspace] = state;
      for (int64_t g = begin; g < end; ++g) {
        const int64_t last = std::min((g + 1) * group, batch);
        for (int64_t b = g * group; b < last; ++b) before(buffers, workspace, b, b - g * group);
        solve(buffers, workspace, g, 0, last - g * group);
        // The last matrices first if they are still in the cache, else in the order in which a
        // processor prefetches them.
        for (int64_t b = g * group; b < last; ++b) {
          const int64_t next = before_reads ? last - 1 - (b - g * group) : b;
          after(buffers, workspace, next, next - g * group);
        }
      }
    });
    return;
  }
  auto buffers = make_buffers(groups);
  auto each_sample = [&](auto&& stage) {
    parallel_for(0, batch, 1, make_workspace, [&](auto& workspace, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) stage(buffers, workspace, b, b);
    });
  };
  each_sample(before);
  parallel_for(0, groups, 1, make_workspace, [&](auto& workspace, int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) solve(buffers, workspace, g, g, std::min(group, batch - g * group));
  });
  each_sample(after);
}

}  // namespace kdkernels::truncated_svd
