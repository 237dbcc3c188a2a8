// What the CUDA kernels of truncated_svd are told, in plain pointers, and how they are launched: no torch. Matrices M = [p, q] with p
// <= q the smaller side, its vectors a [k, p], those of the larger side b [k, q].
#pragma once

#include <cstdint>

#include "../thresholds.h"

namespace kdkernels::truncated_svd::gpu {

constexpr int kMaxSide = 1024;    // of the smaller side
constexpr int kTogether = 8;      // vectors whose factors are kept at a time
constexpr int kMaxProblems = 16;  // in one launch

enum class Storage : int { float32, float64, bfloat16, float16 };

// Matrices as they lie in memory, `batch` of them.
struct View {
  void* data;
  Storage storage;
  int64_t stride_batch, stride_p, stride_q;
};

struct ForwardProblem {
  View x;
  int64_t batch;
  int p, q, k;
  bool sign, sign_on_a;  // whether signs are fixed, and by which side
  void *a, *b, *s;       // [batch, k, p], [batch, k, q] or null, [batch, k], of the computing type
  void* state;           // [batch, state_size] or null
  void* workspace;       // [batch, workspace bytes] or null
};

struct BackwardProblem {
  View x, gradient;
  int64_t batch;
  int p, q, k;
  double gap_eps;
  const void *a, *b, *s;     // b null where gb is
  const void *ga, *gs, *gb;  // [batch, k, p], [batch, k], [batch, k, q], each or null
  const void* state;         // or null
  void* workspace;
  void* z;               // [batch, k, p]
  double* coefficients;  // [batch, coefficients(k)]
};

// The numbers of a matrix in `state`: the reflectors of Q in a packed triangle, tau, and T's diagonals, lambda in two parts, scale.
KDKERNELS_BOTH int64_t state_size(int p, int k) {
  return int64_t(p) * (p + 1) / 2 + 3 * p + 2 * k + 1;
}

// The numbers of a matrix in `coefficients`: what y_j takes of w_j, of gb_j and of b_i, the factor of the gradient, and the scale of M.
KDKERNELS_BOTH int64_t coefficients_size(int k) {
  return 2 * k + int64_t(k) * k + 2;
}

// Launches kernels for problems of one computing type, with `limit` bytes of shared memory for a block. Returns null, or what failed.
// kernels.cu has these functions for CUDA; csrc/testing/truncated_svd_host.cpp runs the same kernels' bodies on the CPU, for tests.
const char* launch_forward(const ForwardProblem* problems, int count, int64_t limit, void* stream);
const char* launch_backward(const BackwardProblem* problems, int count, int64_t limit, void* stream);

}  // namespace kdkernels::truncated_svd::gpu
