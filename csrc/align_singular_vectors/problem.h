// What the CUDA kernels of align_singular_vectors are told, in plain pointers, and how they are launched: no torch.
#pragma once

#include <cstdint>

namespace kdkernels::align_singular_vectors {

// Cosines whose magnitude is less than this share below the largest count as equal to it, and the first of equals is taken: which of two
// equal ones comes out larger is decided by rounding.
constexpr double kTies = 1e-6;

namespace gpu {

// student [batch, many, n], teacher [batch, k, n], weight [batch, k] or null, all of the computing type.
struct ForwardProblem {
  int64_t batch;
  int many, k, n;
  bool flip_teacher;
  const void *student, *teacher, *weight;
  void *out_student, *out_teacher, *flips;  // [batch, k, n], [batch, k, n], [batch, k]
  int64_t* match;                           // [batch, k]
};

struct BackwardProblem {
  int64_t batch;
  int many, k, n;
  bool flip_teacher;
  const void *grad_student, *grad_teacher;    // [batch, k, n], each or null
  const void *student, *teacher, *weight;     // as in the forward; the first two null unless to_weight is asked for
  const void* flips;                          // [batch, k]
  const int64_t* match;                       // [batch, k]
  void *to_student, *to_teacher, *to_weight;  // [batch, many, n], [batch, k, n], [batch, k], each or null
};

// One problem in double (wide) or in float. Returns null, or what failed. kernels.cu has these functions for CUDA;
// csrc/testing/truncated_svd_host.cpp runs the same kernels' bodies on the CPU, for tests.
const char* launch_forward(const ForwardProblem& problem, bool wide, void* stream);
const char* launch_backward(const BackwardProblem& problem, bool wide, void* stream);

}  // namespace gpu
}  // namespace kdkernels::align_singular_vectors
