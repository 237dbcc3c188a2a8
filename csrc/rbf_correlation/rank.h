// Which way a loss is computed, and with how many terms. docs/rbf_correlation.md derives the bound.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace kdkernels::rbf_correlation {

constexpr int kMaxRank = 24;

// Smallest and largest number of a column; both NaN if it holds a number that is not finite.
struct Range {
  double low, high;
  double middle() const { return low + (high - low) / 2; }
  double radius() const { return (high - low) / 2; }
};

inline Range join(const Range& a, const Range& b) {
  if (std::isnan(a.low + b.low)) return std::isnan(a.low) ? a : b;
  return {std::min(a.low, b.low), std::max(a.high, b.high)};
}

// The correlation does not change when both sides move by the same amount. Moved by -center, |x| <= a and |y| <= b, and the product a b,
// on which the number of terms depends, is the smallest where the center is the middle of the narrower side.
struct Centered {
  double center, a, b;

  Centered(const Range& x, const Range& y) {
    const double apart = std::abs(x.middle() - y.middle());
    const bool by_x = x.radius() <= y.radius();
    center = by_x ? x.middle() : y.middle();
    a = by_x ? x.radius() : x.radius() + apart;
    b = by_x ? y.radius() + apart : y.radius();
  }
};

// The least R with z^(R-1) / (R-1)! <= accuracy for z = 2 a b / beta: what R terms leave out of the derivative of the correlation, relative
// to it. kMaxRank + 1 if there is none, or z is not a number.
inline int rank_for(double z, double accuracy) {
  double left = 1;
  int rank = 1;
  while (rank <= kMaxRank && !(left <= accuracy)) {
    left *= z / rank;
    ++rank;
  }
  return rank;
}

// Left out, relative to what is kept. A hundred to a thousand roundings below the result's own: the loss is what the terms leave after most
// of them cancel.
constexpr double accuracy(bool is_double) {
  return is_double ? 0x1p-56 : 0x1p-28;
}

// Terms of the series of e^y for |y| <= largest, four digits beyond the accuracy above; 0 where they are more than the exponential takes.
inline int series_for(double largest, bool is_double) {
  const double enough = accuracy(is_double) * (is_double ? 0.25 : 0x1p-12);
  double left = 1;
  int terms = 0;
  while (terms < 10 && left > enough) left *= largest / ++terms;
  return left <= enough ? std::max(terms, 1) : 0;
}

// Operations of both ways for one column, from the loops' instructions.
inline bool terms_are_cheaper(int rank, int64_t m, int64_t n) {
  const double by_terms = static_cast<double>(m + n) * (120 + 4.0 * rank * rank);
  const double by_pairs = static_cast<double>(m) * static_cast<double>(n) * 80;
  return rank <= kMaxRank && by_terms < by_pairs;
}

}  // namespace kdkernels::rbf_correlation
