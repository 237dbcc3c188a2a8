// Decides whether the loss is computed from the series or from all pairs, and how many terms of the
// series are needed. docs/rbf_correlation.md derives the error bound.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace kdkernels::rbf_correlation {

constexpr int kMaxRank = 24;

// The smallest and largest number of a column. Both are NaN if the column holds a number that is
// not finite.
struct Range {
  double low, high;
  double middle() const { return low + (high - low) / 2; }
  double radius() const { return (high - low) / 2; }
};

inline Range join(const Range& a, const Range& b) {
  if (std::isnan(a.low + b.low)) return std::isnan(a.low) ? a : b;
  return {std::min(a.low, b.low), std::max(a.high, b.high)};
}

// Bounds of both sides after a common shift, which does not change the correlation: |x - center| <=
// a and |y - center| <= b. The number of terms depends on the product a b, which is smallest if the
// center is the middle of the narrower side.
struct CenteredBounds {
  double center, a, b;

  CenteredBounds(const Range& x, const Range& y) {
    const double distance = std::abs(x.middle() - y.middle());
    const bool x_is_narrower = x.radius() <= y.radius();
    center = x_is_narrower ? x.middle() : y.middle();
    a = x_is_narrower ? x.radius() : x.radius() + distance;
    b = x_is_narrower ? y.radius() + distance : y.radius();
  }
};

// The smallest R with z^(R-1) / (R-1)! <= accuracy for z = 2 a b / beta. This is the error that R
// terms leave in the derivative of the correlation, relative to this derivative. Returns kMaxRank +
// 1 if there is no such R up to kMaxRank or if z is NaN.
inline int rank_for(double z, double accuracy) {
  double error = 1;
  int rank = 1;
  while (rank <= kMaxRank && !(error <= accuracy)) {
    error *= z / rank;
    ++rank;
  }
  return rank;
}

// The truncation error that is allowed, relative to the retained terms. It is smaller than the
// rounding error of the result by a factor of a hundred to a thousand, because the loss is the
// remainder after most of the terms have cancelled.
constexpr double accuracy(bool is_double) {
  return is_double ? 0x1p-56 : 0x1p-28;
}

// The number of terms of the series of e^y for |y| <= largest, with an error four digits below the
// accuracy above; 0 if the series needs more operations than the exponential.
inline int exp_series_terms(double largest, bool is_double) {
  const double tolerance = accuracy(is_double) * (is_double ? 0.25 : 0x1p-12);
  double error = 1;
  int terms = 0;
  while (terms < 10 && error > tolerance) error *= largest / ++terms;
  return error <= tolerance ? std::max(terms, 1) : 0;
}

// Compares the operations of the two methods for one column. The constants are counts of
// instructions in the inner loops.
inline bool series_is_cheaper(int rank, int64_t m, int64_t n) {
  const double series_cost = static_cast<double>(m + n) * (120 + 4.0 * rank * rank);
  const double pairs_cost = static_cast<double>(m) * static_cast<double>(n) * 80;
  return rank <= kMaxRank && series_cost < pairs_cost;
}

}  // namespace kdkernels::rbf_correlation
