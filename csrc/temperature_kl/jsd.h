// Generalised Jensen-Shannon divergence of one tile: M = beta p + (1 - beta) q, p the teacher, q the student,
//     JSD = beta KL(p || M) + (1 - beta) KL(q || M)                                  (Agarwal et al. 2024, eq. 1; beta as in TRL and Liger)
// With z = log p - log q (from the centred divergence), u = q/p - 1 = e^-z - 1, v = p/q - 1 = e^z - 1 and a = 1 - beta:
//     A = log(p / M) = -log(1 + a u),   B = log(q / M) = -log(1 + beta v)
//     psi(x) = x - log(1 + x) >= 0
//     E_p[A] = sum_j p psi(a u),   E_q[B] = sum_j q psi(beta v)      since sum_j p u = sum_j q v = 0
//     JSD = beta E_p[A] + a E_q[B]
//     dJSD / d(q logits) = a q (B - E_q[B]),   dJSD / d(p logits) = beta p (A - E_p[A])
// No term is negative, and each mean is accurate relative to itself: nothing cancels, whether the nets agree or beta is close to 0 or 1.
#pragma once

#include "divergence.h"
#include "forms.h"

namespace kdkernels::temperature_kl {

// log(1 + x) and psi(x) = x - log(1 + x), both relative to themselves. The caller knows 1 + x more exactly where x is close to -1.
// log(u) is n ln2 + 2 atanh(s) as in simd::log; for n = 0, s = x / (2 + x) and x - 2 s = x s.
template <typename T>
struct LogAndRest {
  Vec<T> log, psi;
  Mask<T> near;  // psi is from the series
};

template <typename T>
KDKERNELS_INLINE LogAndRest<T> log_and_rest(Vec<T> x, Vec<T> one_plus_x) {
  using C = simd::Constants<T>;
  using I = Mask<T>;
  using Int = typename simd::IntOf<T>::type;
  constexpr int bits = C::mantissa_bits;
  const T root_half = T(0.70710678118654752);
  Int root_bits;
  std::memcpy(&root_bits, &root_half, sizeof root_bits);
  const I offset = (I)one_plus_x - root_bits;
  const I n = offset >> bits;
  const Vec<T> m = (Vec<T>)((offset & ((Int(1) << bits) - 1)) + root_bits);
  LogAndRest<T> result;
  result.near = n == I{};
  const Vec<T> s = select<T>(result.near, x, m - T(1)) / select<T>(result.near, x + T(2), m + T(1));
  const Vec<T> s2 = s * s;  // |s| <= 0.1716
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;
  Vec<T> poly = splat<T>(T(1.0 / (2 * terms + 1)));
  for (int k = terms - 1; k >= 1; --k) poly = poly * s2 + T(1.0 / (2 * k + 1));
  const Vec<T> small = T(2) * s * s2 * poly, exponent = __builtin_convertvector(n, Vec<T>);
  result.log = ((small + exponent * C::ln2_lo) + T(2) * s) + exponent * C::ln2_hi;
  result.psi = select<T>(result.near, x * s - small, x - result.log);
  return result;
}

template <typename T>
class Jsd {
 public:
  // Below the normal numbers of T a weight of the mixture is as good as the smallest of them.
  explicit Jsd(double beta)
      : beta_(std::max(static_cast<T>(beta), std::numeric_limits<T>::min())),
        a_(std::max(static_cast<T>(1 - beta), std::numeric_limits<T>::min())) {}

  // e[] is z p of the divergence(teacher, student); q[], a[] and b[] are scratch. The sinks may be null.
  template <typename Reduce>
  ValueAndSlope<T> operator()(const Divergence<T>& s, const Source<T>& teacher, const Source<T>& student, const T* e, T* q, T* a, T* b,
                              Vec<T> scale, bool gradients, const Sink<T>* teacher_out, const Sink<T>* student_out) const {
    constexpr int lanes = simd::kLanes<T>;
    const int64_t n = teacher.vectors();
    const Vec<T> inv_z = T(1) / s.z, zero{};
    // q = exp((o - top) / T + other_shift) other_scale, whichever of the two is exact
    const Vec<T> other_shift = select<T>(s.far, zero, s.shift - simd::log<T>(s.z));
    const Vec<T> other_scale = select<T>(s.far, T(1) / s.other_z, splat<T>(T(1)));
    const Vec<T> half = splat<T>(T(0.5));
    Mask<T> sure{};
    Vec<T> mean_a{}, mean_b{};
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      Vec<T> a_sum{}, b_sum{};
      for (int64_t j = begin, end = std::min(n, begin + kBlock); j < end; ++j) {
        const Vec<T> p = simd::load<T>(e + j * lanes) * inv_z, o = student[j];
        const Terms t = terms(p, (teacher[j] - o) * s.inv_t - s.shift, (o - s.top) * s.inv_t + other_shift, other_scale, s.far);
        sure |= (p > half) | (t.q > half);
        a_sum += t.p_psi;
        b_sum += t.q_psi;
        simd::store<T>(q + j * lanes, t.q);
        simd::store<T>(a + j * lanes, t.a);
        simd::store<T>(b + j * lanes, t.b);
      }
      mean_a += a_sum;
      mean_b += b_sum;
    }
    mean_a = Reduce::template sum<T>(mean_a);
    mean_b = Reduce::template sum<T>(mean_b);

    auto slopes = [&](int64_t j, Vec<T> p, Vec<T> qj) {
      return std::pair(select<T>(qj == T(0), zero, a_ * qj * (simd::load<T>(b + j * lanes) - mean_b)),
                       select<T>(p == T(0), zero, beta_ * p * (simd::load<T>(a + j * lanes) - mean_a)));
    };
    // A mean is close to what a class that has nearly all of the probability adds to it, and their difference has no digits. The gradient
    // sums to zero, so it is the negative of what the other classes have.
    const bool any_sure = gradients && any(sure);
    Vec<T> rest_student{}, rest_teacher{};
    for (int64_t j = 0; any_sure && j < n; ++j) {
      const Vec<T> p = simd::load<T>(e + j * lanes) * inv_z, qj = simd::load<T>(q + j * lanes);
      const auto [to_student, to_teacher] = slopes(j, p, qj);
      rest_student += select<T>(qj > half, zero, to_student);
      rest_teacher += select<T>(p > half, zero, to_teacher);
    }
    if (any_sure) {
      rest_student = Reduce::template sum<T>(rest_student);
      rest_teacher = Reduce::template sum<T>(rest_teacher);
    }
    Vec<T> slope{};
    for (int64_t j = 0; gradients && j < n; ++j) {
      const Vec<T> p = simd::load<T>(e + j * lanes) * inv_z, qj = simd::load<T>(q + j * lanes);
      auto [to_student, to_teacher] = slopes(j, p, qj);
      if (any_sure) {
        to_student = select<T>(qj > half, -rest_student, to_student);
        to_teacher = select<T>(p > half, -rest_teacher, to_teacher);
      }
      if (student_out) student_out->put(j, to_student * scale);
      if (teacher_out) teacher_out->put(j, to_teacher * scale);
      slope += select<T>(to_student == T(0), zero, to_student * ((student[j] - s.top) * s.inv_t)) +
               select<T>(to_teacher == T(0), zero, to_teacher * ((teacher[j] - s.top) * s.inv_t));
    }
    const Vec<T> value = beta_ * mean_a + a_ * mean_b;
    return {value < T(0) ? zero : value, Reduce::template sum<T>(slope) * T(kSlopeUnit), splat<T>(T(1))};
  }

 private:
  struct Terms {
    Vec<T> q, a, b;       // q, log(p / M), log(q / M)
    Vec<T> p_psi, q_psi;  // p psi(a u), q psi(beta v)
  };

  // exp(log_q) q_scale is used where p is too small, or zero, to carry q = p e^-z, and where the nets are far apart.
  Terms terms(Vec<T> p, Vec<T> z, Vec<T> log_q, Vec<T> q_scale, Mask<T> far) const {
    Terms t;
    const Vec<T> limit = splat<T>(-simd::Constants<T>::exp_lowest);
    const auto part = simd::exp_parts<T>(-simd::max(-limit, z < limit ? z : limit));
    const Vec<T> u = part.scale * (part.r + part.h) + (part.scale - T(1));
    const Vec<T> ratio = part.scale * (part.r + part.h) + part.scale, inverse = T(1) / ratio, v = -u * inverse;
    t.q = p * ratio;  // p + p u would leave nothing of a q much smaller than p
    const Mask<T> joined = far | ~(z > T(-16));
    if (__builtin_expect(any(joined), 0)) t.q = select<T>(joined, simd::exp<T>(log_q) * q_scale, t.q);
    const auto first = log_and_rest(a_ * u, beta_ + a_ * ratio, a_ * u > T(-0.25));
    const auto second = log_and_rest(beta_ * v, a_ + beta_ * inverse, beta_ * v > T(-0.25));
    t.a = -first.log;
    t.b = -second.log;
    const Mask<T> no_p = p == T(0), no_q = t.q == T(0);
    t.p_psi = select<T>(first.near, p * first.psi, a_ * (t.q - p) + p * t.a);
    t.q_psi = select<T>(second.near, t.q * second.psi, beta_ * (p - t.q) + t.q * t.b);
    t.p_psi = select<T>(no_p, a_ * t.q, t.p_psi);
    t.q_psi = select<T>(no_q, beta_ * p, t.q_psi);
    return t;
  }

  static LogAndRest<T> log_and_rest(Vec<T> x, Vec<T> one_plus_x, Mask<T> small) {
    return temperature_kl::log_and_rest<T>(x, select<T>(small, T(1) + x, one_plus_x));
  }

  T beta_, a_;
};

}  // namespace kdkernels::temperature_kl
