// Thresholds of truncated_svd and its derivative, shared by the CPU and the CUDA kernels. This
// header does not depend on torch. The Triton kernels repeat the values in
// kdkernels/triton/svd_sizes.py.
#pragma once

#include <cmath>

#include "../common/gpu.h"

namespace kdkernels::truncated_svd {

// Singular values below this fraction of the largest one are computed by a more accurate method,
// because a Gram matrix squares the condition number: in double if that is more accurate, else from
// the residual of M without the vectors that are known (docs/truncated_svd.md).
constexpr double kIllConditioned = 0.15;

// The fractions for the CPU, by the dtype of the Gram matrix. Between them and kIllConditioned,
// sigma_j is computed as |M^T a_j|, whose error does not grow; that of the triplets is about
// eps sigma_1 / (2 fraction).
template <typename T>
constexpr double kLeastRatio = sizeof(T) == 4 ? 0.1 : 0.03;

// Entries of a vector whose magnitude is below the largest by less than this fraction count as
// equal to it when the sign is fixed, because rounding decides which of two equal entries comes out
// larger. Vectors of float32 have errors of about 1e-5.
constexpr double kSignTies = 1e-4;

// The derivative treats singular values below this fraction of the largest one as zero: it replaces
// 1 / sigma by 0.
template <typename T>
constexpr double kVanishing = sizeof(T) == 4 ? 1e-6 : 1e-13;

// The squares of a matrix stay in the range of T if the trace of its Gram matrix lies between these
// bounds.
template <typename T>
constexpr double kLowestTrace = sizeof(T) == 4 ? 1e-24 : 1e-200;
template <typename T>
constexpr double kHighestTrace = sizeof(T) == 4 ? 1e34 : 1e290;

// Replaces a pivot of exactly 0 when eigenvalues are counted (Sturm counts).
template <typename T>
constexpr T kTinyPivot = sizeof(T) == 4 ? T(1e-30) : T(1e-200);

// Replaces a smaller pivot in inverse iteration. It changes the matrix by as much, so it must be far
// below the rounding error of the eigenvalues, of which the largest is between 1 / (4 p) and 1.
constexpr double kTinySolvePivot = 1e-20;

// Whether the squares of a matrix with this largest singular value leave the range of T, so that
// the matrix must be rescaled. The derivative uses this rule. The forward pass uses a stricter one,
// the trace of the Gram matrix (kLowestTrace, kHighestTrace): every matrix that it rescales is out
// of range here too.
template <typename T>
bool out_of_range(T largest) {
  constexpr T low = sizeof(T) == 4 ? T(2e-12) : T(2e-100), high = sizeof(T) == 4 ? T(1e13) : T(1e140);
  return (largest > 0 && largest < low) || largest > high;
}

// The change of sigma_j^2 that noise of size gap_eps sigma_1 in M causes. A sigma_j below gap_eps
// sigma_1 counts as gap_eps sigma_1.
KDKERNELS_HOST_DEVICE double gap_noise(double sigma_1, double sigma_j, double gap_eps) {
  const double min_sigma = gap_eps * sigma_1;
  return min_sigma * (sigma_j > min_sigma ? sigma_j : min_sigma);
}

// f(lambda_j - lambda_i) for two kept singular values, with f(x) = x / (x^2 + eps^2) and eps the
// noise of the larger one; see derivative.h.
KDKERNELS_HOST_DEVICE_INLINE double damped_inverse_gap(double lambda_1, double lambda_j, double lambda_i, double gap_eps) {
  const double eps = gap_noise(sqrt(lambda_1), sqrt(lambda_i > lambda_j ? lambda_i : lambda_j), gap_eps);
  const double gap = lambda_j - lambda_i, squares = gap * gap + eps * eps;
  return squares > 0 ? gap / squares : 0;
}

}  // namespace kdkernels::truncated_svd
