// The numbers that decide in truncated_svd and its derivative, the same on the CPU and in the CUDA kernels: no torch, nothing but numbers.
// The Triton kernels repeat them in kdkernels/triton/svd_sizes.py.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define KDKERNELS_BOTH __host__ __device__ constexpr
#define KDKERNELS_BOTH_INLINE __host__ __device__ inline  // for what is not constexpr: it takes square roots
#else
#define KDKERNELS_BOTH constexpr
#define KDKERNELS_BOTH_INLINE inline
#endif

namespace kdkernels::truncated_svd {

// Gram matrices square the condition: below this share of the largest singular value a result is taken from a more exact method: double
// where that is more exact, else what is left of M without the vectors that are known (docs/truncated_svd.md).
constexpr double kIllConditioned = 0.15;

// Entries of a vector whose magnitude is less than this share below the largest count as equal to it where the sign is fixed: which of two
// equal entries comes out larger is decided by rounding. Vectors of float32 have errors of some 1e-5.
constexpr double kSignTies = 1e-4;

// Singular values below this share of the largest are zero to the derivative: 1 / sigma is left out.
template <typename T>
constexpr double kNull = sizeof(T) == 4 ? 1e-6 : 1e-13;

// Traces of Gram matrices whose squares stay in the range of T lie between these.
template <typename T>
constexpr double kLowestTrace = sizeof(T) == 4 ? 1e-24 : 1e-200;
template <typename T>
constexpr double kHighestTrace = sizeof(T) == 4 ? 1e34 : 1e290;

// Takes the place of a pivot of exactly 0 where eigenvalues are counted (Sturm counts).
template <typename T>
constexpr T kTinyPivot = sizeof(T) == 4 ? T(1e-30) : T(1e-200);

// Whether squares of a matrix with this largest singular value leave the range of T, so that it is taken in a unit of its own. This is the
// derivative's rule; the forward's, by the trace of the Gram matrix (kLowestTrace, kHighestTrace), is stricter, so that every matrix it
// takes so is here.
template <typename T>
bool out_of_range(T largest) {
  constexpr T low = sizeof(T) == 4 ? T(2e-12) : T(2e-100), high = sizeof(T) == 4 ? T(1e13) : T(1e140);
  return (largest > 0 && largest < low) || largest > high;
}

// What a noise of gap_eps sigma_1 in M does to sigma_j^2, with no sigma_j below gap_eps sigma_1.
KDKERNELS_BOTH double gap_noise(double sigma_1, double sigma_j, double gap_eps) {
  const double least = gap_eps * sigma_1;
  return least * (sigma_j > least ? sigma_j : least);
}

// f(lambda_j - lambda_i) between two kept values, f(x) = x / (x^2 + eps^2), eps the noise of the larger one; see derivative.h.
KDKERNELS_BOTH_INLINE double damped_inverse_gap(double lambda_1, double lambda_j, double lambda_i, double gap_eps) {
  const double eps = gap_noise(sqrt(lambda_1), sqrt(lambda_i > lambda_j ? lambda_i : lambda_j), gap_eps);
  const double gap = lambda_j - lambda_i, squares = gap * gap + eps * eps;
  return squares > 0 ? gap / squares : 0;
}

}  // namespace kdkernels::truncated_svd
