// What the GPU kernels of truncated_svd and align_singular_vectors are told, in plain pointers. truncated_svd: matrices M = [p, q] with p
// <= q the smaller side, its vectors a [k, p], those of the larger side b [k, q].
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define KDKERNELS_BOTH __host__ __device__ constexpr
#else
#define KDKERNELS_BOTH constexpr
#endif

namespace kdkernels::truncated_svd::gpu {

// Below this share of the largest, singular values are taken from what is left of M without those above (docs/truncated_svd.md).
constexpr double kIllConditioned = 0.15;

// Entries of a vector whose magnitude is less than this share below the largest count as equal to it where the sign is fixed.
constexpr double kSignTies = 1e-4;

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

}  // namespace kdkernels::truncated_svd::gpu

namespace kdkernels::align_singular_vectors::gpu {

// Cosines whose magnitude is less than this share below the largest count as equal to it.
constexpr double kTies = 1e-6;

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

}  // namespace kdkernels::align_singular_vectors::gpu
