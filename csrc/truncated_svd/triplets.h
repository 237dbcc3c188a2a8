// From eigenvectors of the Gram matrix to singular triplets: the vectors of the large side, their signs, and what to do where a singular
// value vanishes.
#pragma once

#include "products.h"
#include "truncated_svd.h"

namespace kdkernels::truncated_svd {

// v and u [k, n] and [k, m], u possibly null: each pair is flipped so that the entry of largest magnitude of v, the first of equals (see
// kSignTies), is positive.
template <typename T>
void fix_signs(int64_t k, T* v, int64_t n, T* u, int64_t m) {
  auto flip = [](T* x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) x[i] = -x[i];
  };
  for (int64_t j = 0; j < k; ++j) {
    T* own = v + j * n;
    Vec<T> largest{};
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) largest = simd::max(largest, abs<T>(simd::load<T>(own + i)));
    T most = simd::largest<T>(largest);
    for (; i < n; ++i) most = std::max(most, std::abs(own[i]));
    const T least = static_cast<T>(1 - kSignTies) * most;
    int64_t first = 0;
    while (first < n && !(std::abs(own[first]) >= least)) ++first;
    if (first == n || own[first] > 0) continue;
    flip(own, n);
    if (u) flip(u + j * m, m);
  }
}

template <typename T>
void scale_vector(T* x, int64_t n, double factor) {
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<T>(x[i] * factor);
}

// Vector j of b [k, n] is made orthogonal to those before it, and of length 1. Returns how much of a vector of length 1 was left; 0: so
// little that it was rounding only.
template <typename T>
double orthogonalize(T* b, int64_t j, int64_t n) {
  T* own = b + j * n;
  double left = 1;
  for (int pass = 0; pass < 3; ++pass) {
    for (int64_t other = 0; other < j; ++other) {
      const T along = static_cast<T>(simd::dot_product(own, b + other * n, n));
      for (int64_t i = 0; i < n; ++i) own[i] -= along * b[other * n + i];
    }
    const double norm = std::sqrt(simd::dot_product(own, own, n));
    left *= norm;
    if (!(left > 1e-4)) return 0.0;
    scale_vector(own, n, 1 / norm);
    if (norm > 0.9) break;
  }
  return left;
}

// Vector j of b becomes what the first unit vector that has a part of its own has beside the vectors before.
template <typename T>
void complete(T* b, int64_t j, int64_t n) {
  const double enough = 0.5 / std::sqrt(static_cast<double>(n));
  for (int64_t unit = 0; unit < n; ++unit) {
    std::fill(b + j * n, b + (j + 1) * n, T(0));
    b[j * n + unit] = 1;
    if (orthogonalize(b, j, n) > enough) break;
  }
}

// b[j] [k, n]: W_j = M^T a_j comes in, W_j / |W_j| goes out, and |W_j| to sigma. The W_j are orthogonal but for roundings of sigma_1^2,
// which count where sigma_j is small: there they are made orthogonal to the vectors before. What that leaves little of was rounding only,
// and the first unit vector that has a part of its own takes its place.
template <typename T>
void normalize_triplets(int64_t k, T* b, int64_t n, double* sigma) {
  for (int64_t j = 0; j < k; ++j) {
    T* own = b + j * n;
    sigma[j] = std::sqrt(simd::dot_product(own, own, n));
    const bool vanishes = !(sigma[j] > 1e3 * std::numeric_limits<T>::min());
    if (!vanishes) scale_vector(own, n, 1 / sigma[j]);
    if (!vanishes && (sigma[j] > 0.5 * sigma[0] || orthogonalize(b, j, n) > 0.5)) continue;
    complete(b, j, n);
  }
}

}  // namespace kdkernels::truncated_svd
