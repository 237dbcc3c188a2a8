// Computes singular triplets from eigenvectors of the Gram matrix: the vectors of the larger side,
// their signs, and vectors for singular values that vanish.
#pragma once

#include "products.h"
#include "truncated_svd.h"

namespace kdkernels::truncated_svd {

// Fixes the signs of the vectors v [k, n] and u [k, m]; u may be null. Flips each pair so that the
// entry of v with the largest magnitude is positive. Among equal magnitudes (see kSignTies) the
// first entry decides.
template <typename T>
void fix_signs(int64_t k, T* v, int64_t n, T* u, int64_t m) {
  auto flip = [](T* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] = -x[i];
  };
  for (int64_t j = 0; j < k; ++j) {
    T* vector = v + j * n;
    Vec<T> largest{};
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) largest = simd::max(largest, abs<T>(simd::load<T>(vector + i)));
    T max_magnitude = simd::largest<T>(largest);
    for (; i < n; ++i) max_magnitude = std::max(max_magnitude, std::abs(vector[i]));
    const T threshold = static_cast<T>(1 - kSignTies) * max_magnitude;
    int64_t first = 0;
    while (first + kLanes<T> <= n && !simd::any(abs<T>(simd::load<T>(vector + first)) >= threshold)) first += kLanes<T>;
    while (first < n && !(std::abs(vector[first]) >= threshold)) ++first;
    if (first == n || vector[first] > 0) continue;
    flip(vector, n);
    if (u) flip(u + j * m, m);
  }
}

template <typename T>
void scale_vector(T* x, int64_t n, double factor) {
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(x[i] * factor);
}

// Makes vector j of b [k, n], which has length 1, orthogonal to the vectors before it, and scales
// it to length 1 again. Returns the length that remained before the scaling, or 0 if so little
// remained that it consists of rounding errors.
template <typename T>
double orthogonalize(T* b, int64_t j, int64_t n) {
  T* vector = b + j * n;
  double remaining = 1;
  for (int pass = 0; pass < 3; ++pass) {
    for (int64_t other = 0; other < j; ++other) {
      const T projection = static_cast<T>(simd::dot_product(vector, b + other * n, n));
      for (int64_t i = 0; i < n; ++i) vector[i] -= projection * b[other * n + i];
    }
    const double norm = std::sqrt(simd::dot_product(vector, vector, n));
    remaining *= norm;
    if (!(remaining > 1e-4)) return 0.0;
    scale_vector(vector, n, 1 / norm);
    if (norm > 0.9) break;
  }
  return remaining;
}

// Replaces vector j of b by a vector that is orthogonal to the vectors before it: the first unit
// vector from number `unit` on that is not nearly in their span, made orthogonal to them. `unit`
// becomes the number of the next one. The unit vectors before it need not be tried again: what
// remains of them outside of the span only decreases.
template <typename T>
void complete_basis(T* b, int64_t j, int64_t n, int64_t& unit) {
  const double min_remaining = 0.5 / std::sqrt(static_cast<double>(n));
  while (unit < n) {
    std::fill(b + j * n, b + (j + 1) * n, T(0));
    b[j * n + unit++] = 1;
    if (orthogonalize(b, j, n) > min_remaining) break;
  }
}

// sigma_j = |W_j| for the rows W_j of w [k, n].
template <typename T>
void compute_lengths(int64_t k, const T* w, int64_t n, double* sigma) {
  for (int64_t j = 0; j < k; ++j) sigma[j] = std::sqrt(simd::dot_product(w + j * n, w + j * n, n));
}

// Replaces W_j = M^T a_j, vector j of b [k, n], by W_j / |W_j|, and writes |W_j| to sigma. The W_j
// are orthogonal up to rounding errors of sigma_1^2, which matter if sigma_j is small. Such a W_j
// is made orthogonal to the vectors before it. If little of it remains, it consisted of rounding
// errors, and complete_basis() replaces it.
template <typename T>
void normalize_triplets(int64_t k, T* b, int64_t n, double* sigma) {
  int64_t unit = 0;
  for (int64_t j = 0; j < k; ++j) {
    T* vector = b + j * n;
    sigma[j] = std::sqrt(simd::dot_product(vector, vector, n));
    const bool vanishes = !(sigma[j] > 1e3 * std::numeric_limits<T>::min());
    if (!vanishes) scale_vector(vector, n, 1 / sigma[j]);
    if (!vanishes && (sigma[j] > 0.5 * sigma[0] || orthogonalize(b, j, n) > 0.5)) continue;
    complete_basis(b, j, n, unit);
  }
}

}  // namespace kdkernels::truncated_svd
