// The less common forms of the divergence, written for exactness rather than speed: a target epsilon, the value without the teacher's
// entropy, and the derivative with respect to the temperature. With p = softmax(b / T), q = softmax(o / T):
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

// V, and S of dV / dT = -S / T, both to be multiplied by `rest`. S is kept times kSlopeUnit, so that its sum has room where its terms are
// logits near the end of the range of T: d(T^2 V) / dT = 2 T V - T S may be in the range where S or 2 V is not.
template <typename T>
struct ValueAndSlope {
  Vec<T> value, slope, rest;
};

constexpr float kSlopeUnit = 0x1p-12f;

// base_out and other_out may be null. Logarithms are formed in units of the logits and divided by T at the end (see Divergence::unit).
template <typename T, typename Reduce>
ValueAndSlope<T> general_form(const Divergence<T>& s, const Source<T>& base, const Source<T>& other, const T* e, const T* gap, Form<T> form,
                              Vec<T> scale, bool gradients, const Sink<T>* base_out, const Sink<T>* other_out) {
  constexpr int lanes = simd::kLanes<T>;
  const int64_t n = base.vectors();
  const Vec<T> inv_z = T(1) / s.z, log_z = simd::log<T>(s.z), zero{}, t = s.temperature;
  const Vec<T> other_shift = s.other_shift(log_z) * t;
  const Vec<T> to_logits = t * s.rest;  // from the units of s.mean, s.drift and s.kl
  const Vec<T> mean = s.mean * to_logits, drift = s.drift * to_logits;
  const T eps = form.eps, unit = T(kSlopeUnit);  // V too is kept times the unit: what eps adds has room

  // log(1 + eps / p), from whichever side does not cancel
  auto log_lift = [&](Vec<T> p, Vec<T> v) { return select<T>(p > eps, simd::log1p<T>(eps / p), simd::log<T>(p + eps) - (v - log_z)); };

  Vec<T> mean_v{}, mean_lift{}, extra{};  // T (E_p[log p] + log z), T E_p[log(1 + eps/p)], what eps adds to T V
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> p = simd::load<T>(e + j * lanes) * inv_z, v = base[j] - s.top;
    const Mask<T> absent = p == T(0);
    mean_v += select<T>(absent, zero, p * v);
    if (eps > 0) {
      const Vec<T> log_q = (other[j] - s.top) + other_shift;
      const Vec<T> lift = select<T>(absent, zero, p * log_lift(p, v * s.inv_t) * t);
      mean_lift += lift;
      const Vec<T> added = form.entropy ? lift + eps * (simd::log<T>(p + eps) * t - log_q) : -eps * log_q;
      extra += select<T>(base.present(j), added * unit, zero);
    }
  }
  mean_v = Reduce::template sum<T>(mean_v);
  mean_lift = Reduce::template sum<T>(mean_lift);
  ValueAndSlope<T> result{s.kl * (to_logits * unit) + Reduce::template sum<T>(extra), zero, s.inv_t / unit};
  if (!form.entropy) result.value += (log_z * t - mean_v) * unit;

  const Vec<T> inv_other = inv_z / (T(1) + s.w);
  for (int64_t j = 0; gradients && j < n; ++j) {
    const Vec<T> weight = simd::load<T>(e + j * lanes), p = weight * inv_z, v = base[j] - s.top;
    const Mask<T> absent = p == T(0);
    Vec<T> to_other = (simd::load<T>(gap + j * lanes) - s.w * weight) * inv_other;  // q - p
    if (eps > 0) to_other += select<T>(base.present(j), eps * (form.classes * (p + to_other) - T(1)), zero);
    Vec<T> a = (base[j] - other[j]) - mean - drift;
    if (!form.entropy) a -= v - mean_v;
    if (form.entropy && eps > 0) a += log_lift(p, v * s.inv_t) * t - mean_lift;
    const Vec<T> to_base = select<T>(absent, zero, p * a);
    if (other_out) other_out->put(j, to_other * scale);
    if (base_out) base_out->put(j, to_base * (scale * s.inv_t));
    result.slope += select<T>(to_other == T(0), zero, to_other * T(kSlopeUnit) * (other[j] - s.top)) +
                    select<T>(absent, zero, to_base * T(kSlopeUnit) * (v * s.inv_t));
  }
  result.slope = Reduce::template sum<T>(result.slope) * unit;
  return result;
}

}  // namespace kdkernels::temperature_kl
