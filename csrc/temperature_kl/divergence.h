// KL(b || o) of one tile in the centred form. b (base) and o (other) are the logits of the two
// networks; KL compares their softmaxes at temperature T. docs/temperature_kl.md derives the
// formulas.
//
// Let d = (b - o) / T, p = softmax(b / T), m any centre close to E_p[d], x = d - m, and y = -x.
// Then:
//     w  = E_p[e^y] - 1 = E_p[e^y - 1 - y] - E_p[x]       every term of the first mean is >= 0
//     KL(b || o)  = E_p[x] + log(1 + w)
//     p_o - p_b   = p_b (e^y - 1 - w) / (1 + w)            dKL / d(o/T)
//     p_b (x - E_p[x])                                     dKL / d(b/T)
// These identities hold for every m: a rounding error of m changes E_p[x] by the opposite amount
// and does not affect the result. No term is a difference of two large numbers, so the loss and the
// gradient are accurate however similar the networks are. The computation takes two exponentials
// per class and does not need the maximum over o.
//
// A long row is computed in parts, each with a centre of its own, the mean of d over the part. What
// one loop writes for the next one, p and d, then stays in the first-level cache. Afterwards the
// means over the parts are moved to the centre of the row (move_to_centre).
//
// d itself is inaccurate if the logits of one network are far from those of the other, that is, if
// one network has a different offset or excludes classes by a very low finite number. The mean of d
// detects this case, because it equals E_p[d] whatever the logits of classes without probability
// are. The kernel computes such rows again from logits from which each network's own maximum has
// been subtracted (needs_centring, centre).
#pragma once

#include "convex.h"
#include "tile.h"

namespace kdkernels::temperature_kl {

// Vectors in a part of a row. Longer parts leave the first-level cache; shorter ones spend more time
// on the sums across lanes.
constexpr int64_t kPart = 2 * kBlock;

// A row with a part whose centre is further than this from the centre of the row is computed again
// in one part: the factor e^distance, up to 2981 here, would enlarge the rounding errors of the part,
// and a class whose p underflows to 0 could count. So is a row with a part whose terms may have been
// cut off at the end of the range (kLargestConvex), because a small factor would hide them.
constexpr int kFarCentre = 8;
constexpr float kLargestConvex = 1e30f;

// With the centre of the part, and with weights exp((b - base_max) / T) in place of p:
template <typename T>
struct Part {
  Vec<T> centre, z;      // the centre, the sum of the weights
  Vec<T> convex, drift;  // sums of weight (e^y - 1 - y) and of weight x
  Vec<T> factor, expm1;  // e^distance and e^distance - 1, where the centre of the row is that of the part + distance
};

// The parts of a tile: memory for them, and the number of vectors of each.
template <typename T>
struct Parts {
  Part<T>* parts;
  int64_t vectors;
};

template <typename T>
struct Divergence {
  Vec<T> temperature, inv_t;
  Vec<T> base_max;               // maximum of the base logits
  Vec<T> z;                      // sum of the weights exp((b - base_max) / T)
  Vec<T> w;                      // E_p[e^y] - 1
  Mask<T> far_apart;             // the networks differ so much that two log-sum-exps are used
  bool has_far_centres = false;  // see kFarCentre; the results below are then not computed

  // Logarithms of probabilities are kept divided by T if the networks are close. If they are far
  // apart and T < 1, a difference of logits divided by T may leave the range of the number type T
  // although the loss and the gradient, which are multiplied by T^2, do not. Such rows keep
  // logarithms in units of the centred logits, whose temperature is `temperature`.
  Vec<T> logit_factor;      // multiplies differences of logits: 1 / T or 1
  Vec<T> remaining_factor;  // still to be multiplied to results: 1 or 1 / T
  Vec<T> mean;              // m, the mean of d as first computed
  Vec<T> drift;             // E_p[x], which is the rounding error of m
  Vec<T> kl;

  Vec<T> shift;    // log p_b - log p_o = (b - o) / T - shift
  Vec<T> other_z;  // sum of exp(o / T) of centred logits, if far_apart

  // The gradient of a class without probability: 0, but NaN in a row with a NaN.
  Vec<T> zero_gradient() const { return select<T>(kl == kl, Vec<T>{}, splat<T>(std::numeric_limits<T>::quiet_NaN())); }

  // log p_o - (o - base_max) / T
  Vec<T> other_shift(Vec<T> log_z) const { return select<T>(far_apart, -simd::log<T>(other_z), shift - log_z); }
};

// E_p[x] + log(1 + w) for w = convex - E_p[x]. For similar networks convex ~ w << 1, and the power
// series of w - log(1 + w) is accurate.
template <typename T>
inline Vec<T> centred_kl(Vec<T> convex, Vec<T> drift, Vec<T> w) {
  Vec<T> series = splat<T>(T(1) / T(12));
  for (int k = 11; k >= 2; --k) series = T(1) / T(k) - w * series;
  const Mask<T> use_series = (w < T(0.03)) & (w > T(-0.03));
  const Vec<T> kl = select<T>(use_series, convex - w * w * series, drift + simd::log1p<T>(w));
  return kl < T(0) ? Vec<T>{} : kl;
}

// If the magnitude of the mean of d exceeds this, d has lost more digits than centring loses.
constexpr int kFarMean = 64;

// The rows that must be computed again from centred logits.
template <typename T>
Mask<T> needs_centring(const Divergence<T>& s) {
  return s.far_apart | ~((s.mean <= T(kFarMean)) & (s.mean >= T(-kFarMean)));
}

// Centred logits are stored divided by 4 and are used with a quarter of the temperature: the
// difference of two finite numbers may be twice the largest number of T, and the difference of two
// such differences four times that number.
constexpr double kQuarter = 0.25;

// Writes a quarter of the logits to `out`. In the rows marked by `rows_to_centre`, the maximum of
// the logits is subtracted first.
template <typename T, typename Reduce, typename Logits>
void centre(const Logits& logits, Mask<T> rows_to_centre, T* out) {
  const T quarter = T(kQuarter);
  const Vec<T> row_max = select<T>(rows_to_centre, logits.template max<Reduce>(), Vec<T>{}) * quarter;
  for (int64_t j = 0, n = logits.vectors(); j < n; ++j) simd::store<T>(out + j * simd::kLanes<T>, logits[j] * quarter - row_max);
}

// Computes the rows whose networks are so far apart that e^y leaves the range of T (or is
// infinite), from the log-sum-exps of both networks. In such rows the divergence is large and
// nothing cancels. The logits must be centred. Rewrites difference[] so that the formula of the
// gradient above holds with w = 0.
template <typename T, typename Reduce, typename Logits>
void compute_far_apart(const Logits& base, const Logits& other, const T* weights, T* difference, Divergence<T>& s) {
  constexpr int lanes = simd::kLanes<T>;
  const int64_t n = base.vectors();
  const Vec<T> inv_z = T(1) / s.z;
  Vec<T> other_z{}, mean{};
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    Vec<T> z_sum{}, mean_sum{};
    for (int64_t j = begin, end = std::min(n, begin + kBlock); j < end; ++j) {
      const Vec<T> weight = simd::load<T>(weights + j * lanes);
      z_sum += simd::exp<T>(other[j] * s.inv_t);
      // Normalise the weights first: the mean of very large differences may be in the range of T
      // although their sum is not.
      mean_sum += select<T>(weight == T(0), Vec<T>{}, (weight * inv_z) * (base[j] - other[j]));
    }
    other_z += z_sum;
    mean += mean_sum;
  }
  s.other_z = Reduce::template sum<T>(other_z);
  mean = Reduce::template sum<T>(mean);
  const Vec<T> shift = simd::log<T>(s.z) - simd::log<T>(s.other_z);
  const Vec<T> kl = mean - shift * s.temperature;
  s.logit_factor = select<T>(s.far_apart, splat<T>(T(1)), s.logit_factor);
  s.remaining_factor = select<T>(s.far_apart, s.inv_t, s.remaining_factor);
  s.shift = select<T>(s.far_apart, shift, s.shift);
  s.mean = select<T>(s.far_apart, mean, s.mean);
  s.kl = select<T>(s.far_apart, kl < T(0) ? Vec<T>{} : kl, s.kl);
  s.w = select<T>(s.far_apart, Vec<T>{}, s.w);
  s.drift = select<T>(s.far_apart, Vec<T>{}, s.drift);
  for (int64_t j = 0; j < n; ++j) {
    const Vec<T> p_other = simd::exp<T>(other[j] * s.inv_t) / s.other_z;
    const Vec<T> previous = simd::load<T>(difference + j * lanes);
    simd::store<T>(difference + j * lanes, select<T>(s.far_apart, p_other * s.z - simd::load<T>(weights + j * lanes), previous));
  }
}

// The terms of a class with y = log(p_o / p) up to the centre.
template <typename T>
struct Terms {
  Vec<T> y, expm1, convex;  // y, e^y - 1, e^y - 1 - y
};

// The terms if the networks differ little, as they do for most classes: |y| <= 1. Needs no range
// reduction.
template <typename T>
KDKERNELS_INLINE Terms<T> terms_of_close(Vec<T> y) {
  const Vec<T> convex = convex_polynomial<false>(y) * (y * y);
  return {y, y + convex, convex};
}

constexpr int kLargeY = 16;  // e^y cannot overflow below

// The terms for y < kLargeY; `clamped` is y, but not below Constants::exp_lowest.
template <typename T>
KDKERNELS_INLINE Terms<T> terms_in_range(Vec<T> y, Vec<T> clamped) {
  const auto parts = simd::exp_parts<T>(clamped);
  const Vec<T> expm1 = parts.scale * (parts.r + parts.h) + (parts.scale - T(1));
  const Vec<T> convex = parts.scale * parts.h + (parts.scale * parts.r + ((parts.scale - T(1)) - y));
  return {y, expm1, convex};
}

// The same terms, with y = 0 for a class without probability, whose y may be infinite or NaN. With
// `centred`, all its terms are finite. Without it, y = -inf gives a NaN in `convex` times the weight,
// which marks the row as one to be centred.
template <typename T, bool centred>
KDKERNELS_INLINE Terms<T> terms_of_any(Vec<T> weight, Vec<T> y) {
  Terms<T> t = terms_in_range<T>(y, simd::max(splat<T>(simd::Constants<T>::exp_lowest), y));
  t.y = select<T>(weight == T(0), Vec<T>{}, y);
  if (centred) t.convex = select<T>(weight == T(0), Vec<T>{}, t.convex);
  return t;
}

// Sums of the terms, weighted by p. Rows in lanes are added in different loops, depending on the rows
// beside them, and must get the same bits in each.
template <typename T>
struct TermSums {
  Vec<T> convex{}, y{};  // of p (e^y - 1 - y) and of p y

  // Adds the terms and returns p (e^y - 1).
  KDKERNELS_INLINE Vec<T> add(Vec<T> weight, const Terms<T>& t) {
    convex = simd::multiply_add(weight, t.convex, convex);
    y = simd::multiply_add(weight, t.y, y);
    return weight * t.expm1;
  }

  // The same for any y. Where y is not below kLargeY, p e^y is computed as the single exponential
  // `other_weight()`, which cannot overflow.
  template <bool centred, typename OtherWeight>
  KDKERNELS_INLINE Vec<T> add_any(Vec<T> weight, Vec<T> any_y, const Terms<T>& t, OtherWeight&& other_weight) {
    const Mask<T> may_overflow = ~(any_y < T(kLargeY));
    const Vec<T> before = convex, expm1 = add(weight, t);
    if (!centred && __builtin_expect(!any(may_overflow), 1)) return expm1;
    const Vec<T> large = other_weight() - weight;
    convex = select<T>(may_overflow, before + (large - weight * t.y), convex);
    return select<T>(may_overflow, large, expm1);
  }
};

// Moves the sums over a part to the centre m of the row, which makes y larger by m - centre. All
// terms of the sum of e^y - 1 - y are >= 0, except for that of the drift, which is a rounding error
// or, if all weights of the part are 0, is 0.
template <typename T>
void move_to_centre(Vec<T> m, Part<T>& part) {
  const Vec<T> distance = m - part.centre;  // its magnitude is at most kFarCentre
  const Terms<T> terms = terms_in_range<T>(distance, distance);
  part.factor = simd::exp<T>(distance);
  part.expm1 = terms.expm1;
  part.convex = part.factor * part.convex - part.expm1 * part.drift + part.z * terms.convex;
  part.drift -= part.z * distance;
}

// Computes the divergence of one tile, part by part: weigh() fills weights[] with z p_b and
// difference[] with o - b, add_terms() replaces the latter by z p_b (e^y - 1), where y is measured from
// the centre of the part. Without `keeps_all`, each part overwrites those of the one before. The stages
// are separate because each begins with a sum across lanes: two tiles that take turns do not wait for
// it (divergences_of_two_rows).
//
// The memory that is read next is prefetched where the memory is otherwise idle: `other` during the
// first exponential, a part ahead, and `next_tile`, which is read after this tile, during the second.
//
// With `centred`, the logits of rows that are far apart are centred, and classes without probability
// may have any logits. Without it, `far_apart` only marks the rows that need centring. Rows whose
// divergence exceeds `far_threshold` also count as far apart.
template <typename T, typename Reduce, bool centred, typename Logits>
class DivergenceStages {
 public:
  static constexpr int lanes = simd::kLanes<T>;

  DivergenceStages(const Logits& base, const Logits& other, Vec<T> temperature, T* weights, T* difference, bool keeps_all, Parts<T> parts,
                   PrefetchRange next_tile, T far_threshold = std::numeric_limits<T>::infinity())
      : base_(base),
        other_(other),
        weights_(weights),
        difference_(difference),
        keeps_all_(keeps_all),
        parts_(parts),
        next_tile_(next_tile),
        far_threshold_(far_threshold) {
    s_.z = s_.mean = s_.other_z = Vec<T>{};
    s_.temperature = temperature;
    s_.inv_t = s_.logit_factor = T(1) / temperature;
    s_.remaining_factor = splat<T>(T(1));
    s_.base_max = base.template max<Reduce>();
  }

  Divergence<T> run() {
    for (int64_t first = 0; first < base_.vectors(); first += parts_.vectors) {
      weigh(first);
      add_terms(first);
    }
    return finish();
  }

  void weigh(int64_t first) {
    const int64_t last = this->last(first), kept = this->kept(first);
    T *const weights = weights_, *const difference = difference_;
    const Vec<T> base_max = s_.base_max, inv_t = s_.inv_t;
    Vec<T> part_z{}, part_mean{}, least_gap = splat<T>(std::numeric_limits<T>::infinity()), largest_gap = -least_gap;
    for (int64_t begin = first; begin < last; begin += kBlock) {
      Vec<T> z{}, mean_sum{};
      base_.for_each(other_, begin, std::min(last, begin + kBlock), [&](int64_t j, Vec<T> b, Vec<T> o) {
        if constexpr (std::is_same_v<Reduce, AcrossLanes>) other_.prefetch(j + kPart);
        const Vec<T> weight = simd::exp_falling<T>((b - base_max) * inv_t), gap = o - b;
        z += weight;
        mean_sum -= weight * gap;
        least_gap = simd::min(gap, least_gap);
        largest_gap = simd::max(gap, largest_gap);
        simd::store<T>(weights + (j - kept) * lanes, weight);
        simd::store<T>(difference + (j - kept) * lanes, gap);
      });
      part_z += z;
      part_mean += mean_sum;
    }
    // The d of a class without probability may be infinite or NaN; use 0 log 0 = 0.
    finite_ = part_mean - part_mean == T(0);
    if (__builtin_expect(any(~finite_), 0)) part_mean = select<T>(finite_, part_mean, mean_without_zeros(first - kept, last - kept));
    part_ = parts_.parts + first / parts_.vectors;
    Part<T>& part = *part_;
    part.z = Reduce::template sum<T>(part_z);
    part_mean = Reduce::template sum<T>(part_mean);
    part.centre = select<T>(part.z == T(0), Vec<T>{}, part_mean * (T(1) / part.z) * inv_t);
    s_.z += part.z;
    s_.mean += part_mean;
    least_gap_ = least_gap;
    largest_gap_ = largest_gap;
  }

  void add_terms(int64_t first) {
    const Vec<T> centre = part_->centre, inv_t = s_.inv_t, least_y = least_gap_ * inv_t + centre, largest_y = largest_gap_ * inv_t + centre;
    const Mask<T> in_range = finite_ & (least_y > T(simd::Constants<T>::exp_lowest)) & (largest_y < T(kLargeY));
    // In float64, the polynomial of terms_of_close is not accurate enough.
    const Mask<T> close = sizeof(T) == sizeof(float) ? finite_ & (least_y >= T(-1)) & (largest_y <= T(1)) : Mask<T>{};
    // In lanes, the terms of each row are those that the row has by itself.
    const bool mixes = std::is_same_v<Reduce, PerLane> && any(close);
    auto mixed = [=](Vec<T> y, Terms<T> t) {
      if (std::is_same_v<Reduce, AcrossLanes> || sizeof(T) != sizeof(float)) return t;
      const Terms<T> c = terms_of_close<T>(y);
      return Terms<T>{select<T>(close, c.y, t.y), select<T>(close, c.expm1, t.expm1), select<T>(close, c.convex, t.convex)};
    };
    if (!any(~close))
      add(first, [](TermSums<T>& sums, int64_t, Vec<T> weight, Vec<T> y) { return sums.add(weight, terms_of_close<T>(y)); });
    else if (!any(~in_range) && !mixes)
      add(first, [](TermSums<T>& sums, int64_t, Vec<T> weight, Vec<T> y) { return sums.add(weight, terms_in_range<T>(y, y)); });
    else if (!any(~in_range))
      add(first, [=](TermSums<T>& sums, int64_t, Vec<T> weight, Vec<T> y) { return sums.add(weight, mixed(y, terms_in_range<T>(y, y))); });
    else
      add(first, [=, base_max = s_.base_max](TermSums<T>& sums, int64_t j, Vec<T> weight, Vec<T> y) {
        return sums.template add_any<centred>(weight, y, mixed(y, terms_of_any<T, centred>(weight, y)),
                                              [&] { return simd::exp<T>((other_[j] - base_max) * inv_t + centre); });
      });
  }

  // After the last part.
  Divergence<T> finish() {
    const Vec<T> inv_z = T(1) / s_.z;
    s_.mean = s_.mean * inv_z * s_.inv_t;

    Vec<T> convex{}, drift{};
    if (base_.vectors() <= parts_.vectors) {
      part_->factor = splat<T>(T(1));
      part_->expm1 = Vec<T>{};
      convex = part_->convex, drift = part_->drift;
    } else {
      for (const Part<T>* p = parts_.parts; p <= part_; ++p) {
        const Vec<T> distance = s_.mean - p->centre;
        s_.has_far_centres |= any(~((distance <= T(kFarCentre)) & (distance >= T(-kFarCentre)) & (p->convex < T(kLargestConvex))));
      }
      if (s_.has_far_centres) {
        // One part would not help a row that is to be centred.
        s_.far_apart = ~(s_.mean - s_.mean == T(0));
        return s_;
      }
      for (Part<T>* p = parts_.parts; p <= part_; ++p) {
        move_to_centre<T>(s_.mean, *p);
        convex += p->convex;
        drift += p->drift;
      }
    }
    convex *= inv_z;
    s_.drift = drift * inv_z;
    s_.w = convex - s_.drift;
    s_.kl = centred_kl<T>(convex, s_.drift, s_.w);
    s_.shift = s_.mean + s_.drift - s_.kl;

    // All terms of `convex` are >= 0. It is negative only if terms were cut off at the end of the
    // range of T.
    s_.far_apart = ~((convex < T(kLargestConvex)) & (convex > T(-1)) & (s_.kl <= far_threshold_));
    if (centred && any(s_.far_apart)) compute_far_apart<T, Reduce>(base_, other_, weights_, difference_, s_);
    return s_;
  }

 private:
  // The end of the part that begins at vector `first`, and the vector that is stored first.
  int64_t last(int64_t first) const { return std::min(base_.vectors(), first + parts_.vectors); }
  int64_t kept(int64_t first) const { return keeps_all_ ? 0 : first; }

  Vec<T> mean_without_zeros(int64_t begin, int64_t end) const {
    Vec<T> sum{};
    for (int64_t j = begin; j < end; ++j) {
      const Vec<T> weight = simd::load<T>(weights_ + j * lanes);
      sum -= select<T>(weight == T(0), Vec<T>{}, weight * simd::load<T>(difference_ + j * lanes));
    }
    return sum;
  }

  // Sums the terms of a part. add_vector(sums, j, weight, y) adds those of vector j.
  template <typename AddVector>
  KDKERNELS_INLINE void add(int64_t first, AddVector&& add_vector) {
    const int64_t last = this->last(first), kept = this->kept(first);
    T *const weights = weights_, *const difference = difference_;
    const Vec<T> centre = part_->centre, inv_t = s_.inv_t;
    const PrefetchRange next_tile = next_tile_;
    Vec<T> convex{}, weighted_y{};
    for (int64_t begin = first; begin < last; begin += kBlock) {
      TermSums<T> sums;
      for (int64_t j = begin, end = std::min(last, begin + kBlock); j < end; ++j) {
        next_tile.fetch(j);
        const Vec<T> y = simd::load<T>(difference + (j - kept) * lanes) * inv_t + centre;
        simd::store<T>(difference + (j - kept) * lanes, add_vector(sums, j, simd::load<T>(weights + (j - kept) * lanes), y));
      }
      convex += sums.convex;
      weighted_y += sums.y;
    }
    part_->convex = Reduce::template sum<T>(convex);
    part_->drift = Reduce::template sum<T>(-weighted_y);
  }

  const Logits &base_, &other_;
  T *weights_, *difference_;
  bool keeps_all_;
  Parts<T> parts_;
  Part<T>* part_ = nullptr;  // the one that was weighed last
  PrefetchRange next_tile_;
  T far_threshold_;
  Divergence<T> s_;
  Mask<T> finite_;
  Vec<T> least_gap_, largest_gap_;
};

// scale * dKL / d(o / T)
template <typename T>
void write_other_gradient(const Divergence<T>& s, Parts<T> parts, int64_t n, const T* weights, const T* difference, Vec<T> scale,
                          const Sink<T>& out) {
  constexpr int lanes = simd::kLanes<T>;
  const Vec<T> k = scale / (s.z * (T(1) + s.w));
  const Part<T>* part = parts.parts;
  for (int64_t first = 0; first < n; first += parts.vectors, ++part) {
    const Vec<T> factor = part->factor, w = s.w - part->expm1;
    out.write(first, std::min(n, first + parts.vectors),
              [=](int64_t j) { return (simd::load<T>(difference + j * lanes) * factor - w * simd::load<T>(weights + j * lanes)) * k; });
  }
}

// scale * dKL / d(b / T)
template <typename T, typename Logits>
void write_base_gradient(const Divergence<T>& s, const Logits& base, const Logits& other, const T* weights, Vec<T> scale,
                         const Sink<T>& out) {
  const Vec<T> inv_z = T(1) / s.z, k = scale * s.remaining_factor, factor = s.logit_factor, mean = s.mean, drift = s.drift,
               zero = s.zero_gradient();
  out.write(0, base.vectors(), [&, inv_z, k, factor, mean, drift, zero](int64_t j) {
    const Vec<T> weight = simd::load<T>(weights + j * simd::kLanes<T>);
    const Vec<T> x = (base[j] - other[j]) * factor - mean;
    return select<T>(weight == T(0), zero, (weight * inv_z) * (x - drift)) * k;
  });
}

}  // namespace kdkernels::temperature_kl
