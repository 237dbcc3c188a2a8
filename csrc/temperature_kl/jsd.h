// Generalised Jensen-Shannon divergence of one tile: M = beta p + (1 - beta) q, p the teacher, q the student,
//     JSD = beta KL(p || M) + (1 - beta) KL(q || M)                                  (Agarwal et al. 2024, eq. 1; beta as in TRL and Liger)
// With z = log p - log q (from the centred divergence), u = e^-z - 1 = q/p - 1 and a = 1 - beta:
//     A = log(p / M) = -log(1 + a u),   B = log(q / M) = A - z
//     JSD = sum_j p f(u),  f(u) = a (1+u) log(1+u) - (1 + a u) log(1 + a u) >= 0      since sum_j p u = 0
//         = sum_j beta p A + a q B
//     dJSD / d(q logits) = a q (B - E_q[B]),   dJSD / d(p logits) = beta p (A - E_p[A])
// Small u take f's power series sum_{k>=2} (-1)^k (a - a^k) u^k / (k (k-1)): its terms of first order are gone, so nothing cancels.
#pragma once

#include "divergence.h"
#include "forms.h"

namespace kdkernels::temperature_kl {

template <typename T>
class Jsd {
 public:
  explicit Jsd(double beta) : beta_(static_cast<T>(beta)), a_(static_cast<T>(1 - beta)) {
    double power = 1 - beta;
    for (int k = 2; k < kTerms; ++k) {
      power *= 1 - beta;
      series_[k] = static_cast<T>(((1 - beta) - power) / (k * (k - 1.0)) * (k % 2 ? -1 : 1));
    }
  }

  // e[] is z p of the divergence(teacher, student); q[] and b[] are scratch. The sinks may be null.
  template <typename Reduce>
  ValueAndSlope<T> operator()(const Divergence<T>& s, const Source<T>& teacher, const Source<T>& student, const T* e, T* q, T* b,
                              Vec<T> scale, bool gradients, const Sink<T>* teacher_out, const Sink<T>* student_out) const {
    constexpr int lanes = simd::kLanes<T>;
    const int64_t n = teacher.vectors();
    const Vec<T> inv_z = T(1) / s.z, log_z = simd::log<T>(s.z), zero{};
    Vec<T> value{}, mean_a{}, mean_b{};
    for (int64_t begin = 0; begin < n; begin += kBlock) {
      Vec<T> value_sum{}, a_sum{}, b_sum{};
      for (int64_t j = begin, end = std::min(n, begin + kBlock); j < end; ++j) {
        const Vec<T> p = simd::load<T>(e + j * lanes) * inv_z;
        const Terms t = terms(p, (teacher[j] - student[j]) * s.inv_t - s.shift, (student[j] - s.top) * s.inv_t + s.shift - log_z);
        const Vec<T> pa = select<T>(p == T(0), zero, p * t.a), qb = select<T>(t.q == T(0), zero, t.q * t.b);
        value_sum += select<T>(t.near, p * t.f, beta_ * pa + a_ * qb);
        a_sum += pa;
        b_sum += qb;
        simd::store<T>(q + j * lanes, t.q);
        simd::store<T>(b + j * lanes, t.b);
      }
      value += value_sum;
      mean_a += a_sum;
      mean_b += b_sum;
    }
    value = Reduce::template sum<T>(value);
    mean_a = Reduce::template sum<T>(mean_a);
    mean_b = Reduce::template sum<T>(mean_b);

    const Vec<T> lone_teacher = -simd::log<T>(splat<T>(beta_));
    Vec<T> slope{};
    for (int64_t j = 0; gradients && j < n; ++j) {
      const Vec<T> p = simd::load<T>(e + j * lanes) * inv_z, qj = simd::load<T>(q + j * lanes), bj = simd::load<T>(b + j * lanes);
      const Vec<T> z = (teacher[j] - student[j]) * s.inv_t - s.shift;
      const Vec<T> to_student = select<T>(qj == T(0), zero, a_ * qj * (bj - mean_b));
      // log(p / M) = log(q / M) + z, but for a class that the student excludes: there M is beta p.
      const Vec<T> a = select<T>(z == std::numeric_limits<T>::infinity(), lone_teacher, bj + z);
      const Vec<T> to_teacher = select<T>(p == T(0), zero, beta_ * p * (a - mean_a));
      if (student_out) student_out->put(j, to_student * scale);
      if (teacher_out) teacher_out->put(j, to_teacher * scale);
      slope += select<T>(to_student == T(0), zero, to_student * ((student[j] - s.top) * s.inv_t)) +
               select<T>(to_teacher == T(0), zero, to_teacher * ((teacher[j] - s.top) * s.inv_t));
    }
    return {value < T(0) ? zero : value, -s.inv_t * Reduce::template sum<T>(slope)};
  }

 private:
  static constexpr int kTerms = 16;
  static constexpr T kNear = sizeof(T) == 4 ? T(0.25) : T(0.05);  // u^(kTerms - 2) is then below the rounding of T

  struct Terms {
    Vec<T> q, a, b, f;  // q, log(p / M), log(q / M), f(u)
    Mask<T> near;       // f(u) is from the series
  };

  // log_q is used where p is too small, or zero, to carry q = p e^-z.
  Terms terms(Vec<T> p, Vec<T> z, Vec<T> log_q) const {
    Terms t;
    const auto part = simd::exp_parts<T>(simd::max(splat<T>(simd::Constants<T>::exp_lowest), -z));
    const Vec<T> u = part.scale * (part.r + part.h) + (part.scale - T(1));
    t.q = p + p * u;
    t.a = -simd::log1p<T>(a_ * u);
    t.b = t.a - z;
    const Mask<T> student_alone = ~(z > T(-16));
    if (__builtin_expect(any(student_alone), 0)) {
      t.q = select<T>(student_alone, simd::exp<T>(log_q), t.q);
      t.b = select<T>(student_alone, -simd::log<T>(a_ + beta_ * simd::exp<T>(z)), t.b);
      t.a = select<T>(student_alone, t.b + z, t.a);
    }
    Vec<T> poly = splat<T>(series_[kTerms - 1]);
    for (int k = kTerms - 2; k >= 2; --k) poly = poly * u + series_[k];
    t.f = poly * u * u;
    t.near = (u < kNear) & (u > -kNear) & ~student_alone;
    return t;
  }

  T beta_, a_;
  T series_[kTerms];
};

}  // namespace kdkernels::temperature_kl
