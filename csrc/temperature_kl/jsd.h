// Generalised Jensen-Shannon divergence of one tile: M = beta p + (1 - beta) q, p the teacher, q
// the student,
//     JSD = beta KL(p || M) + (1 - beta) KL(q || M)
// (Agarwal et al. 2024, eq. 1; beta as in TRL and Liger).
//
// Let z = log p - log q (from the centred divergence), u = q/p - 1 = e^-z - 1, v = p/q - 1 =
// e^z - 1, and a = 1 - beta. Then:
//     A = log(p / M) = -log(1 + a u),   B = log(q / M) = -log(1 + beta v)
//     psi(x) = x - log(1 + x) >= 0
//     E_p[A] = sum_j p psi(a u),   E_q[B] = sum_j q psi(beta v)      since sum_j p u = sum_j q v = 0
//     JSD = beta E_p[A] + a E_q[B]
//     dJSD / d(q logits) = a q (B - E_q[B]),   dJSD / d(p logits) = beta p (A - E_p[A])
// No term is negative, and each mean has a small relative error: nothing cancels, even if the
// networks agree or beta is close to 0 or 1.
#pragma once

#include "divergence.h"
#include "forms.h"

namespace kdkernels::temperature_kl {

// log(1 + x) and psi(x) = x - log(1 + x), both with a small relative error. The caller passes 1 + x
// separately, because it can compute 1 + x more accurately when x is close to -1. log(u) is n ln2 +
// 2 atanh(s) as in simd::log; for n = 0, s = x / (2 + x) and x - 2 s = x s.
template <typename T>
struct LogAndPsi {
  Vec<T> log, psi;
  Mask<T> from_series;  // psi was computed from the series
};

template <typename T>
KDKERNELS_INLINE LogAndPsi<T> log_and_psi(Vec<T> x, Vec<T> one_plus_x) {
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
  LogAndPsi<T> result;
  result.from_series = n == I{};
  const Vec<T> s = select<T>(result.from_series, x, m - T(1)) / select<T>(result.from_series, x + T(2), m + T(1));
  const Vec<T> s2 = s * s;  // |s| <= 0.1716
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;
  Vec<T> poly = splat<T>(T(1.0 / (2 * terms + 1)));
  for (int k = terms - 1; k >= 1; --k) poly = poly * s2 + T(1.0 / (2 * k + 1));
  const Vec<T> small = T(2) * s * s2 * poly, exponent = __builtin_convertvector(n, Vec<T>);
  result.log = ((small + exponent * C::ln2_lo) + T(2) * s) + exponent * C::ln2_hi;
  result.psi = select<T>(result.from_series, x * s - small, x - result.log);
  return result;
}

template <typename T>
class Jsd {
 public:
  // A weight of the mixture below the smallest normal number of T is replaced by that number; the
  // difference is negligible.
  explicit Jsd(double beta)
      : beta_(std::max(static_cast<T>(beta), std::numeric_limits<T>::min())),
        a_(std::max(static_cast<T>(1 - beta), std::numeric_limits<T>::min())) {}

  // weights[] is z p of divergence(teacher, student); q[], a[] and b[] are scratch memory. The
  // sinks may be null.
  template <typename Reduce>
  ValueAndDerivative<T> operator()(const Divergence<T>& s, const Source<T>& teacher, const Source<T>& student, const T* weights, T* q, T* a,
                                   T* b, Vec<T> scale, bool gradients, const Sink<T>* teacher_out, const Sink<T>* student_out) const {
    constexpr int lanes = simd::kLanes<T>;
    const int64_t n = teacher.vectors();
    const Vec<T> inv_z = T(1) / s.z, zero{}, zero_gradient = s.zero_gradient();
    // q = exp((o - base_max) / T + other_shift) other_scale. Rows that are far apart use
    // other_scale, all others use other_shift.
    const Vec<T> other_shift = select<T>(s.far_apart, zero, s.shift - simd::log<T>(s.z));
    const Vec<T> other_scale = select<T>(s.far_apart, T(1) / s.other_z, splat<T>(T(1)));
    const Vec<T> half = splat<T>(T(0.5));
    Mask<T> has_dominant_class{};
    Vec<T> mean_a{}, mean_b{};
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      Vec<T> a_sum{}, b_sum{};
      for (int64_t j = begin, end = std::min(n, begin + kBlock); j < end; ++j) {
        const Vec<T> p = simd::load<T>(weights + j * lanes) * inv_z, o = student[j];
        const Terms t = terms(p, (teacher[j] - o) * s.inv_t - s.shift, (o - s.base_max) * s.inv_t + other_shift, other_scale, s.far_apart);
        has_dominant_class |= (p > half) | (t.q > half);
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

    auto logit_gradients = [&](int64_t j, Vec<T> p, Vec<T> qj) {
      return std::pair(select<T>(qj == T(0), zero_gradient, a_ * qj * (simd::load<T>(b + j * lanes) - mean_b)),
                       select<T>(p == T(0), zero_gradient, beta_ * p * (simd::load<T>(a + j * lanes) - mean_a)));
    };
    // If one class has nearly all of the probability, the mean is close to the term of this class,
    // and the difference of the two is inaccurate. The gradient sums to zero over the classes, so
    // this class gets the negative of the sum of the other classes' gradients.
    const bool any_dominant_class = gradients && any(has_dominant_class);
    Vec<T> other_classes_student{}, other_classes_teacher{};
    for (int64_t j = 0; any_dominant_class && j < n; ++j) {
      const Vec<T> p = simd::load<T>(weights + j * lanes) * inv_z, qj = simd::load<T>(q + j * lanes);
      const auto [student_grad, teacher_grad] = logit_gradients(j, p, qj);
      other_classes_student += select<T>(qj > half, zero, student_grad);
      other_classes_teacher += select<T>(p > half, zero, teacher_grad);
    }
    if (any_dominant_class) {
      other_classes_student = Reduce::template sum<T>(other_classes_student);
      other_classes_teacher = Reduce::template sum<T>(other_classes_teacher);
    }
    Vec<T> temperature_derivative{};
    for (int64_t j = 0; gradients && j < n; ++j) {
      const Vec<T> p = simd::load<T>(weights + j * lanes) * inv_z, qj = simd::load<T>(q + j * lanes);
      auto [student_grad, teacher_grad] = logit_gradients(j, p, qj);
      if (any_dominant_class) {
        student_grad = select<T>(qj > half, -other_classes_student, student_grad);
        teacher_grad = select<T>(p > half, -other_classes_teacher, teacher_grad);
      }
      if (student_out) student_out->write(j, student_grad * scale);
      if (teacher_out) teacher_out->write(j, teacher_grad * scale);
      temperature_derivative += select<T>(student_grad == T(0), zero, student_grad * ((student[j] - s.base_max) * s.inv_t)) +
                                select<T>(teacher_grad == T(0), zero, teacher_grad * ((teacher[j] - s.base_max) * s.inv_t));
    }
    const Vec<T> value = beta_ * mean_a + a_ * mean_b;
    return {value < T(0) ? zero : value, Reduce::template sum<T>(temperature_derivative) * T(kDerivativeUnit), splat<T>(T(1))};
  }

 private:
  struct Terms {
    Vec<T> q, a, b;       // q, log(p / M), log(q / M)
    Vec<T> p_psi, q_psi;  // p psi(a u), q psi(beta v)
  };

  // q is computed as exp(log_q) q_scale if the networks are far apart, or if p is zero or too small
  // to compute q as p e^-z.
  Terms terms(Vec<T> p, Vec<T> z, Vec<T> log_q, Vec<T> q_scale, Mask<T> far_apart) const {
    Terms t;
    const Vec<T> limit = splat<T>(-simd::Constants<T>::exp_lowest);
    const auto parts = simd::exp_parts<T>(-simd::max(-limit, z < limit ? z : limit));
    const Vec<T> u = parts.scale * (parts.r + parts.h) + (parts.scale - T(1));
    const Vec<T> ratio = parts.scale * (parts.r + parts.h) + parts.scale, inverse = T(1) / ratio, v = -u * inverse;
    t.q = p * ratio;  // p + p u would be inaccurate for a q much smaller than p
    const Mask<T> use_exponential = far_apart | ~(z > T(-16));
    if (__builtin_expect(any(use_exponential), 0)) t.q = select<T>(use_exponential, simd::exp<T>(log_q) * q_scale, t.q);
    const auto teacher_log = log_and_psi(a_ * u, beta_ + a_ * ratio, a_ * u > T(-0.25));
    const auto student_log = log_and_psi(beta_ * v, a_ + beta_ * inverse, beta_ * v > T(-0.25));
    t.a = -teacher_log.log;
    t.b = -student_log.log;
    const Mask<T> p_is_zero = p == T(0), q_is_zero = t.q == T(0);
    t.p_psi = select<T>(teacher_log.from_series, p * teacher_log.psi, a_ * (t.q - p) + p * t.a);
    t.q_psi = select<T>(student_log.from_series, t.q * student_log.psi, beta_ * (p - t.q) + t.q * t.b);
    t.p_psi = select<T>(p_is_zero, a_ * t.q, t.p_psi);
    t.q_psi = select<T>(q_is_zero, beta_ * p, t.q_psi);
    return t;
  }

  static LogAndPsi<T> log_and_psi(Vec<T> x, Vec<T> one_plus_x, Mask<T> small) {
    return temperature_kl::log_and_psi<T>(x, select<T>(small, T(1) + x, one_plus_x));
  }

  T beta_, a_;
};

}  // namespace kdkernels::temperature_kl
