// Operations on the map [positions] of one sample between pooling and scattering: normalisation by
// the L2 norm or softmax, and their gradients.
#pragma once

#include <cmath>

#include "pool.h"

namespace kdkernels::attention_pool {

template <typename T>
double dot(const T* a, const T* b, int64_t count) {
  constexpr int64_t lanes = simd::kLanes<T>;
  Vec<T> total[4] = {};  // independent chains, because each addition depends on the previous one
  int64_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes)
    for (int64_t n = 0; n < 4; ++n) total[n] += simd::load(a + i + n * lanes) * simd::load(b + i + n * lanes);
  for (; i + lanes <= count; i += lanes) total[0] += simd::load(a + i) * simd::load(b + i);
  double remainder = 0;
  for (; i < count; ++i) remainder += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return remainder + static_cast<double>(simd::sum<T>((total[0] + total[1]) + (total[2] + total[3])));
}

// q = a / max(|a|, eps). If |a| <= eps, a is divided by a constant, and the gradient has no second
// term.
template <typename T>
struct L2 {
  double norm, eps;
  L2(const T* a, int64_t positions, double eps) : norm(norm_of(a, positions)), eps(eps) {}
  L2(double norm, double eps) : norm(norm), eps(eps) {}

  // If the map has tiny or huge numbers, their squares leave the range of T; the map is then
  // divided by its largest magnitude first.
  static double norm_of(const T* a, int64_t positions) {
    const double square = dot(a, a, positions);
    if (square > 1e-30 && square < 1e30) return std::sqrt(square);
    double largest = 0;
    for (int64_t s = 0; s < positions; ++s) {
      const double size = std::abs(static_cast<double>(a[s]));
      if (!(size <= largest)) largest = size;
    }
    if (largest == 0 || !std::isfinite(largest)) return largest;
    double total = 0;
    for (int64_t s = 0; s < positions; ++s) total += (a[s] / largest) * (a[s] / largest);
    return largest * std::sqrt(total);
  }
  double divisor() const { return norm > eps || norm != norm ? norm : eps; }

  void normalize(const T* a, int64_t positions, T* q) const {
    const double scale = 1 / divisor();
    for (int64_t s = 0; s < positions; ++s) q[s] = static_cast<T>(a[s] * scale);
  }
  // Computes dL/da = (G - q <q, G>) / |a| from G = dL/dq, multiplied by `factor`.
  void backward(const T* q, const T* g, int64_t positions, double factor, T* out) const {
    const T projection = norm > eps ? static_cast<T>(dot(q, g, positions)) : T(0), scale = static_cast<T>(factor / divisor());
    for (int64_t s = 0; s < positions; ++s) out[s] = (g[s] - q[s] * projection) * scale;
  }
};

template <typename T>
void softmax(const T* a, int64_t positions, T* q) {
  T largest = -std::numeric_limits<T>::infinity();
  for (int64_t s = 0; s < positions; ++s) largest = a[s] > largest || a[s] != a[s] ? a[s] : largest;
  double total = 0;
  for (int64_t s = 0; s < positions; ++s) q[s] = std::exp(a[s] - largest), total += q[s];
  for (int64_t s = 0; s < positions; ++s) q[s] = static_cast<T>(q[s] / total);
}

// Computes dL/da = q (G - <q, G>) from G = dL/dq, multiplied by `factor`.
template <typename T>
void softmax_backward(const T* q, const T* g, int64_t positions, double factor, T* out) {
  const T projection = static_cast<T>(dot(q, g, positions));
  for (int64_t s = 0; s < positions; ++s) out[s] = q[s] * (g[s] - projection) * static_cast<T>(factor);
}

}  // namespace kdkernels::attention_pool
