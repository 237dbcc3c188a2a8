// KL(b || o) of one tile, b and o the softmax of two sets of logits over T, in the centred form.
//
// With d = (b - o) / T (logits), p = softmax(b / T), any centre m close to E_p[d], x = d - m and y = -x:
//     w  = E_p[e^y] - 1 = E_p[e^y - 1 - y] - E_p[x]       every term of the first mean is >= 0
//     KL(b || o)  = E_p[x] + log(1 + w)
//     p_o - p_b   = p_b (e^y - 1 - w) / (1 + w)            dKL / d(o/T)
//     p_b (x - E_p[x])                                     dKL / d(b/T)
// These identities hold for every m: the rounding of the first mean is taken up by E_p[x] and costs nothing. No term is a difference of
// two large numbers, so loss and gradient keep their digits however close the nets are. Two exponentials per class; no maximum over o.
#pragma once

#include "tile.h"

namespace kdkernels::temperature_kl {

template <typename T>
struct Divergence {
  Vec<T> inv_t;  // 1 / T
  Vec<T> top;    // max of the base logits
  Vec<T> z;      // sum of e = exp((b - top) / T)
  Vec<T> mean;   // m, the mean of d as first computed
  Vec<T> drift;  // E_p[x], what rounding left of it
  Vec<T> w;      // E_p[e^y] - 1
  Vec<T> kl;
  Vec<T> shift;  // log p_b - log p_o = d - shift
};

// E_p[x] + log(1 + w), where w = convex - E_p[x]. Close nets have convex ~ w << 1: the series of w - log(1 + w) keeps the digits.
template <typename T>
inline Vec<T> centred_kl(Vec<T> convex, Vec<T> drift, Vec<T> w) {
  Vec<T> series = splat<T>(T(1) / T(12));
  for (int k = 11; k >= 2; --k) series = T(1) / T(k) - w * series;
  const Mask<T> near = (w < T(0.03)) & (w > T(-0.03));
  const Vec<T> kl = select<T>(near, convex - w * w * series, drift + simd::log1p<T>(w));
  return kl < T(0) ? Vec<T>{} : kl;
}

// Rows whose nets are so far apart that e^y leaves the range of T (or is infinite): log-sum-exp of both sides. There the divergence is
// large and nothing cancels. Rewrites gap[] so that the formula of the gradient above holds with w = 0.
template <typename T, typename Reduce>
void far_apart(const Source<T>& base, const Source<T>& other, const T* e, T* gap, Mask<T> far, Divergence<T>& s) {
  const int64_t n = base.vectors();
  const Vec<T> other_top = other.template max<Reduce>();
  Vec<T> other_z{};
  for (int64_t j = 0; j < n; ++j) other_z += simd::exp<T>((other[j] - other_top) * s.inv_t);
  other_z = Reduce::template sum<T>(other_z);
  const Vec<T> shift = (s.top - other_top) * s.inv_t + simd::log<T>(s.z) - simd::log<T>(other_z);
  s.shift = select<T>(far, shift, s.shift);
  s.kl = select<T>(far, s.mean - shift, s.kl);
  s.w = select<T>(far, Vec<T>{}, s.w);
  s.drift = select<T>(far, Vec<T>{}, s.drift);
  for (int64_t j = 0; gap && j < n; ++j) {
    const Vec<T> p_other = simd::exp<T>((other[j] - other_top) * s.inv_t) / other_z;
    const Vec<T> kept = simd::load<T>(gap + j * simd::kLanes<T>);
    simd::store<T>(gap + j * simd::kLanes<T>, select<T>(far, p_other * s.z - simd::load<T>(e + j * simd::kLanes<T>), kept));
  }
}

// Fills e[] with z p_b and, if asked, gap[] with z p_b (e^y - 1). `ahead` is what will be read next, after this tile: it is fetched
// while the second exponential keeps the memory idle.
template <typename T, typename Reduce>
Divergence<T> divergence(const Source<T>& base, const Source<T>& other, Vec<T> inv_t, T* e, T* gap, Ahead ahead) {
  constexpr int lanes = simd::kLanes<T>;
  const int64_t n = base.vectors();
  Divergence<T> s{};
  s.inv_t = inv_t;
  s.top = base.template max<Reduce>();

  for (int64_t begin = 0; begin < n; begin += kBlock) {
    Vec<T> z{}, mean{};
    for (int64_t j = begin, end = std::min(n, begin + kBlock); j < end; ++j) {
      const Vec<T> b = base[j];
      Mask<T> vanished;
      const Vec<T> weight = simd::exp_falling<T>((b - s.top) * inv_t, vanished);
      z += weight;
      // A class without probability may have an infinite or undefined d: 0 log 0 = 0.
      mean += select<T>(vanished, Vec<T>{}, weight * (b - other[j]));
      simd::store<T>(e + j * lanes, weight);
    }
    s.z += z;
    s.mean += mean;
  }
  s.z = Reduce::template sum<T>(s.z);
  const Vec<T> inv_z = T(1) / s.z;
  s.mean = Reduce::template sum<T>(s.mean) * inv_z * inv_t;

  const T steep = 16;  // beyond e^16 the product p_b e^y is formed in the exponent, where it cannot overflow
  Vec<T> convex{}, drift{};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    Vec<T> convex_sum{}, drift_sum{};
    for (int64_t j = begin, end = std::min(n, begin + kBlock); j < end; ++j) {
      ahead.fetch(j);
      const Vec<T> o = other[j], y = (o - base[j]) * inv_t + s.mean;
      const Vec<T> weight = simd::load<T>(e + j * lanes);
      const auto part = simd::exp_parts<T>(simd::max(splat<T>(simd::Constants<T>::exp_lowest), y));
      Vec<T> ey = weight * y;
      Vec<T> up = weight * (part.scale * (part.r + part.h) + (part.scale - T(1)));                        // p (e^y - 1)
      Vec<T> above = weight * (part.scale * part.h + (part.scale * part.r + ((part.scale - T(1)) - y)));  // p (e^y - 1 - y)
      const Mask<T> joined = ~(y < steep);
      if (__builtin_expect(any(joined), 0)) {
        const Vec<T> grown = simd::exp<T>((o - s.top) * inv_t + s.mean);
        ey = select<T>(weight == T(0), Vec<T>{}, ey);
        up = select<T>(joined, grown - weight, up);
        above = select<T>(joined, up - ey, above);
      }
      convex_sum += above;
      drift_sum -= ey;
      if (gap) simd::store<T>(gap + j * lanes, up);
    }
    convex += convex_sum;
    drift += drift_sum;
  }
  convex = Reduce::template sum<T>(convex) * inv_z;
  s.drift = Reduce::template sum<T>(drift) * inv_z;
  s.w = convex - s.drift;
  s.kl = centred_kl<T>(convex, s.drift, s.w);
  s.shift = s.mean + s.drift - s.kl;

  const Mask<T> far = ~(convex < T(1e30));
  if (__builtin_expect(any(far), 0)) far_apart<T, Reduce>(base, other, e, gap, far, s);
  return s;
}

// scale * dKL / d(o / T)
template <typename T>
void write_other_gradient(const Divergence<T>& s, int64_t n, const T* e, const T* gap, Vec<T> scale, const Sink<T>& out) {
  constexpr int lanes = simd::kLanes<T>;
  const Vec<T> k = scale / (s.z * (T(1) + s.w));
  for (int64_t j = 0; j < n; ++j) out.put(j, (simd::load<T>(gap + j * lanes) - s.w * simd::load<T>(e + j * lanes)) * k);
}

// scale * dKL / d(b / T)
template <typename T>
void write_base_gradient(const Divergence<T>& s, const Source<T>& base, const Source<T>& other, const T* e, Vec<T> scale,
                         const Sink<T>& out) {
  const Vec<T> k = scale / s.z;
  for (int64_t j = 0, n = base.vectors(); j < n; ++j) {
    const Vec<T> weight = simd::load<T>(e + j * simd::kLanes<T>);
    const Vec<T> x = (base[j] - other[j]) * s.inv_t - s.mean;
    out.put(j, select<T>(weight == T(0), Vec<T>{}, weight * (x - s.drift)) * k);
  }
}

}  // namespace kdkernels::temperature_kl
