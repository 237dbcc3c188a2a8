// The launch of the CUDA kernel of temperature_kl.
#pragma once

namespace kdkernels::temperature_kl::gpu {

struct LongRows;

// Runs the kernel of long_rows.h and returns an error message, or null. The dtype of the rows is
// float32 or bfloat16. `ranks` are the blocks of a cluster, each with `threads` threads.
const char* launch_long_rows(const LongRows& p, bool is_float, int threads, int ranks, int multiprocessors, void* stream);

}  // namespace kdkernels::temperature_kl::gpu
