// The loss of one column as a sum over all pairs, for columns whose numbers are too far apart for a
// short series or that have few pairs. The arithmetic is in double whatever the inputs are, because
// the relative error of a float exponential grows with the magnitude of its exponent.
//
// S - T is not computed by subtracting T from S: with e = (s_x - t_x) - (s_y - t_y) and p = (s_x +
// t_x) - (s_y + t_y), log(S / T) = -e p / 2, so |S - T| = max(S, T) (1 - exp(-|e p| / 2)).
#pragma once

#include "../common/simd.h"
#include "terms.h"

namespace kdkernels::rbf_correlation {

constexpr int64_t kRows = 128;  // rows of x per block; the gradient of y is summed in one array per block

// The numbers of one side, scaled: the difference and the sum of the student's and the teacher's.
struct DifferenceAndSum {
  Buffer<double> difference, sum;

  explicit DifferenceAndSum(int64_t n) : difference(padded(n)), sum(padded(n)) {}

  void set(const double* student, const double* teacher, int64_t n, double center, double scale) {
    for (int64_t i = 0; i < n; ++i) {
      difference.get()[i] = (student[i] - teacher[i]) * scale;
      sum.get()[i] = ((student[i] - center) + (teacher[i] - center)) * scale;
    }
    for (int64_t i = n; i < padded(n); ++i) {  // far from all other numbers, so that S = T = 0
      difference.get()[i] = 0;
      sum.get()[i] = 1e100;
    }
  }
};

// Output arrays for the gradients of one side, the student's and the teacher's; null if a gradient
// is not wanted.
struct Gradients {
  double* arrays[2];
  bool wanted() const { return arrays[0] != nullptr || arrays[1] != nullptr; }
};

// Processes rows [first, first + count) of x with all n numbers of y and returns sum (S - T)^2. The
// gradients are half of dLoss / du: those of x [count] are written, and those of y [padded(n)] are
// added to. wants_gradients: whether any of them is not null.
template <bool wants_gradients>
double sum_row_block(const DifferenceAndSum& x, const DifferenceAndSum& y, int64_t first, int64_t count, int64_t n, Gradients grad_x,
                     Gradients grad_y) {
  Doubles total{};
  for (int64_t m = 0; m < count; ++m) {
    const Doubles x_difference = simd::splat<double>(x.difference.get()[first + m]), x_sum = simd::splat<double>(x.sum.get()[first + m]);
    Doubles squares{}, row_gradient[2] = {};
    for (int64_t i = 0; i < n; i += kVectorSize) {
      const Doubles e = x_difference - load<double>(y.difference.get() + i), p = x_sum - load<double>(y.sum.get() + i);
      const Doubles log_ratio = e * p * -0.5, s = (p + e) * 0.5, t = (p - e) * 0.5;
      const auto student_larger = log_ratio > 0.0;
      const Doubles larger = simd::exp<double>(select<double>(student_larger, s * s, t * t) * -0.5);
      const ExpMinusAbs relative = exp_minus_abs(log_ratio);
      const Doubles smaller_minus_larger = larger * relative.expm1, smaller = larger * relative.exp;
      const Doubles s_minus_t = select<double>(student_larger, -smaller_minus_larger, smaller_minus_larger);
      squares += s_minus_t * s_minus_t;
      if constexpr (!wants_gradients) continue;
      const Doubles pair_gradient[2] = {s_minus_t * select<double>(student_larger, larger, smaller) * s,
                                        -s_minus_t * select<double>(student_larger, smaller, larger) * t};
      for (int network = 0; network < 2; ++network) {
        row_gradient[network] -= pair_gradient[network];
        if (grad_y.arrays[network] != nullptr)
          store<double>(grad_y.arrays[network] + i, load<double>(grad_y.arrays[network] + i) + pair_gradient[network]);
      }
    }
    total += squares;
    for (int network = 0; network < 2; ++network)
      if (grad_x.arrays[network] != nullptr) grad_x.arrays[network][m] = simd::sum<double>(row_gradient[network]);
  }
  return simd::sum<double>(total);
}

}  // namespace kdkernels::rbf_correlation
