// Operations on the map [positions] of one sample between pooling and scattering: normalisation by
// the L2 norm or softmax, and their gradients.
#pragma once

#include <array>
#include <cmath>

#include "pool.h"

namespace kdkernels::attention_pool {

// A sum of products that is collected part by part. The result does not depend on the parts, if all of
// them but the last are multiples of kBlock.
template <typename T>
class DotProduct {
 public:
  static constexpr int64_t lanes = simd::kLanes<T>, chains = 4;  // independent, because each addition depends on the previous one
  static constexpr int64_t kBlock = 16 * chains * lanes;

  KDKERNELS_INLINE void add(const T* a, const T* b, int64_t count) {
    int64_t i = 0;
    for (; i + chains * lanes <= count; i += chains * lanes)
      for (int64_t n = 0; n < chains; ++n) total_[n] += simd::load(a + i + n * lanes) * simd::load(b + i + n * lanes);
    for (; i + lanes <= count; i += lanes) total_[0] += simd::load(a + i) * simd::load(b + i);
    for (; i < count; ++i) remainder_ += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  }
  double value() const { return remainder_ + static_cast<double>(simd::sum<T>((total_[0] + total_[1]) + (total_[2] + total_[3]))); }

 private:
  Vec<T> total_[chains] = {};
  double remainder_ = 0;
};

template <typename T>
double dot(const T* a, const T* b, int64_t count) {
  DotProduct<T> result;
  result.add(a, b, count);
  return result.value();
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
    if (is_in_range(square)) return std::sqrt(square);
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
  static bool is_in_range(double square) { return square > 1e-30 && square < 1e30; }
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

// Computes d = as / divisor_s - at / divisor_t, the difference of the normalised maps of student and
// teacher, and returns |d|. The maps whose gradient is wanted are normalised in place. If neither is, d
// is not stored either, unless its squares leave the range of T.
template <typename T>
double difference_norm(T* as, T* at, double divisor_s, double divisor_t, int64_t positions, std::array<bool, 2> wanted, T* d) {
  const double inverse[2] = {1 / divisor_s, 1 / divisor_t};
  T* const maps[2] = {as, at};
  T blocks[2][DotProduct<T>::kBlock];
  // Both quotients are rounded before they are subtracted: fused with a product, the difference of equal
  // maps would be a rounding error instead of 0.
  auto subtract = [&](int64_t first, int64_t count, T* to) {
    if constexpr (std::is_same_v<T, double>) {
      if (!wanted[0] && !wanted[1] && count % simd::kLanes<T> == 0) {
        for (int64_t s = 0; s < count; s += simd::kLanes<T>) {
          const Vec<T> q_s = simd::load(as + first + s) * inverse[0], q_t = simd::load(at + first + s) * inverse[1];
          simd::store<T>(to + s, simd::rounded<T>(q_s) - simd::rounded<T>(q_t));
        }
        return;
      }
    }
    T* const q[2] = {wanted[0] ? as + first : blocks[0], wanted[1] ? at + first : blocks[1]};
    for (int i = 0; i < 2; ++i)
#pragma GCC ivdep
      for (int64_t s = 0; s < count; ++s) q[i][s] = static_cast<T>(maps[i][first + s] * inverse[i]);
    for (int64_t s = 0; s < count; ++s) to[s] = q[0][s] - q[1][s];
  };
  auto for_each_block = [&](auto&& body) {
    for (int64_t first = 0; first < positions; first += DotProduct<T>::kBlock)
      body(first, std::min(positions - first, DotProduct<T>::kBlock));
  };
  const bool keeps_d = wanted[0] || wanted[1];
  DotProduct<T> square;
  T block[DotProduct<T>::kBlock];
  for_each_block([&](int64_t first, int64_t count) {
    T* const to = keeps_d ? d + first : block;
    subtract(first, count, to);
    square.add(to, to, count);
  });
  if (L2<T>::is_in_range(square.value())) return std::sqrt(square.value());
  if (!keeps_d) for_each_block([&](int64_t first, int64_t count) { subtract(first, count, d + first); });
  return L2<T>::norm_of(d, positions);
}

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
