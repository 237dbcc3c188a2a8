// The k largest eigenvalues of symmetric tridiagonal matrices in lanes, by bisection with Sturm counts.
//
// The pivots q_i = d_i - x - e_{i-1}^2 / q_{i-1} of T - x I = L D L^T have as many positive ones as T has eigenvalues above x (Sylvester's
// law of inertia). Bisection needs no start, no gap and no test of convergence: a fixed number of halvings gives the rounding of T's norm.
//
// W. Barth, R. S. Martin, J. H. Wilkinson. Calculation of the Eigenvalues of a Symmetric Tridiagonal Matrix by the Method of Bisection.
// Numerische Mathematik 9, 1967.
#pragma once

#include "lanes.h"

namespace kdkernels::truncated_svd {

// For N shifts at once, which keeps the divisions busy: how many eigenvalues lie above each.
template <typename T, int N>
KDKERNELS_INLINE void count_above(int64_t p, const Vec<T>* d, const Vec<T>* e2, const Vec<T>* x, Mask<T>* count) {
  constexpr T tiny = sizeof(T) == 4 ? T(1e-30) : T(1e-200);
  Vec<T> pivot[N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    count[j] = Mask<T>{};
    pivot[j] = simd::splat<T>(1);
  }
  for (int64_t i = 0; i < p; ++i) {
    const Vec<T> coupling = e2[i];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) {
      pivot[j] = d[i] - x[j] - coupling / pivot[j];
      pivot[j] = pivot[j] == T(0) ? simd::splat<T>(-tiny) : pivot[j];
      count[j] -= pivot[j] > T(0);  // a true lane is -1
    }
  }
}

// d [p]; e2 [p]: the squares of e, shifted by one, so that e2[0] = 0. lambda [k], descending, for eigenvalues in [low, high].
template <typename T>
void largest_eigenvalues(int64_t p, const Vec<T>* d, const Vec<T>* e2, Vec<T> low, Vec<T> high, int64_t k, Vec<T>* lambda) {
  constexpr int halvings = std::numeric_limits<T>::digits + 2;
  constexpr int together = 4;
  for (int64_t first = 0; first < k; first += together) {
    Vec<T> lower[together], upper[together], middle[together];
    for (int j = 0; j < together; ++j) lower[j] = low, upper[j] = high;
    for (int step = 0; step < halvings; ++step) {
      Mask<T> count[together];
      for (int j = 0; j < together; ++j) middle[j] = T(0.5) * (lower[j] + upper[j]);
      if (k - first >= 3)
        count_above<T, 4>(p, d, e2, middle, count);
      else if (k - first == 2)
        count_above<T, 2>(p, d, e2, middle, count);
      else
        count_above<T, 1>(p, d, e2, middle, count);
      for (int64_t j = 0; j < std::min<int64_t>(together, k - first); ++j) {
        const Mask<T> above = count[j] > static_cast<typename simd::IntOf<T>::type>(first + j);
        lower[j] = above ? middle[j] : lower[j];
        upper[j] = above ? upper[j] : middle[j];
      }
    }
    for (int64_t j = 0; j < std::min<int64_t>(together, k - first); ++j) lambda[first + j] = T(0.5) * (lower[j] + upper[j]);
  }
}

}  // namespace kdkernels::truncated_svd
