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
#include <array>
#include <type_traits>

#include "../common/scratch.h"
#include "../common/transpose.h"
#include "rank.h"

namespace kdkernels::rbf_correlation {

using simd::load;
using simd::select;
using simd::store;
using Doubles = simd::Vec<double>;

constexpr int kVectorSize = simd::kLanes<double>;
// The vector registers of a CPU hold this many sums and their operands.
constexpr int kSums = simd::kBytes == 64 ? 24 : 12;
constexpr int kTileRows = kSums / 4, kTileColumns = 4;  // of terms that are multiplied at a time
constexpr int kFilled = simd::kBytes == 64 ? 4 : 2;     // vectors of numbers whose terms are computed at a time
constexpr int kWeights = 8;                             // columns of weights that are multiplied at a time
constexpr int64_t kBlock = 512;                         // numbers whose terms are stored at a time
constexpr int kMaxRows = 2 * kMaxRank;                  // the rows of D, then those of A'

// Most inputs need at most this many terms. For each such number there are functions whose loops
// the compiler unrolls; other numbers share functions that take the number at run time, as kRank 0.
constexpr int kMaxFixedRank = 8;

template <int kRank = kMaxFixedRank, typename Body>
KDKERNELS_INLINE void with_rank(int rank, Body&& body) {
  if constexpr (kRank > 0)
    if (rank != kRank) return with_rank<kRank - 1>(rank, std::forward<Body>(body));
  body(std::integral_constant<int, kRank>());
}

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
  static_assert(kMaxRows % kVectorSize == 0);
  double values[kMaxRows][kMaxRows];
  int rank = 0;

  // Row q of the R x R products of two kinds of rows. E stands where D does, and B' where A' does.
  const double* dd(int q) const { return values[q]; }
  const double* da(int q) const { return values[q] + rank; }
  const double* ad(int q) const { return values[rank + q]; }
  const double* aa(int q) const { return values[rank + q] + rank; }

  int padded_rows() const { return static_cast<int>(padded(2 * rank)); }

  void clear(int new_rank) {
    rank = new_rank;
    for (int q = 0; q < padded_rows(); ++q) std::fill_n(values[q], padded_rows(), 0.0);
  }

  // Copies the products of rows q < r to those of r and q.
  void mirror() {
    for (int q = 0; q < padded_rows(); q += kVectorSize) {
      for (int i = 1; i < kVectorSize; ++i)
        for (int j = 0; j < i; ++j) values[q + i][q + j] = values[q + j][q + i];
      for (int r = q + kVectorSize; r < padded_rows(); r += kVectorSize) {
        Doubles block[kVectorSize];
        for (int i = 0; i < kVectorSize; ++i) block[i] = load<double>(&values[q + i][r]);
        simd::transpose<double>(block);
        for (int i = 0; i < kVectorSize; ++i) store<double>(&values[r + i][q], block[i]);
      }
    }
  }
};

// A pair of rows of terms, q <= r.
struct Pair {
  int q, r;
};
template <int kRows>
constexpr auto pairs() {
  std::array<Pair, kRows*(kRows + 1) / 2> result{};
  int count = 0;
  for (int q = 0; q < kRows; ++q)
    for (int r = q; r < kRows; ++r) result[count++] = {q, r};
  return result;
}

// The numbers of one side of a column, of student and teacher, and their terms, which are computed
// block by block.
class Side {
 public:
  explicit Side(int64_t n) : n_(n), teacher_(padded(n)), difference_(padded(n)), terms_(kMaxRows * std::min(padded(n), kBlock)) {}

  // Sets the numbers of this side, which satisfy |number - center| <= radius.
  void set(const double* student, const double* teacher, double center, double radius, double scale, int rank, bool is_double) {
    rank_ = rank;
    series_terms_ = exp_series_terms(radius * radius * scale * scale / 2, is_double);
    first_filled_ = -1;
    for (int64_t i = 0; i < n_; ++i) {
      teacher_.get()[i] = (teacher[i] - center) * scale;
      difference_.get()[i] = (student[i] - teacher[i]) * scale;
    }
    for (int64_t i = n_; i < padded(n_); ++i) {
      teacher_.get()[i] = 0;
      difference_.get()[i] = 0;
    }
  }

  template <int kRank>
  void multiply(Products& products) {
    products.clear(rank_);
    for (int64_t first = 0; first < n_; first += kBlock) {
      fill<kRank>(first);
      if constexpr (kRank > 0) {
        multiply_pairs<kRank, 0>(products);
      } else {
        for (int q = 0; q < 2 * rank_; q += kTileRows)
          for (int r = q; r < 2 * rank_; r += kTileColumns)
            with_tile<kTileRows>(2 * rank_ - q, [&](auto rows) {
              with_tile<kTileColumns>(2 * rank_ - r, [&](auto columns) { multiply_tile<rows.value, columns.value>(q, r, products); });
            });
      }
    }
    products.mirror();
  }

  // gradient[i] = factor * sum_r ((S - T) B)_ir phi_r'(u_i) for the student, and with B' instead of
  // B for the teacher. `other` holds the products of the other side.
  template <int kRank>
  void differentiate(const Products& other, bool student, double factor, double* gradient) {
    constexpr int kTogether = kRank > 0 && 2 * kRank <= kSums ? 2 : 1;
    // (S - T) B = D (B^T B) + A' (E^T B) for B = B' + E; (S - T) B' = D (B^T B') + A' (E^T B')
    double weights[kMaxRows][kMaxRank];
    for (int q = 0; q < rank_; ++q) {
      const double *ee = other.dd(q), *eb = other.da(q), *be = other.ad(q), *bb = other.aa(q);
      for (int r = 0; r < rank_; ++r) {
        weights[q][r] = bb[r] + eb[r] + (student ? be[r] + ee[r] : 0);
        weights[rank_ + q][r] = eb[r] + (student ? ee[r] : 0);
      }
    }
    for (int64_t first = 0; first < n_; first += kBlock) {
      fill<kRank>(first);
      for_vectors<kTogether>([&](auto count, int64_t i) {
        Doubles derivatives[count.value];
        differentiate_vectors<kRank, count.value>(weights, student, first, i, derivatives);
        for (int v = 0; v < count.value; ++v) store<double>(gradient + first + i + v * kVectorSize, derivatives[v] * factor);
      });
    }
  }

 private:
  // The terms of kVectorSize numbers are adjacent, so that an index known to the compiler is a
  // constant distance in memory.
  double* terms_of(int64_t i) const { return terms_.get() + i * 2 * rank_; }
  static double* row(double* terms, int r) { return terms + r * kVectorSize; }

  // Calls body(count, i) for the vectors of the block that begin at i, kTogether at a time and at the
  // end half as many: the operations of one vector depend on each other, and those of others run
  // meanwhile.
  template <int kTogether, typename Body>
  KDKERNELS_INLINE void for_vectors(Body&& body, int64_t i = 0) const {
    for (; i + kTogether * kVectorSize <= filled_count_; i += kTogether * kVectorSize) body(std::integral_constant<int, kTogether>(), i);
    if constexpr (kTogether > 1) for_vectors<kTogether / 2>(body, i);
  }

  template <int kRank>
  void fill(int64_t first) {
    if (first_filled_ == first) return;
    first_filled_ = first;
    filled_count_ = std::min(padded(n_) - first, kBlock);
    for_vectors<kFilled>([&](auto count, int64_t i) { fill_vectors<kRank, count.value>(first, i); });
  }

  template <int kRank, int kCount>
  KDKERNELS_INLINE void fill_vectors(int64_t first, int64_t i) const {
    const int rank = kRank > 0 ? kRank : rank_;
    Doubles t[kCount], difference[kCount], a[kCount], d[kCount];
    for (int v = 0; v < kCount; ++v) {
      t[v] = load<double>(teacher_.get() + first + i + v * kVectorSize);
      difference[v] = load<double>(difference_.get() + first + i + v * kVectorSize);
    }
    if (series_terms_ > 0)
      first_terms_by_series<kCount>(t, difference, a, d);
    else
      for (int v = 0; v < kCount; ++v) first_terms_by_exp(t[v], difference[v], a[v], d[v]);
    if (first + i + kCount * kVectorSize > n_)  // set the padding after the last number to zero
      for (int64_t lane = std::max<int64_t>(0, n_ - first - i); lane < kCount * kVectorSize; ++lane)
        a[lane / kVectorSize][lane % kVectorSize] = d[lane / kVectorSize][lane % kVectorSize] = 0;
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      double* to = terms_of(i + v * kVectorSize);
      store<double>(row(to, 0), d[v]);
      store<double>(row(to, rank), a[v]);
    }
#pragma GCC unroll 8
    for (int r = 1; r < rank; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        double* to = terms_of(i + v * kVectorSize);
        d[v] = (difference[v] * (a[v] + d[v]) + t[v] * d[v]) * kRoots.inverse_sqrt[r];
        a[v] = a[v] * t[v] * kRoots.inverse_sqrt[r];
        store<double>(row(to, r), d[v]);
        store<double>(row(to, rank + r), a[v]);
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
  template <int kCount>
  KDKERNELS_INLINE void first_terms_by_series(const Doubles (&t)[kCount], const Doubles (&difference)[kCount], Doubles (&a)[kCount],
                                              Doubles (&d)[kCount]) const {
    Doubles exponent[kCount], log_ratio[kCount], value[kCount], relative[kCount];
    for (int v = 0; v < kCount; ++v) {
      exponent[v] = t[v] * t[v] * -0.5;
      log_ratio[v] = difference[v] * (difference[v] + t[v] * 2.0) * -0.5;
      value[v] = relative[v] = simd::splat<double>(1.0);
    }
    for (int k = series_terms_; k > 1; --k)
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) {
        value[v] = value[v] * (exponent[v] * kRoots.inverse_r[k]) + 1.0;
        relative[v] = relative[v] * (log_ratio[v] * kRoots.inverse_r[k]) + 1.0;
      }
    for (int v = 0; v < kCount; ++v) {
      a[v] = value[v] * exponent[v] + 1.0;
      d[v] = a[v] * (relative[v] * log_ratio[v]);
    }
  }

  // Adds the products of kSums pairs of rows, beginning with pair kFirst, and of those after them.
  template <int kRank, int kFirst>
  void multiply_pairs(Products& products) const {
    constexpr auto kPairs = pairs<2 * kRank>();
    constexpr int kTotal = static_cast<int>(kPairs.size()), kCount = std::min(kSums, kTotal - kFirst);
    Doubles sums[kCount] = {};
    double* terms = terms_.get();
    for (int64_t i = 0; i < filled_count_; i += kVectorSize, terms += 2 * kRank * kVectorSize)
#pragma GCC unroll 24
      for (int p = 0; p < kCount; ++p)
        sums[p] += load<double>(row(terms, kPairs[kFirst + p].q)) * load<double>(row(terms, kPairs[kFirst + p].r));
    double totals[kSums];
    simd::sums<double, kCount>(sums, totals);
#pragma GCC unroll 24
    for (int p = 0; p < kCount; ++p) products.values[kPairs[kFirst + p].q][kPairs[kFirst + p].r] += totals[p];
    if constexpr (kFirst + kCount < kTotal) multiply_pairs<kRank, kFirst + kCount>(products);
  }

  template <int kRows, int kColumns>
  void multiply_tile(int q, int r, Products& products) const {
    Doubles sums[kRows * kColumns] = {};
    for (int64_t i = 0; i < filled_count_; i += kVectorSize) {
      double *from_q = row(terms_of(i), q), *from_r = row(terms_of(i), r);
      Doubles left[kRows];
#pragma GCC unroll 6
      for (int a = 0; a < kRows; ++a) left[a] = load<double>(row(from_q, a));
#pragma GCC unroll 4
      for (int b = 0; b < kColumns; ++b) {
        const Doubles right = load<double>(row(from_r, b));
#pragma GCC unroll 6
        for (int a = 0; a < kRows; ++a) sums[a * kColumns + b] += left[a] * right;
      }
    }
    double totals[kSums];
    simd::sums<double, kRows * kColumns>(sums, totals);
    for (int a = 0; a < kRows; ++a)
      for (int b = 0; b < kColumns; ++b) products.values[q + a][r + b] += totals[a * kColumns + b];
  }

  // phi_r' = sqrt(r) phi_(r-1) - u phi_r.
  template <int kRank, int kCount>
  KDKERNELS_INLINE void differentiate_vectors(const double (&weights)[kMaxRows][kMaxRank], bool student, int64_t first, int64_t i,
                                              Doubles (&derivatives)[kCount]) const {
    Doubles phi_sum[kCount] = {}, lower_phi_sum[kCount] = {};
    if constexpr (kRank > 0) {
      add_derivatives<kRank, kRank, kCount>(weights, student, 0, i, phi_sum, lower_phi_sum);
    } else {
      for (int r = 0; r < rank_; r += kWeights)
        with_tile<kWeights>(
            rank_ - r, [&](auto columns) { add_derivatives<0, columns.value, kCount>(weights, student, r, i, phi_sum, lower_phi_sum); });
    }
    for (int v = 0; v < kCount; ++v) {
      const int64_t number = first + i + v * kVectorSize;
      Doubles u = load<double>(teacher_.get() + number);
      if (student) u += load<double>(difference_.get() + number);
      derivatives[v] = lower_phi_sum[v] - u * phi_sum[v];
    }
  }

  // Adds the products with kColumns columns of weights, beginning with column r.
  template <int kRank, int kColumns, int kCount>
  KDKERNELS_INLINE void add_derivatives(const double (&weights)[kMaxRows][kMaxRank], bool student, int r, int64_t i,
                                        Doubles (&phi_sum)[kCount], Doubles (&lower_phi_sum)[kCount]) const {
    const int rank = kRank > 0 ? kRank : rank_;
    double* terms = terms_of(i);
    auto load_row = [&](int v, int q) { return load<double>(row(terms + v * 2 * rank * kVectorSize, q)); };
    Doubles g[kCount][kColumns] = {};
#pragma GCC unroll 16
    for (int q = 0; q < 2 * rank; ++q) {
      Doubles x[kCount];
#pragma GCC unroll 2
      for (int v = 0; v < kCount; ++v) x[v] = load_row(v, q);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 2
        for (int v = 0; v < kCount; ++v) g[v][j] += x[v] * weights[q][r + j];
    }
#pragma GCC unroll 2
    for (int v = 0; v < kCount; ++v) {
      auto phi = [&](int r) { return load_row(v, rank + r) + (student ? load_row(v, r) : Doubles{}); };
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) {
        phi_sum[v] += g[v][j] * phi(r + j);
        if (r + j > 0) lower_phi_sum[v] += g[v][j] * kRoots.sqrt_r[r + j] * phi(r + j - 1);
      }
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
  Buffer<double> teacher_, difference_, terms_;
};

// sum (S - T)^2 from the products of both sides. Rounding errors in a sum of cancelling terms can
// make it negative; it is then set to 0.
inline double square_sum(const Products& x, const Products& y) {
  Doubles sum{};
  double remainder = 0;
  for (int q = 0; q < x.rank; ++q) {
    const double *dd = x.dd(q), *da = x.da(q), *aa = x.aa(q);
    const double *ee = y.dd(q), *eb = y.da(q), *be = y.ad(q), *bb = y.aa(q);
    // tr(D^T D B^T B) + 2 tr(D^T A' E^T B) + tr(A'^T A' E^T E) for B = B' + E
    auto add = [&](auto numbers, int r, auto& total) {
      const auto b_and_e = numbers(be, r) + numbers(ee, r);
      total +=
          numbers(dd, r) * (numbers(bb, r) + numbers(eb, r) + b_and_e) + numbers(aa, r) * numbers(ee, r) + 2.0 * numbers(da, r) * b_and_e;
    };
    int r = 0;
    for (; r + kVectorSize <= x.rank; r += kVectorSize) add([](const double* p, int r) { return load<double>(p + r); }, r, sum);
    for (; r < x.rank; ++r) add([](const double* p, int r) { return p[r]; }, r, remainder);
  }
  return std::max(0.0, simd::sum<double>(sum) + remainder);
}

}  // namespace kdkernels::rbf_correlation
