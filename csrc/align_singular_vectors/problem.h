// The arguments of the CUDA kernels of align_singular_vectors, as plain pointers, and the functions
// that launch them. This header does not depend on torch.
#pragma once

#include <cstdint>

namespace kdkernels::align_singular_vectors {

// Cosines whose magnitude is below the largest by less than this fraction count as equal to it,
// because rounding decides which of two equal cosines comes out larger. The first of equal cosines
// is chosen.
constexpr double kTies = 1e-6;

namespace gpu {

// student [batch, student_k, n], teacher [batch, k, n], weight [batch, k] or null, all in the dtype
// of the computation.
struct ForwardProblem {
  int64_t batch;
  int student_k, k, n;
  bool flip_teacher;
  const void *student, *teacher, *weight;
  void *out_student, *out_teacher, *flips;  // [batch, k, n], [batch, k, n], [batch, k]
  int64_t* match;                           // [batch, k]
};

// grad_...: the upstream gradients; result_...: the gradients with respect to student, teacher and
// weight. Each of them may be null. student and teacher may be null if result_weight is null.
struct BackwardProblem {
  int64_t batch;
  int student_k, k, n;
  bool flip_teacher;
  const void *grad_student, *grad_teacher;                // [batch, k, n]
  const void *student, *teacher, *weight;                 // as in the forward pass
  const void* flips;                                      // [batch, k]
  const int64_t* match;                                   // [batch, k]
  void *result_student, *result_teacher, *result_weight;  // [batch, student_k, n], [batch, k, n], [batch, k]
};

// Launch the kernel for a problem, in double if is_double, else in float. Return null, or an error
// message. kernels.cu defines these functions for CUDA; csrc/testing/truncated_svd_host.cpp runs
// the bodies of the same kernels on the CPU, for tests.
const char* launch_forward(const ForwardProblem& problem, bool is_double, void* stream);
const char* launch_backward(const BackwardProblem& problem, bool is_double, void* stream);

}  // namespace gpu
}  // namespace kdkernels::align_singular_vectors
