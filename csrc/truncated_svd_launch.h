// Launching the GPU kernels of truncated_svd and align_singular_vectors: plain pointers, no torch.
//
// truncated_svd.cu has these functions for CUDA; truncated_svd_host.cpp runs the same kernels' bodies on the CPU, for tests.
#pragma once

#include <cstdint>

#include "truncated_svd_cta/plan.h"

namespace kdkernels::truncated_svd::gpu {

// Problems of the same computing type, `limit` bytes of shared memory for a block. Returns null, or what failed.
const char* launch_forward(const ForwardProblem* problems, int count, int64_t limit, void* stream);
const char* launch_backward(const BackwardProblem* problems, int count, int64_t limit, void* stream);

}  // namespace kdkernels::truncated_svd::gpu

namespace kdkernels::align_singular_vectors::gpu {

const char* launch_forward(const ForwardProblem& problem, bool wide, void* stream);
const char* launch_backward(const BackwardProblem& problem, bool wide, void* stream);

}  // namespace kdkernels::align_singular_vectors::gpu
