// The launch of the CUDA kernel of temperature_kl.
#pragma once

#include <cstdint>

namespace kdkernels::temperature_kl::gpu {

struct LongRows;

struct LaunchLimits {
  int64_t shared_memory;  // bytes that a block can use
  int multiprocessors;
  void* stream;
};

// Runs the kernel of long_rows.h and returns an error message, or null. The dtype of the rows is
// float32 or bfloat16. `ranks` are the blocks of a cluster, each with `threads` threads. `launched`
// becomes false if the GPU, or the part of it that is visible, has no room for such a cluster.
const char* launch_long_rows(const LongRows& p, bool is_float, int threads, int ranks, const LaunchLimits& limits, bool* launched);

}  // namespace kdkernels::temperature_kl::gpu
