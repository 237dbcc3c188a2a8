// The loss of one column pair by pair: where its numbers are too far apart for few terms, or there are few pairs. In double, whatever the
// inputs are: an exponential in float loses digits with the size of its exponent.
//
// S - T is not taken from S and T: with e = (s_x - t_x) - (s_y - t_y) and p = (s_x + t_x) - (s_y + t_y), log(S / T) = -e p / 2, so
// |S - T| = max(S, T) (1 - exp(-|e p| / 2)).
#pragma once

#include <memory>

#include "../common/simd.h"
#include "terms.h"

namespace kdkernels::rbf_correlation {

constexpr int64_t kRows = 128;  // of x: the gradient of y is summed over so many at a time

// Student's and teacher's numbers of one side, scaled: their difference and their sum.
struct Pair {
  std::unique_ptr<double[]> change, sum;

  Pair(const double* student, const double* teacher, int64_t n, double center, double scale)
      : change(new double[padded(n)]), sum(new double[padded(n)]) {
    for (int64_t i = 0; i < n; ++i) {
      change[i] = (student[i] - teacher[i]) * scale;
      sum[i] = ((student[i] - center) + (teacher[i] - center)) * scale;
    }
    for (int64_t i = n; i < padded(n); ++i) {  // far from all others: S = T = 0
      change[i] = 0;
      sum[i] = 1e100;
    }
  }
};

// Where the gradients of a side's numbers go, student's and teacher's: null where none is wanted.
struct Gradients {
  double* of[2];
};

// Rows [first, first + count) of x against all n of y: returns sum (S - T)^2. The gradients of x [count], and of y [padded(n)], which are
// added to, are half of dLoss / du.
inline double row_block(const Pair& x, const Pair& y, int64_t first, int64_t count, int64_t n, Gradients to_x, Gradients to_y) {
  double total = 0;
  for (int64_t m = 0; m < count; ++m) {
    const Doubles x_change = simd::splat<double>(x.change[first + m]), x_sum = simd::splat<double>(x.sum[first + m]);
    Doubles squares{}, row[2] = {};
    for (int64_t i = 0; i < n; i += kWide) {
      const Doubles e = x_change - load<double>(&y.change[i]), p = x_sum - load<double>(&y.sum[i]);
      const Doubles log_ratio = e * p * -0.5, s = (p + e) * 0.5, t = (p - e) * 0.5;
      const auto student_larger = log_ratio > 0.0;
      const Doubles larger = simd::exp<double>(select<double>(student_larger, s * s, t * t) * -0.5);
      const Fall fallen = fall(log_ratio);
      const Doubles step = larger * fallen.change, smaller = larger * fallen.value;
      const Doubles difference = select<double>(student_larger, -step, step);
      squares += difference * difference;
      const Doubles to[2] = {difference * select<double>(student_larger, larger, smaller) * s,
                             -difference * select<double>(student_larger, smaller, larger) * t};
      for (int net = 0; net < 2; ++net) {
        row[net] -= to[net];
        if (to_y.of[net] != nullptr) store<double>(to_y.of[net] + i, load<double>(to_y.of[net] + i) + to[net]);
      }
    }
    total += simd::sum<double>(squares);
    for (int net = 0; net < 2; ++net)
      if (to_x.of[net] != nullptr) to_x.of[net][m] = simd::sum<double>(row[net]);
  }
  return total;
}

}  // namespace kdkernels::rbf_correlation
