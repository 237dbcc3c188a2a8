// From eigenvectors of the Gram matrix to singular triplets: the vectors of the large side, their signs, and what to do where a singular
// value vanishes.
#pragma once

#include "products.h"

namespace kdkernels::truncated_svd {

// v and u [k, n] and [k, m], u possibly null: each pair is flipped so that the entry of largest magnitude of v, the first of equals, is
// positive.
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
    int64_t first = 0;
    while (first < n && std::abs(own[first]) != most) ++first;
    if (first == n || own[first] > 0) continue;
    flip(own, n);
    if (u) flip(u + j * m, m);
  }
}

// b[j] [k, n]: W_j = M^T a_j comes in, W_j / |W_j| goes out, and |W_j| to sigma. Where that is nothing beside the largest, its direction
// is rounding: the part that is orthogonal to the vectors before it is taken, or else that of the first unit vector that has one.
template <typename T>
void normalize_triplets(int64_t k, T* b, int64_t n, int64_t length, double* sigma) {
  auto dot = [&](const T* x, const T* y) {
    Vec<T> sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes<T> <= length; i += 4 * kLanes<T>)
      for (int c = 0; c < 4; ++c) sum[c] += simd::load<T>(x + i + c * kLanes<T>) * simd::load<T>(y + i + c * kLanes<T>);
    double total = simd::sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < length; ++i) total += static_cast<double>(x[i]) * y[i];
    return total;
  };
  auto scale = [&](T* x, double factor) {
    for (int64_t i = 0; i < length; ++i) x[i] = static_cast<T>(x[i] * factor);
  };
  auto orthogonalize = [&](int64_t j) {  // twice, and to length 1; returns the length that was left the first time
    T* own = b + j * n;
    double left = 0;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t other = 0; other < j; ++other) {
        const double along = dot(own, b + other * n);
        for (int64_t i = 0; i < length; ++i) own[i] -= static_cast<T>(along * b[other * n + i]);
      }
      const double norm = std::sqrt(dot(own, own));
      if (pass == 0) left = norm;
      if (!(norm > 0)) return 0.0;
      scale(own, 1 / norm);
    }
    return left;
  };
  constexpr double null = sizeof(T) == 4 ? 1e-5 : 1e-12;
  for (int64_t j = 0; j < k; ++j) {
    T* own = b + j * n;
    sigma[j] = std::sqrt(dot(own, own));
    if (sigma[j] > null * sigma[0]) {
      scale(own, 1 / sigma[j]);
      continue;
    }
    if (sigma[j] > std::numeric_limits<T>::min()) {
      scale(own, 1 / sigma[j]);
      if (orthogonalize(j) > 0.5) continue;
    }
    for (int64_t unit = 0; unit < length; ++unit) {
      std::fill(own, own + length, T(0));
      own[unit] = 1;
      if (orthogonalize(j) > 1 / (2 * std::sqrt(static_cast<double>(length)))) break;
    }
  }
}

}  // namespace kdkernels::truncated_svd
