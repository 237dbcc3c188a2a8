// The vectors a_j of small float64 matrices of any condition number:
// reduction to a triangular matrix by Householder reflections, and one-sided Jacobi rotations of
// its rows. No product of M with itself is formed, so the errors are a few rounding errors of
// sigma_1, as those of LAPACK.
//
// M = L Q with L [p, p] lower triangular. Rotations of pairs of rows make the rows of J L
// orthogonal. Their lengths are then the singular values of M, and the rows of J are the vectors
// a_j. Pairs are visited in the same order in every sweep, until a sweep finds no pair to rotate.
//
// A group of matrices is processed with a matrix in each lane. If there are only a few, one matrix
// is processed after another, with pairs of rows in lanes: pairs (i, t) with the same sum i + t have
// no row in common, and a pair depends only on pairs with smaller sums, so that they can be rotated
// at the same time, one sum after another. Both ways add the same terms in the same order, and a
// pair that is not to be rotated is multiplied by the identity, so the result for a matrix does not
// depend on the other matrices.
//
// J. Demmel, K. Veselic. Jacobi's Method is More Accurate than QR. SIAM J. Matrix Anal. Appl. 13,
// 1992.
#pragma once

#include <cmath>
#include <numeric>

#include "products.h"
#include "spectrum.h"

namespace kdkernels::truncated_svd {

class Jacobi {
 public:
  static constexpr int kGroup = kLanes<double>;
  // Above this side, rounds.h takes less time.
  static constexpr int64_t kMaxSide = 32;

  Jacobi(const Matrices& m, int64_t k)
      : m_(m),
        k_(k),
        stride_(padded<double>(m.q)),
        line_(padded<double>(m.p) + 2 * kGroup),
        rows_(m.p * stride_),
        l_(m.p * std::max(m.p, line_ / kGroup)),
        j_(m.p * std::max(m.p, line_ / kGroup)),
        squares_(std::max(m.p, line_ / kGroup)),
        order_(m.p) {}

  // Computes the vectors a [count][k][p] of `count` <= kGroup matrices.
  void run(const int64_t* indices, int64_t count, Reader<double>& reader, double* a) {
    const int64_t p = m_.p;
    if (count <= kFewMatrices) {
      for (int64_t i = 0; i < count; ++i) run_one(indices[i], reader, a + i * k_ * p);
      return;
    }
    std::fill(l_.get(), l_.get() + p * p, Doubles{});
    for (int64_t lane = 0; lane < count; ++lane) {
      read(indices[lane], reader);
      triangularize([&](int64_t i, int64_t c) -> double& { return reinterpret_cast<double*>(l(i) + c)[lane]; });
    }
    rotate();
    for (int64_t i = 0; i < p; ++i) {
      squares_[i] = dot(l(i), l(i));
      // The rounding errors of many rotations change the lengths.
      const Doubles factor = 1.0 / simd::sqrt(dot(j(i), j(i)));
      for (int64_t c = 0; c < p; ++c) j(i)[c] *= factor;
    }
    for (int64_t lane = 0; lane < count; ++lane) {
      std::iota(order_.begin(), order_.end(), 0);
      std::stable_sort(order_.begin(), order_.end(), [&](int64_t i, int64_t t) { return squares_[i][lane] > squares_[t][lane]; });
      for (int64_t i = 0; i < k_; ++i)
        for (int64_t c = 0; c < p; ++c) a[(lane * k_ + i) * p + c] = j(order_[i])[c][lane];
    }
  }

 private:
  // Reads M times the power of two that brings its largest magnitude near 1.
  void read(int64_t b, Reader<double>& reader) {
    Doubles largest{};
    for (int64_t first = 0; first < m_.q; first += reader.columns()) {
      const Block<double> block = reader.read(b, first);
      if (m_.p_contiguous) {
        for (int64_t r = 0; r < block.rows; r += kGroup)
          for (int64_t i = 0; i < m_.p; i += kGroup) {
            Doubles part[kGroup];
            for (int64_t n = 0; n < kGroup; ++n)
              part[n] = r + n < block.rows ? simd::load<double>(block.data + (r + n) * block.stride + i) : Doubles{};
            transpose<double>(part);
            for (int64_t n = 0; n < kGroup && i + n < m_.p; ++n) {
              largest = simd::max(largest, abs<double>(part[n]));
              simd::store<double>(row(i + n) + first + r, part[n]);
            }
          }
      } else {
        for (int64_t i = 0; i < block.rows; ++i)
          for (int64_t c = 0; c < block.length; c += kGroup) {
            const Doubles part = simd::load<double>(block.data + i * block.stride + c);
            largest = simd::max(largest, abs<double>(part));
            simd::store<double>(row(i) + first + c, part);
          }
      }
    }
    const double max_magnitude = simd::largest<double>(largest);
    const Doubles scale = simd::splat<double>(max_magnitude > 0 ? std::ldexp(1.0, -std::ilogb(max_magnitude)) : 1.0);
    for (int64_t i = 0; i < m_.p * stride_; i += kGroup) simd::store<double>(rows_.get() + i, simd::load<double>(rows_.get() + i) * scale);
  }

  double* row(int64_t i) { return rows_.get() + i * stride_; }  // of M, q numbers
  Doubles* l(int64_t i) { return l_.get() + i * m_.p; }
  Doubles* j(int64_t i) { return j_.get() + i * m_.p; }

  // M = L Q. Row i of M becomes the vector of reflection i, which is 0 before element i.
  // element_of_l(i, c): where to store an element of L.
  template <typename Element>
  void triangularize(Element&& element_of_l) {
    for (int64_t i = 0; i < m_.p; ++i) {
      const int64_t first = i / kGroup * kGroup, count = stride_ - first;
      double* v = row(i) + first;
      for (int64_t c = 0; c < i; ++c) element_of_l(i, c) = row(i)[c];
      std::fill(v, row(i) + i, 0.0);
      const double pivot = row(i)[i], norm = std::sqrt(product<double>(v, v, count)), reduced = pivot > 0 ? -norm : norm;
      element_of_l(i, i) = norm > 0 ? reduced : 0;
      if (!(norm > 0)) continue;
      row(i)[i] = pivot - reduced;
      const double factor = -1 / (norm * (norm + std::abs(pivot)));  // -2 / |v|^2
      for (int64_t t = i + 1; t < m_.p; ++t)
        add_multiple<double>(factor * product<double>(v, row(t) + first, count), v, count, row(t) + first);
    }
  }

  // The sum of x(c) y(c) over all c.
  template <typename X, typename Y>
  KDKERNELS_INLINE Doubles sum_of_products(X&& x, Y&& y) const {
    Doubles sum[4] = {};
    int64_t c = 0;
    for (; c + 4 <= m_.p; c += 4)
      for (int n = 0; n < 4; ++n) sum[n] += x(c + n) * y(c + n);
    for (; c < m_.p; ++c) sum[0] += x(c) * y(c);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  Doubles dot(const Doubles* x, const Doubles* y) const {
    return sum_of_products([=](int64_t c) { return x[c]; }, [=](int64_t c) { return y[c]; });
  }

  // The rotations that make pairs of rows x and y orthogonal.
  struct Rotation {
    Mask<double> wanted;
    Doubles cosine, sine, moved;  // `moved` goes from the squared length of x to that of y
    KDKERNELS_INLINE void apply(Doubles& x, Doubles& y) const {
      const Doubles xc = x, yc = y;
      x = cosine * xc - sine * yc;
      y = sine * xc + cosine * yc;
    }
    KDKERNELS_INLINE void update_squares(Doubles& x, Doubles& y) const {
      x = simd::max(x - moved, Doubles{});
      y = simd::max(y + moved, Doubles{});
    }
  };
  static KDKERNELS_INLINE Rotation rotation(Doubles product, Doubles square_x, Doubles square_y, Doubles least_square) {
    Rotation r;
    r.wanted = (product * product > 4 * kEps * kEps * (square_x * square_y)) & (square_x > least_square) & (square_y > least_square);
    const Doubles zeta = (square_y - square_x) / (2.0 * product);
    const Doubles magnitude = 1.0 / (abs<double>(zeta) + simd::sqrt(1.0 + zeta * zeta));
    const Doubles tangent = r.wanted ? (zeta < 0.0 ? -magnitude : magnitude) : Doubles{};
    r.cosine = 1.0 / simd::sqrt(1.0 + tangent * tangent);
    r.sine = r.cosine * tangent;
    r.moved = r.wanted ? tangent * product : Doubles{};
    return r;
  }

  static constexpr double kEps = std::numeric_limits<double>::epsilon();
  // Rows whose squared length is below this, relative to the largest one, consist of rounding
  // errors. Their angles do not matter.
  static constexpr double kLeastSquare = kEps * kEps / 16;
  static constexpr int kMaxSweeps = 40;
  // More matrices take less time in lanes of matrices. Microseconds for 1 and 2 float64 matrices, all
  // p triplets, in lanes of matrices / one after another; AVX-512 on Zen 5:
  //   p = 16    27 /  14     29 /  22
  //   p = 32   156 /  62    171 / 111
  static constexpr int64_t kFewMatrices = kGroup > 2 ? 2 : 1;

  void rotate() {
    const int64_t p = m_.p;
    std::fill(j_.get(), j_.get() + p * p, Doubles{});
    for (int64_t i = 0; i < p; ++i) j(i)[i] = simd::splat<double>(1);
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      bool rotated = false;
      Doubles largest{};
      for (int64_t i = 0; i < p; ++i) {
        squares_[i] = dot(l(i), l(i));
        largest = simd::max(largest, squares_[i]);
      }
      const Doubles least_square = largest * kLeastSquare;
      for (int64_t i = 0; i + 1 < p; ++i)
        for (int64_t t = i + 1; t < p; ++t) {
          const Rotation r = rotation(dot(l(i), l(t)), squares_[i], squares_[t], least_square);
          if (!simd::any(r.wanted)) continue;
          rotated = true;
          for (Doubles* rows : {l_.get(), j_.get()})
            for (int64_t c = 0; c < p; ++c) r.apply(rows[i * p + c], rows[t * p + c]);
          r.update_squares(squares_[i], squares_[t]);
        }
      if (!rotated) return;
    }
  }

  // One matrix. Its L and J are stored by columns, with the rows in lanes: element c of row i is at
  // c line_ + i + kGroup, so that a vector may start before the first row and end behind the last.
  void run_one(int64_t b, Reader<double>& reader, double* a) {
    const int64_t p = m_.p;
    double *l = reinterpret_cast<double*>(l_.get()) + kGroup, *j = reinterpret_cast<double*>(j_.get()) + kGroup,
           *squares = reinterpret_cast<double*>(squares_.data()) + kGroup;
    std::fill_n(l_.get(), p * line_ / kGroup, Doubles{});
    std::fill_n(j_.get(), p * line_ / kGroup, Doubles{});
    for (int64_t i = 0; i < p; ++i) j[i * line_ + i] = 1;
    read(b, reader);
    triangularize([&](int64_t i, int64_t c) -> double& { return l[c * line_ + i]; });
    rotate_one(l, j, squares);
    square_lengths(l, squares);
    for (int64_t first = 0; first < p; first += kGroup) {
      auto vector = [&](int64_t c) { return simd::load<double>(j + c * line_ + first); };
      const Doubles factor = 1.0 / simd::sqrt(sum_of_products(vector, vector));
      for (int64_t c = 0; c < p; ++c) simd::store<double>(j + c * line_ + first, vector(c) * factor);
    }
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t i, int64_t t) { return squares[i] > squares[t]; });
    for (int64_t i = 0; i < k_; ++i)
      for (int64_t c = 0; c < p; ++c) a[i * p + c] = j[c * line_ + order_[i]];
  }

  // The squared lengths of the rows of a matrix that is stored by columns; returns the largest one.
  double square_lengths(const double* l, double* squares) const {
    Doubles largest{};
    for (int64_t first = 0; first < m_.p; first += kGroup) {
      auto vector = [&](int64_t c) { return simd::load<double>(l + c * line_ + first); };
      const Doubles square = sum_of_products(vector, vector);
      simd::store<double>(squares + first, square);
      largest = simd::max(largest, square);
    }
    return simd::largest<double>(largest);
  }

  void rotate_one(double* l, double* j, double* squares) {
    const int64_t p = m_.p;
    for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
      bool rotated = false;
      const Doubles least_square = simd::splat<double>(square_lengths(l, squares) * kLeastSquare);
      for (int64_t sum = 1; sum < 2 * p - 2; ++sum)
        for (int64_t i = std::max<int64_t>(0, sum - p + 1), end = (sum + 1) / 2; i < end; i += kGroup) {
          const int64_t count = std::min<int64_t>(kGroup, end - i), t = sum - i;  // rows i, i + 1, ... and t, t - 1, ...
          auto x = [=](const double* line) { return simd::load<double>(line + i); };
          auto y = [=](const double* line) { return reversed(simd::load<double>(line + t - (kGroup - 1))); };
          Rotation r = rotation(sum_of_products([&](int64_t c) { return x(l + c * line_); }, [&](int64_t c) { return y(l + c * line_); }),
                                x(squares), y(squares), least_square);
          if (!simd::any(r.wanted & first_lanes<double>(count))) continue;
          rotated = true;
          auto store = [=](double* line, Doubles of_x, Doubles of_y) {
            simd::store_lanes(line + i, 0, count, of_x);
            simd::store_lanes(line + t - (kGroup - 1), kGroup - count, kGroup, reversed(of_y));
          };
          for (double* lines : {l, j})
            for (int64_t c = 0; c < p; ++c) {
              Doubles xc = x(lines + c * line_), yc = y(lines + c * line_);
              r.apply(xc, yc);
              store(lines + c * line_, xc, yc);
            }
          Doubles of_x = x(squares), of_y = y(squares);
          r.update_squares(of_x, of_y);
          store(squares, of_x, of_y);
        }
      if (!rotated) return;
    }
  }

  static KDKERNELS_INLINE Doubles reversed(Doubles v) { return reversed(v, std::make_index_sequence<kGroup>{}); }
  template <size_t... I>
  static KDKERNELS_INLINE Doubles reversed(Doubles v, std::index_sequence<I...>) {
    return __builtin_shufflevector(v, v, (kGroup - 1 - int(I))...);
  }

  const Matrices& m_;
  int64_t k_, stride_, line_;
  Buffer<double> rows_;
  Buffer<Doubles> l_, j_;
  std::vector<Doubles> squares_;
  std::vector<int64_t> order_;
};

}  // namespace kdkernels::truncated_svd
