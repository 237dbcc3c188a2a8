// The less common forms of the divergence, optimised for accuracy rather than speed: with
// target_eps, without the teacher's entropy, or with the derivative with respect to the
// temperature. With p = softmax(b / T), q = softmax(o / T):
//     V = sum_j (p + eps) (log(p + eps) - log q)     or, without entropy,     V = -sum_j (p + eps) log q
//     dV / d(o/T) = (q - p) + eps (C q - 1)
//     dV / d(b/T) = p (a - E_p[a]),  a = log(p + eps) - log q   or   a = -log q
//     dV / dT     = -1/T sum_j (dV / d(o/T) o/T + dV / d(b/T) b/T)
// Each V is KL(b || o) plus terms that are added without cancellation.
#pragma once

#include "divergence.h"

namespace kdkernels::temperature_kl {

template <typename T>
struct Form {
  T eps;
  bool entropy;
  T classes;
};

// The value V and the S of dV / dT = -S / T; both must still be multiplied by `remaining_factor`. S
// is stored multiplied by kDerivativeUnit, so that its sum does not overflow if its terms are
// logits near the end of the range of T: d(T^2 V) / dT = 2 T V - T S may be in the range even if S
// or 2 V is not.
template <typename T>
struct ValueAndDerivative {
  Vec<T> value, temperature_derivative, remaining_factor;
};

constexpr float kDerivativeUnit = 0x1p-12f;

// Computes one tile of these forms. base_out and other_out may be null. Logarithms are computed in
// units of the logits and divided by T at the end (see Divergence::logit_factor).
template <typename T, typename Reduce>
ValueAndDerivative<T> general_form(const Divergence<T>& s, const Source<T>& base, const Source<T>& other, const T* weights,
                                   const T* difference, Form<T> form, Vec<T> scale, bool gradients, const Sink<T>* base_out,
                                   const Sink<T>* other_out) {
  constexpr int lanes = simd::kLanes<T>;
  const int64_t n = base.vectors();
  const Vec<T> inv_z = T(1) / s.z, log_z = simd::log<T>(s.z), zero{}, zero_gradient = s.zero_gradient(), t = s.temperature;
  const Vec<T> other_shift = s.other_shift(log_z) * t;
  const Vec<T> to_logits = t * s.remaining_factor;  // from the units of s.mean, s.drift and s.kl
  const Vec<T> mean = s.mean * to_logits, drift = s.drift * to_logits;
  const T eps = form.eps, unit = T(kDerivativeUnit);  // V is also multiplied by it, so that the terms of eps cannot overflow

  // log(1 + eps / p), computed by whichever formula does not cancel
  auto log1p_eps_over_p = [&](Vec<T> p, Vec<T> v) {
    return select<T>(p > eps, simd::log1p<T>(eps / p), simd::log<T>(p + eps) - (v - log_z));
  };

  Vec<T> mean_v{}, mean_log1p{}, eps_sum{};  // T (E_p[log p] + log z), T E_p[log(1 + eps/p)], the terms of eps in T V
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> p = simd::load<T>(weights + j * lanes) * inv_z, v = base[j] - s.base_max;
    const Mask<T> zero_probability = p == T(0);
    mean_v += select<T>(zero_probability, zero, p * v);
    if (eps > 0) {
      const Vec<T> log_q = (other[j] - s.base_max) + other_shift;
      const Vec<T> log1p_term = select<T>(zero_probability, zero, p * log1p_eps_over_p(p, v * s.inv_t) * t);
      mean_log1p += log1p_term;
      const Vec<T> eps_term = form.entropy ? log1p_term + eps * (simd::log<T>(p + eps) * t - log_q) : -eps * log_q;
      eps_sum += select<T>(base.valid_lanes(j), eps_term * unit, zero);
    }
  }
  mean_v = Reduce::template sum<T>(mean_v);
  mean_log1p = Reduce::template sum<T>(mean_log1p);
  ValueAndDerivative<T> result{s.kl * (to_logits * unit) + Reduce::template sum<T>(eps_sum), zero, s.inv_t / unit};
  if (!form.entropy) result.value += (log_z * t - mean_v) * unit;

  const Vec<T> inv_other = inv_z / (T(1) + s.w);
  for (int64_t j = 0; gradients && j < n; ++j) {
    const Vec<T> weight = simd::load<T>(weights + j * lanes), p = weight * inv_z, v = base[j] - s.base_max;
    const Mask<T> zero_probability = p == T(0);
    Vec<T> other_grad = (simd::load<T>(difference + j * lanes) - s.w * weight) * inv_other;  // q - p
    if (eps > 0) other_grad += select<T>(base.valid_lanes(j), eps * (form.classes * (p + other_grad) - T(1)), zero);
    Vec<T> a = (base[j] - other[j]) - mean - drift;
    if (!form.entropy) a -= v - mean_v;
    if (form.entropy && eps > 0) a += log1p_eps_over_p(p, v * s.inv_t) * t - mean_log1p;
    const Vec<T> base_grad = select<T>(zero_probability, zero_gradient, p * a);
    if (other_out) other_out->write(j, other_grad * scale);
    if (base_out) base_out->write(j, base_grad * (scale * s.inv_t));
    result.temperature_derivative += select<T>(other_grad == T(0), zero, other_grad * T(kDerivativeUnit) * (other[j] - s.base_max)) +
                                     select<T>(zero_probability, zero, base_grad * T(kDerivativeUnit) * (v * s.inv_t));
  }
  result.temperature_derivative = Reduce::template sum<T>(result.temperature_derivative) * unit;
  return result;
}

}  // namespace kdkernels::temperature_kl
