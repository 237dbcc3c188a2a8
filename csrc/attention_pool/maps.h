// What happens to the maps [places] of one sample between pooling and scattering: norms, the loss, and the gradients of both.
#pragma once

#include <cmath>

#include "pool.h"

namespace kdkernels::attention_pool {

template <typename T>
double dot(const T* a, const T* b, int64_t count) {
  constexpr int64_t lanes = simd::kLanes<T>;
  Vec<T> total{};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) total += simd::load(a + i) * simd::load(b + i);
  double rest = 0;
  for (; i < count; ++i) rest += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return rest + static_cast<double>(simd::sum<T>(total));
}

// q = a / max(|a|, eps). Where |a| <= eps, dividing by a constant, the gradient has no second term.
template <typename T>
struct L2 {
  double norm, eps;
  L2(const T* a, int64_t places, double eps) : norm(norm_of(a, places)), eps(eps) {}
  L2(double norm, double eps) : norm(norm), eps(eps) {}

  // The squares of a map of tiny or huge numbers leave the range of T: then the map is scaled by its largest.
  static double norm_of(const T* a, int64_t places) {
    const double square = dot(a, a, places);
    if (square > 1e-30 && square < 1e30) return std::sqrt(square);
    double largest = 0;
    for (int64_t s = 0; s < places; ++s) {
      const double size = std::abs(static_cast<double>(a[s]));
      if (!(size <= largest)) largest = size;
    }
    if (largest == 0 || !std::isfinite(largest)) return largest;
    double total = 0;
    for (int64_t s = 0; s < places; ++s) total += (a[s] / largest) * (a[s] / largest);
    return largest * std::sqrt(total);
  }
  double divisor() const { return norm > eps || norm != norm ? norm : eps; }

  void normalize(const T* a, int64_t places, T* q) const {
    const double scale = 1 / divisor();
    for (int64_t s = 0; s < places; ++s) q[s] = static_cast<T>(a[s] * scale);
  }
  // dL/da = (G - q <q, G>) / |a| from G = dL/dq, times `factor`.
  void backward(const T* q, const T* g, int64_t places, double factor, T* out) const {
    const T along = norm > eps ? static_cast<T>(dot(q, g, places)) : T(0), scale = static_cast<T>(factor / divisor());
    for (int64_t s = 0; s < places; ++s) out[s] = (g[s] - q[s] * along) * scale;
  }
};

template <typename T>
void softmax(const T* a, int64_t places, T* q) {
  T largest = -std::numeric_limits<T>::infinity();
  for (int64_t s = 0; s < places; ++s) largest = a[s] > largest || a[s] != a[s] ? a[s] : largest;
  double total = 0;
  for (int64_t s = 0; s < places; ++s) q[s] = std::exp(a[s] - largest), total += q[s];
  for (int64_t s = 0; s < places; ++s) q[s] = static_cast<T>(q[s] / total);
}

// dL/da = q (G - <q, G>) from G = dL/dq, times `factor`.
template <typename T>
void softmax_backward(const T* q, const T* g, int64_t places, double factor, T* out) {
  const T along = static_cast<T>(dot(q, g, places));
  for (int64_t s = 0; s < places; ++s) out[s] = q[s] * (g[s] - along) * static_cast<T>(factor);
}

}  // namespace kdkernels::attention_pool
