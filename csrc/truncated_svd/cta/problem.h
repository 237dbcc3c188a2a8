// The arguments of the CUDA kernels of truncated_svd, as plain pointers, and the functions that
// launch them. This header does not depend on torch. M is p x q, with p <= q the smaller side; the
// vectors of the smaller side are a [k, p], those of the larger side b [k, q].
#pragma once

#include <cstdint>

#include "../thresholds.h"

namespace kdkernels::truncated_svd::gpu {

constexpr int kMaxSide = 1024;  // length of the smaller side
// Vectors whose elimination factors are in memory at the same time.
constexpr int kVectorsAtOnce = 8;
constexpr int kMaxProblems = 16;  // per launch

enum class Storage : int { float32, float64, bfloat16, float16 };

// `batch` matrices in memory.
struct View {
  void* data;
  Storage storage;
  int64_t stride_batch, stride_p, stride_q;
};

struct ForwardProblem {
  View x;
  int64_t batch;
  int p, q, k;
  bool sign, sign_on_a;  // whether signs are fixed, and whether the a (or else the b) decide
  // [batch, k, p], [batch, k, q] or null, and [batch, k], in the dtype of the computation.
  void *a, *b, *s;
  void* state;      // [batch, state_size] or null
  void* workspace;  // [batch, workspace bytes] or null
};

struct BackwardProblem {
  View x, gradient;
  int64_t batch;
  int p, q, k;
  double gap_eps;
  const void *a, *b, *s;     // b is null if gb is null
  const void *ga, *gs, *gb;  // [batch, k, p], [batch, k], [batch, k, q], each or null
  const void* state;         // or null
  void* workspace;
  void* z;               // [batch, k, p]
  double* coefficients;  // [batch, coefficients_size(k)]
};

// The number of values per matrix in `state`: the reflectors of Q in a packed triangle, tau, the
// diagonals of T, lambda in two parts, and scale.
KDKERNELS_HOST_DEVICE int64_t state_size(int p, int k) {
  return int64_t(p) * (p + 1) / 2 + 3 * p + 2 * k + 1;
}

// The number of values per matrix in `coefficients`: the factors of w_j, of gb_j and of b_i in y_j,
// the factor of the gradient, and the scale of M.
KDKERNELS_HOST_DEVICE int64_t coefficients_size(int k) {
  return 2 * k + int64_t(k) * k + 2;
}

// Launch the kernels for some problems, with `limit` bytes of shared memory for a block. Return
// null, or an error message. kernels.cu defines these functions for CUDA;
// csrc/testing/truncated_svd_host.cpp runs the bodies of the same kernels on the CPU, for tests.
const char* launch_forward(const ForwardProblem* problems, int count, int64_t limit, void* stream);
const char* launch_backward(const BackwardProblem* problems, int count, int64_t limit, void* stream);

}  // namespace kdkernels::truncated_svd::gpu
