// KL(b || o) of one tile, b and o the softmax of two sets of logits over T, in the centred form.
//
// With d = (b - o) / T (logits), p = softmax(b / T), any centre m close to E_p[d], x = d - m and y = -x:
//     w  = E_p[e^y] - 1 = E_p[e^y - 1 - y] - E_p[x]       every term of the first mean is >= 0
//     KL(b || o)  = E_p[x] + log(1 + w)
//     p_o - p_b   = p_b (e^y - 1 - w) / (1 + w)            dKL / d(o/T)
//     p_b (x - E_p[x])                                     dKL / d(b/T)
// These identities hold for every m: the rounding of the first mean is taken up by E_p[x] and costs nothing. No term is a difference of
// two large numbers, so loss and gradient keep their digits however close the nets are. Two exponentials per class; no maximum over o.
//
// d itself is such a difference where the logits of one net are far from those of the other: one net has another offset, or excludes
// classes by a very low finite number. The mean of d tells (it is E_p[d] whatever the classes without probability hold). Such rows are
// computed again from logits from which each net's own maximum has been subtracted (needs_centring, centre).
#pragma once

#include "tile.h"

namespace kdkernels::temperature_kl {

template <typename T>
struct Divergence {
  Vec<T> temperature, inv_t;
  Vec<T> top;   // max of the base logits
  Vec<T> z;     // sum of e = exp((b - top) / T)
  Vec<T> w;     // E_p[e^y] - 1
  Mask<T> far;  // the nets are so far apart that the row was computed from two log-sum-exps

  // Logarithms of probabilities are kept over T where the nets are near. Where they are far apart and T < 1, a difference of logits over T
  // may leave the range of T although loss and gradient, which are multiplied by T^2, do not: there they are kept in units of the centred
  // logits, whose temperature is `temperature`.
  Vec<T> unit;   // what a difference of logits is multiplied by: 1 / T or 1
  Vec<T> rest;   // what is left to multiply by: 1 or 1 / T
  Vec<T> mean;   // m, the mean of d as first computed
  Vec<T> drift;  // E_p[x], what rounding left of it
  Vec<T> kl;

  Vec<T> shift;    // log p_b - log p_o = (b - o) / T - shift
  Vec<T> other_z;  // sum of exp(o / T) of centred logits, where far

  // log p_o - (o - top) / T
  Vec<T> other_shift(Vec<T> log_z) const { return select<T>(far, -simd::log<T>(other_z), shift - log_z); }
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

// A row of which the mean of d is beyond this has lost more digits of d than are lost to centring.
constexpr int kFarMean = 64;

// Rows that have to be computed from centred logits.
template <typename T>
Mask<T> needs_centring(const Divergence<T>& s) {
  return s.far | ~((s.mean <= T(kFarMean)) & (s.mean >= T(-kFarMean)));
}

// Centred logits are kept in quarters, with a quarter of the temperature: the difference of two finite numbers may be twice the largest
// number of T, and the difference of two such differences four times.
constexpr double kQuarter = 0.25;

// Writes a quarter of the logits, minus their maximum in the rows that `which` marks, to `out`.
template <typename T, typename Reduce>
void centre(const Source<T>& logits, Mask<T> which, T* out) {
  const T quarter = T(kQuarter);
  const Vec<T> top = select<T>(which, logits.template max<Reduce>(), Vec<T>{}) * quarter;
  for (int64_t j = 0, n = logits.vectors(); j < n; ++j) simd::store<T>(out + j * simd::kLanes<T>, logits[j] * quarter - top);
}

// Rows whose nets are so far apart that e^y leaves the range of T (or is infinite): log-sum-exp of both sides. There the divergence is
// large and nothing cancels. The logits are centred. Rewrites gap[] so that the formula of the gradient above holds with w = 0.
template <typename T, typename Reduce>
void far_apart(const Source<T>& base, const Source<T>& other, const T* e, T* gap, Divergence<T>& s) {
  constexpr int lanes = simd::kLanes<T>;
  const int64_t n = base.vectors();
  const Vec<T> inv_z = T(1) / s.z;
  Vec<T> other_z{}, mean{};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    Vec<T> z_sum{}, mean_sum{};
    for (int64_t j = begin, end = std::min(n, begin + kBlock); j < end; ++j) {
      const Vec<T> weight = simd::load<T>(e + j * lanes);
      z_sum += simd::exp<T>(other[j] * s.inv_t);
      // The weights are normalised first: the mean of very large differences may be in the range of T where their sum is not.
      mean_sum += select<T>(weight == T(0), Vec<T>{}, (weight * inv_z) * (base[j] - other[j]));
    }
    other_z += z_sum;
    mean += mean_sum;
  }
  s.other_z = Reduce::template sum<T>(other_z);
  mean = Reduce::template sum<T>(mean);
  const Vec<T> shift = simd::log<T>(s.z) - simd::log<T>(s.other_z);
  const Vec<T> kl = mean - shift * s.temperature;
  s.unit = select<T>(s.far, splat<T>(T(1)), s.unit);
  s.rest = select<T>(s.far, s.inv_t, s.rest);
  s.shift = select<T>(s.far, shift, s.shift);
  s.mean = select<T>(s.far, mean, s.mean);
  s.kl = select<T>(s.far, kl < T(0) ? Vec<T>{} : kl, s.kl);
  s.w = select<T>(s.far, Vec<T>{}, s.w);
  s.drift = select<T>(s.far, Vec<T>{}, s.drift);
  for (int64_t j = 0; gap && j < n; ++j) {
    const Vec<T> p_other = simd::exp<T>(other[j] * s.inv_t) / s.other_z;
    const Vec<T> kept = simd::load<T>(gap + j * lanes);
    simd::store<T>(gap + j * lanes, select<T>(s.far, p_other * s.z - simd::load<T>(e + j * lanes), kept));
  }
}

// Fills e[] with z p_b and, if asked, gap[] with z p_b (e^y - 1). `ahead` is what will be read next, after this tile: it is fetched
// while the second exponential keeps the memory idle. With `centred` the logits of rows far apart are centred, and classes without
// probability may hold anything; without it `far` says only that the row needs this. Rows whose nets disagree by more than `disagree` are
// far apart too.
template <typename T, typename Reduce, bool centred>
Divergence<T> divergence(const Source<T>& base, const Source<T>& other, Vec<T> temperature, T* e, T* gap, Ahead ahead,
                         T disagree = std::numeric_limits<T>::infinity()) {
  constexpr int lanes = simd::kLanes<T>;
  const int64_t n = base.vectors();
  Divergence<T> s{};
  const Vec<T> inv_t = T(1) / temperature;
  s.temperature = temperature;
  s.inv_t = s.unit = inv_t;
  s.rest = splat<T>(T(1));
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
      if (centred || __builtin_expect(any(joined), 0)) {
        const Vec<T> grown = simd::exp<T>((o - s.top) * inv_t + s.mean);
        ey = select<T>(weight == T(0), Vec<T>{}, ey);
        up = select<T>(joined, grown - weight, up);
        above = select<T>(joined, up - ey, above);
        if (centred) above = select<T>(~joined & (weight == T(0)), Vec<T>{}, above);  // y may be -inf
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

  // Sums of terms >= 0: a negative one comes from terms that were cut off at the end of the range of T.
  s.far = ~((convex < T(1e30)) & (convex > T(-1)) & (s.kl <= disagree));
  if (centred && any(s.far)) far_apart<T, Reduce>(base, other, e, gap, s);
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
  const Vec<T> inv_z = T(1) / s.z, k = scale * s.rest;
  for (int64_t j = 0, n = base.vectors(); j < n; ++j) {
    const Vec<T> weight = simd::load<T>(e + j * simd::kLanes<T>);
    const Vec<T> x = (base[j] - other[j]) * s.unit - s.mean;
    out.put(j, select<T>(weight == T(0), Vec<T>{}, (weight * inv_z) * (x - s.drift)) * k);
  }
}

}  // namespace kdkernels::temperature_kl
