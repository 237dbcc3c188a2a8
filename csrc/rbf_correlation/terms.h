// The loss of one column in linear time, from a series. docs/rbf_correlation.md derives it.
//
// Let u and w be scaled so that the correlation is exp(-(u - w)^2 / 2). The correlation is then
// sum_r phi_r(u) phi_r(w) with phi_r(u) = exp(-u^2 / 2) u^r / sqrt(r!). A and B hold the first R
// terms of the student's x and y [numbers, R], A' and B' those of the teacher's, and D = A - A', E
// = B - B'. Then
//     S - T = A B^T - A' B'^T = D B^T + A' E^T,
// whose sum of squares and whose products with B need only the R x R products of D and A', and of E
// and B'. D is computed from s - t without cancellation:
//     phi_r(s) - phi_r(t) = ((s - t) phi_(r-1)(s) + t (phi_(r-1)(s) - phi_(r-1)(t))) / sqrt(r).
// The arithmetic is in double whatever the inputs are.
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

constexpr int kVectorSize = simd::kLanes<double>;
constexpr int kTile = 4;                // largest number of rows of terms multiplied at a time
constexpr int kColumnTile = 8;          // largest number of columns of weights multiplied at a time
constexpr int64_t kBlock = 512;         // numbers whose terms are stored at a time
constexpr int kMaxRows = 2 * kMaxRank;  // the rows of D, then those of A'

struct Roots {
  double sqrt_r[kMaxRank], inverse_sqrt[kMaxRank];  // sqrt(r) and 1 / sqrt(r)
  double inverse_r[kMaxRank];                       // 1 / r
  Roots() {
    for (int r = 0; r < kMaxRank; ++r) {
      sqrt_r[r] = std::sqrt(static_cast<double>(r));
      inverse_sqrt[r] = 1 / sqrt_r[r];
      inverse_r[r] = 1.0 / r;
    }
  }
};
inline const Roots kRoots;

inline int64_t padded(int64_t n) {
  return (n + kVectorSize - 1) / kVectorSize * kVectorSize;
}

// e^-|y| and e^-|y| - 1, each with a small relative error.
struct ExpMinusAbs {
  Doubles exp, expm1;
};
KDKERNELS_INLINE ExpMinusAbs exp_minus_abs(Doubles y) {
  const simd::ExpParts<double> p =
      simd::exp_parts<double>(simd::max(simd::splat<double>(simd::Constants<double>::exp_lowest), y > 0.0 ? -y : y));
  const Doubles scaled_rest = p.scale * (p.r + p.h);
  return {p.scale + scaled_rest, scaled_rest + (p.scale - 1.0)};
}

// The products of all rows of terms with each other: of D and A' for one side, of E and B' for the
// other.
struct Products {
  double values[kMaxRows][kMaxRows];
  int rank = 0;

  double dd(int q, int r) const { return values[q][r]; }
  double da(int q, int r) const { return values[q][rank + r]; }
  double aa(int q, int r) const { return values[rank + q][rank + r]; }
  // For the other side: products of E and B = B' + E.
  double db(int q, int r) const { return da(q, r) + dd(q, r); }
  double bb(int q, int r) const { return aa(q, r) + da(q, r) + db(r, q); }
};

// The numbers of one side of a column, of student and teacher, and their terms, which are computed
// block by block.
class Side {
 public:
  explicit Side(int64_t n)
      : n_(n),
        teacher_(new double[padded(n)]),
        difference_(new double[padded(n)]),
        terms_(new double[kMaxRows * std::min(padded(n), kBlock)]) {}

  // Sets the numbers of this side, which satisfy |number - center| <= radius.
  void set(const double* student, const double* teacher, double center, double radius, double scale, int rank, bool is_double) {
    rank_ = rank;
    series_terms_ = exp_series_terms(radius * radius * scale * scale / 2, is_double);
    first_filled_ = -1;
    for (int64_t i = 0; i < n_; ++i) {
      teacher_[i] = (teacher[i] - center) * scale;
      difference_[i] = (student[i] - teacher[i]) * scale;
    }
    for (int64_t i = n_; i < padded(n_); ++i) {
      teacher_[i] = 0;
      difference_[i] = 0;
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

  // gradient[i] = factor * sum_r ((S - T) B)_ir phi_r'(u_i) for the student, and with B' instead of
  // B for the teacher. `other` holds the products of the other side.
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
      for (int64_t i = 0; i < filled_count_; i += kVectorSize)
        store<double>(gradient + first + i, factor * derivative(weights, student, first, i));
    }
  }

 private:
  double* term_row(int r) const { return terms_.get() + r * std::min(padded(n_), kBlock); }

  void fill(int64_t first) {
    if (first_filled_ == first) return;
    first_filled_ = first;
    filled_count_ = std::min(padded(n_) - first, kBlock);
    for (int64_t i = 0; i < filled_count_; i += kVectorSize) {
      const Doubles t = load<double>(&teacher_[first + i]), difference = load<double>(&difference_[first + i]);
      Doubles a, d;
      if (series_terms_ > 0)
        first_terms_by_series(t, difference, a, d);
      else
        first_terms_by_exp(t, difference, a, d);
      if (first + i + kVectorSize > n_)  // set the padding after the last number to zero
        for (int64_t lane = n_ - first - i; lane < kVectorSize; ++lane) a[lane] = d[lane] = 0;
      store<double>(term_row(0) + i, d);
      store<double>(term_row(rank_) + i, a);
      for (int r = 1; r < rank_; ++r) {
        const double scale = kRoots.inverse_sqrt[r];
        d = (difference * (a + d) + t * d) * scale;
        a = a * t * scale;
        store<double>(term_row(r) + i, d);
        store<double>(term_row(rank_ + r) + i, a);
      }
    }
  }

  // a = exp(-t^2 / 2) and d = exp(-s^2 / 2) - a for s = t + difference, from the exponential.
  KDKERNELS_INLINE static void first_terms_by_exp(Doubles t, Doubles difference, Doubles& a, Doubles& d) {
    const Doubles s = t + difference, log_ratio = difference * (s + t) * -0.5;
    const Doubles larger = simd::exp<double>(select<double>(log_ratio > 0.0, s * s, t * t) * -0.5);
    const ExpMinusAbs relative_exp = exp_minus_abs(log_ratio);
    const Doubles smaller_minus_larger = larger * relative_exp.expm1;
    d = select<double>(log_ratio > 0.0, -smaller_minus_larger, smaller_minus_larger);
    a = select<double>(log_ratio > 0.0, larger * relative_exp.exp, larger);
  }

  // The same for small exponents, from the first terms of the exponential's series.
  KDKERNELS_INLINE void first_terms_by_series(Doubles t, Doubles difference, Doubles& a, Doubles& d) const {
    const Doubles exponent = t * t * -0.5, log_ratio = difference * (difference + t * 2.0) * -0.5;
    Doubles value = simd::splat<double>(1.0), relative = value;
    for (int k = series_terms_; k > 1; --k) {
      value = value * (exponent * kRoots.inverse_r[k]) + 1.0;
      relative = relative * (log_ratio * kRoots.inverse_r[k]) + 1.0;
    }
    a = value * exponent + 1.0;
    d = a * (relative * log_ratio);
  }

  template <int kRows, int kColumns>
  void multiply_tile(int q, int r, Products& products) const {
    const double *from_q = term_row(q), *from_r = term_row(r);
    const int64_t row_stride = term_row(1) - term_row(0);
    Doubles sums[kRows][kColumns] = {};
    for (int64_t i = 0; i < filled_count_; i += kVectorSize) {
      Doubles left[kRows];
#pragma GCC unroll 4
      for (int a = 0; a < kRows; ++a) left[a] = load<double>(from_q + a * row_stride + i);
#pragma GCC unroll 4
      for (int b = 0; b < kColumns; ++b) {
        const Doubles right = load<double>(from_r + b * row_stride + i);
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
    Doubles phi_sum{}, lower_phi_sum{};
    for (int r = 0; r < rank_; r += kColumnTile)
      with_tile<kColumnTile>(rank_ - r,
                             [&](auto columns) { add_derivatives<columns.value>(weights, student, r, i, phi_sum, lower_phi_sum); });
    const Doubles u = load<double>(&teacher_[first + i]) + (student ? load<double>(&difference_[first + i]) : Doubles{});
    return lower_phi_sum - u * phi_sum;
  }

  template <int kColumns>
  KDKERNELS_INLINE void add_derivatives(const double (&weights)[kMaxRows][kMaxRank], bool student, int r, int64_t i, Doubles& phi_sum,
                                        Doubles& lower_phi_sum) const {
    Doubles g[kColumns] = {};
    for (int q = 0; q < 2 * rank_; ++q) {
      const Doubles x = load<double>(term_row(q) + i);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) g[j] += x * weights[q][r + j];
    }
    auto phi = [&](int r) { return load<double>(term_row(rank_ + r) + i) + (student ? load<double>(term_row(r) + i) : Doubles{}); };
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      phi_sum += g[j] * phi(r + j);
      if (r + j > 0) lower_phi_sum += g[j] * kRoots.sqrt_r[r + j] * phi(r + j - 1);
    }
  }

  // Calls body with a std::integral_constant of min(count, kMax).
  template <int kMax, typename Body>
  KDKERNELS_INLINE static void with_tile(int count, Body&& body) {
    if constexpr (kMax > 1)
      if (count < kMax) return with_tile<kMax - 1>(count, std::forward<Body>(body));
    body(std::integral_constant<int, kMax>());
  }

  int64_t n_, first_filled_ = -1, filled_count_ = 0;
  int rank_ = 0, series_terms_ = 0;
  std::unique_ptr<double[]> teacher_, difference_, terms_;
};

// sum (S - T)^2 from the products of both sides. Rounding errors in a sum of cancelling terms can
// make it negative; it is then set to 0.
inline double square_sum(const Products& x, const Products& y) {
  double total = 0;
  for (int q = 0; q < x.rank; ++q)
    for (int r = 0; r < x.rank; ++r) total += x.dd(q, r) * y.bb(q, r) + x.aa(q, r) * y.dd(q, r) + 2 * x.da(q, r) * y.db(r, q);
  return std::max(0.0, total);
}

}  // namespace kdkernels::rbf_correlation
