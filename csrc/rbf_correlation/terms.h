// The loss of one column in linear time.
//
// With u and w scaled so that the correlation is exp(-(u - w)^2 / 2), it is sum_r phi_r(u) phi_r(w), phi_r(u) = exp(-u^2 / 2) u^r /
// sqrt(r!). A and B hold the first R terms of x and y [numbers, R], A' and B' those of the teacher's, D = A - A', E = B - B'. Then
//   S - T = A B^T - A' B'^T = D B^T + A' E^T,
// its square sum and its products with B need the R x R products of D and A', and of E and B', alone. D comes from s - t without
// cancellation:
//   phi_r(s) - phi_r(t) = ((s - t) phi_(r-1)(s) + t (phi_(r-1)(s) - phi_(r-1)(t))) / sqrt(r).
// All of it in double, whatever the inputs are.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "../common/simd.h"
#include "rank.h"

namespace kdkernels::rbf_correlation {

using simd::load;
using simd::select;
using simd::store;
using Doubles = simd::Vec<double>;

constexpr int kWide = simd::kLanes<double>;
constexpr int kTile = 4;                // rows of terms that are multiplied at a time, at most
constexpr int kColumnTile = 8;          // columns of weights that they meet at a time, at most
constexpr int64_t kBlock = 512;         // numbers whose terms are held at a time
constexpr int kMaxRows = 2 * kMaxRank;  // D's, then A''s

struct Roots {
  double root[kMaxRank], inverse[kMaxRank];  // of r, and 1 over it
  double inverse_of[kMaxRank];               // 1 / r
  Roots() {
    for (int r = 0; r < kMaxRank; ++r) {
      root[r] = std::sqrt(static_cast<double>(r));
      inverse[r] = 1 / root[r];
      inverse_of[r] = 1.0 / r;
    }
  }
};
inline const Roots kRoots;

inline int64_t padded(int64_t n) {
  return (n + kWide - 1) / kWide * kWide;
}

// e^-|y|, and that less 1: each to its own last digits.
struct Fall {
  Doubles value, change;
};
KDKERNELS_INLINE Fall fall(Doubles y) {
  const simd::ExpParts<double> p =
      simd::exp_parts<double>(simd::max(simd::splat<double>(simd::Constants<double>::exp_lowest), y > 0.0 ? -y : y));
  const Doubles rest = p.scale * (p.r + p.h);
  return {p.scale + rest, rest + (p.scale - 1.0)};
}

// The products of all rows of terms with one another.
struct Products {
  double values[kMaxRows][kMaxRows];
  int rank = 0;

  double dd(int q, int r) const { return values[q][r]; }
  double da(int q, int r) const { return values[q][rank + r]; }
  double aa(int q, int r) const { return values[rank + q][rank + r]; }
  // Of E and B = B' + E, for the other side.
  double db(int q, int r) const { return da(q, r) + dd(q, r); }
  double bb(int q, int r) const { return aa(q, r) + da(q, r) + db(r, q); }
};

// The numbers of one side of a column, student's and teacher's, and their terms, a block at a time.
class Side {
 public:
  explicit Side(int64_t n)
      : n_(n),
        teacher_(new double[padded(n)]),
        change_(new double[padded(n)]),
        terms_(new double[kMaxRows * std::min(padded(n), kBlock)]) {}

  // |number - center| <= radius.
  void set(const double* student, const double* teacher, double center, double radius, double scale, int rank, bool is_double) {
    rank_ = rank;
    series_ = series_for(radius * radius * scale * scale / 2, is_double);
    filled_ = -1;
    for (int64_t i = 0; i < n_; ++i) {
      teacher_[i] = (teacher[i] - center) * scale;
      change_[i] = (student[i] - teacher[i]) * scale;
    }
    for (int64_t i = n_; i < padded(n_); ++i) {
      teacher_[i] = 0;
      change_[i] = 0;
    }
  }

  void multiply(Products& products) {
    products.rank = rank_;
    for (int q = 0; q < 2 * rank_; ++q)
      for (int r = 0; r < 2 * rank_; ++r) products.values[q][r] = 0;
    for (int64_t first = 0; first < n_; first += kBlock) {
      fill(first);
      for (int q = 0; q < 2 * rank_; q += kTile)
        for (int r = q; r < 2 * rank_; r += kTile)
          with_tile<kTile>(2 * rank_ - q, [&](auto rows) {
            with_tile<kTile>(2 * rank_ - r, [&](auto columns) { multiply_tile<rows.value, columns.value>(q, r, products); });
          });
    }
    for (int q = 0; q < 2 * rank_; ++q)
      for (int r = 0; r < q; ++r) products.values[q][r] = products.values[r][q];
  }

  // gradient[i] = factor * sum_r ((S - T) B)_ir phi_r'(u_i) for the student, with B' for the teacher; `other` holds the other side's
  // products.
  void differentiate(const Products& other, bool student, double factor, double* gradient) {
    // (S - T) B = D (B^T B) + A' (E^T B)
    double weights[kMaxRows][kMaxRank];
    for (int q = 0; q < rank_; ++q)
      for (int r = 0; r < rank_; ++r) {
        weights[q][r] = student ? other.bb(q, r) : other.aa(q, r) + other.da(q, r);
        weights[rank_ + q][r] = student ? other.db(q, r) : other.da(q, r);
      }
    for (int64_t first = 0; first < n_; first += kBlock) {
      fill(first);
      for (int64_t i = 0; i < filled_count_; i += kWide)
        store<double>(gradient + first + i, factor * derivative(weights, student, first, i));
    }
  }

 private:
  double* row(int r) const { return terms_.get() + r * std::min(padded(n_), kBlock); }

  void fill(int64_t first) {
    if (filled_ == first) return;
    filled_ = first;
    filled_count_ = std::min(padded(n_) - first, kBlock);
    for (int64_t i = 0; i < filled_count_; i += kWide) {
      const Doubles t = load<double>(&teacher_[first + i]), change = load<double>(&change_[first + i]);
      Doubles a, d;
      if (series_ > 0)
        near(t, change, a, d);
      else
        far(t, change, a, d);
      if (first + i + kWide > n_)  // behind the last number there is none
        for (int64_t lane = n_ - first - i; lane < kWide; ++lane) a[lane] = d[lane] = 0;
      store<double>(row(0) + i, d);
      store<double>(row(rank_) + i, a);
      for (int r = 1; r < rank_; ++r) {
        const double scale = kRoots.inverse[r];
        d = (change * (a + d) + t * d) * scale;
        a = a * t * scale;
        store<double>(row(r) + i, d);
        store<double>(row(rank_ + r) + i, a);
      }
    }
  }

  // a = exp(-t^2 / 2), and d = exp(-s^2 / 2) - a for s = t + change.
  KDKERNELS_INLINE static void far(Doubles t, Doubles change, Doubles& a, Doubles& d) {
    const Doubles s = t + change, log_ratio = change * (s + t) * -0.5;
    const Doubles larger = simd::exp<double>(select<double>(log_ratio > 0.0, s * s, t * t) * -0.5);
    const Fall fallen = fall(log_ratio);
    const Doubles step = larger * fallen.change;
    d = select<double>(log_ratio > 0.0, -step, step);
    a = select<double>(log_ratio > 0.0, larger * fallen.value, larger);
  }

  // The same where both exponents are small: by the first terms of the exponential's series.
  KDKERNELS_INLINE void near(Doubles t, Doubles change, Doubles& a, Doubles& d) const {
    const Doubles exponent = t * t * -0.5, log_ratio = change * (change + t * 2.0) * -0.5;
    Doubles value = simd::splat<double>(1.0), relative = value;
    for (int k = series_; k > 1; --k) {
      value = value * (exponent * kRoots.inverse_of[k]) + 1.0;
      relative = relative * (log_ratio * kRoots.inverse_of[k]) + 1.0;
    }
    a = value * exponent + 1.0;
    d = a * (relative * log_ratio);
  }

  template <int kRows, int kColumns>
  void multiply_tile(int q, int r, Products& products) const {
    const double *from_q = row(q), *from_r = row(r);
    const int64_t step = row(1) - row(0);
    Doubles sums[kRows][kColumns] = {};
    for (int64_t i = 0; i < filled_count_; i += kWide) {
      Doubles left[kRows];
#pragma GCC unroll 4
      for (int a = 0; a < kRows; ++a) left[a] = load<double>(from_q + a * step + i);
#pragma GCC unroll 4
      for (int b = 0; b < kColumns; ++b) {
        const Doubles right = load<double>(from_r + b * step + i);
#pragma GCC unroll 4
        for (int a = 0; a < kRows; ++a) sums[a][b] += left[a] * right;
      }
    }
#pragma GCC unroll 4
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < kColumns; ++b) products.values[q + a][r + b] += simd::sum<double>(sums[a][b]);
  }

  // phi_r' = sqrt(r) phi_(r-1) - u phi_r.
  Doubles derivative(const double (&weights)[kMaxRows][kMaxRank], bool student, int64_t first, int64_t i) const {
    Doubles same{}, lower{};
    for (int r = 0; r < rank_; r += kColumnTile)
      with_tile<kColumnTile>(rank_ - r, [&](auto columns) { add_derivatives<columns.value>(weights, student, r, i, same, lower); });
    const Doubles u = load<double>(&teacher_[first + i]) + (student ? load<double>(&change_[first + i]) : Doubles{});
    return lower - u * same;
  }

  template <int kColumns>
  KDKERNELS_INLINE void add_derivatives(const double (&weights)[kMaxRows][kMaxRank], bool student, int r, int64_t i, Doubles& same,
                                        Doubles& lower) const {
    Doubles g[kColumns] = {};
    for (int q = 0; q < 2 * rank_; ++q) {
      const Doubles x = load<double>(row(q) + i);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) g[j] += x * weights[q][r + j];
    }
    auto phi = [&](int r) { return load<double>(row(rank_ + r) + i) + (student ? load<double>(row(r) + i) : Doubles{}); };
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      same += g[j] * phi(r + j);
      if (r + j > 0) lower += g[j] * kRoots.root[r + j] * phi(r + j - 1);
    }
  }

  // body(std::integral_constant of min(count, kMost)).
  template <int kMost, typename Body>
  KDKERNELS_INLINE static void with_tile(int count, Body&& body) {
    if constexpr (kMost > 1)
      if (count < kMost) return with_tile<kMost - 1>(count, std::forward<Body>(body));
    body(std::integral_constant<int, kMost>());
  }

  int64_t n_, filled_ = -1, filled_count_ = 0;
  int rank_ = 0, series_ = 0;
  std::unique_ptr<double[]> teacher_, change_, terms_;
};

// sum (S - T)^2 from the products of both sides; not below 0, where rounding would take a sum of terms that cancel.
inline double square_sum(const Products& x, const Products& y) {
  double total = 0;
  for (int q = 0; q < x.rank; ++q)
    for (int r = 0; r < x.rank; ++r) total += x.dd(q, r) * y.bb(q, r) + x.aa(q, r) * y.dd(q, r) + 2 * x.da(q, r) * y.db(r, q);
  return std::max(0.0, total);
}

}  // namespace kdkernels::rbf_correlation
