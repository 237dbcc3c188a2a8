// The vectors a_j of small float64 matrices of any condition number:
// reduction to a triangular matrix by Householder reflections, and one-sided Jacobi rotations of
// its rows. No product of M with itself is formed, so the errors are a few rounding errors of
// sigma_1, as those of LAPACK.
//
// M = L Q with L [p, p] lower triangular. Rotations of pairs of rows make the rows of J L
// orthogonal. Their lengths are then the singular values of M, and the rows of J are the vectors
// a_j. Pairs are visited in the same order in every sweep, until a sweep finds no pair to rotate.
// The rotations process a group of matrices in lanes. A matrix without a pair to rotate is
// multiplied by the identity, so its result does not depend on the other matrices of the group.
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
      : m_(m), k_(k), stride_(padded<double>(m.q)), rows_(m.p * stride_), l_(m.p * m.p), j_(m.p * m.p), squares_(m.p), order_(m.p) {}

  // Computes the vectors a [count][k][p] of `count` <= kGroup matrices.
  void run(const int64_t* indices, int64_t count, Reader<double>& reader, double* a) {
    const int64_t p = m_.p;
    std::fill(l_.get(), l_.get() + p * p, Doubles{});
    for (int64_t lane = 0; lane < count; ++lane) {
      read(indices[lane], reader);
      triangularize(static_cast<int>(lane));
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
  void triangularize(int lane) {
    for (int64_t i = 0; i < m_.p; ++i) {
      const int64_t first = i / kGroup * kGroup, count = stride_ - first;
      double* v = row(i) + first;
      for (int64_t c = 0; c < i; ++c) l(i)[c][lane] = row(i)[c];
      std::fill(v, row(i) + i, 0.0);
      const double pivot = row(i)[i], norm = std::sqrt(product<double>(v, v, count)), reduced = pivot > 0 ? -norm : norm;
      l(i)[i][lane] = norm > 0 ? reduced : 0;
      if (!(norm > 0)) continue;
      row(i)[i] = pivot - reduced;
      const double factor = -1 / (norm * (norm + std::abs(pivot)));  // -2 / |v|^2
      for (int64_t t = i + 1; t < m_.p; ++t)
        add_multiple<double>(factor * product<double>(v, row(t) + first, count), v, count, row(t) + first);
    }
  }

  Doubles dot(const Doubles* x, const Doubles* y) const {
    Doubles sum[4] = {};
    int64_t c = 0;
    for (; c + 4 <= m_.p; c += 4)
      for (int n = 0; n < 4; ++n) sum[n] += x[c + n] * y[c + n];
    for (; c < m_.p; ++c) sum[0] += x[c] * y[c];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  void rotate() {
    constexpr double eps = std::numeric_limits<double>::epsilon();
    const int64_t p = m_.p;
    std::fill(j_.get(), j_.get() + p * p, Doubles{});
    for (int64_t i = 0; i < p; ++i) j(i)[i] = simd::splat<double>(1);
    for (int sweep = 0; sweep < 40; ++sweep) {
      bool rotated = false;
      Doubles largest{};
      for (int64_t i = 0; i < p; ++i) {
        squares_[i] = dot(l(i), l(i));
        largest = simd::max(largest, squares_[i]);
      }
      // Rows below this length consist of rounding errors. Their angles do not matter.
      const Doubles least_square = largest * (eps * eps / 16);
      for (int64_t i = 0; i + 1 < p; ++i)
        for (int64_t t = i + 1; t < p; ++t) {
          const Doubles product = dot(l(i), l(t));
          const Mask<double> wanted = (product * product > 4 * eps * eps * (squares_[i] * squares_[t])) & (squares_[i] > least_square) &
                                      (squares_[t] > least_square);
          if (!simd::any(wanted)) continue;
          rotated = true;
          const Doubles zeta = (squares_[t] - squares_[i]) / (2.0 * product);
          const Doubles magnitude = 1.0 / (abs<double>(zeta) + simd::sqrt(1.0 + zeta * zeta));
          const Doubles tangent = wanted ? (zeta < 0.0 ? -magnitude : magnitude) : Doubles{};
          const Doubles cosine = 1.0 / simd::sqrt(1.0 + tangent * tangent), sine = cosine * tangent;
          for (Doubles* rows : {l_.get(), j_.get()}) {
            Doubles *x = rows + i * p, *y = rows + t * p;
            for (int64_t c = 0; c < p; ++c) {
              const Doubles xc = x[c], yc = y[c];
              x[c] = cosine * xc - sine * yc;
              y[c] = sine * xc + cosine * yc;
            }
          }
          const Doubles moved = wanted ? tangent * product : Doubles{};
          squares_[i] = simd::max(squares_[i] - moved, Doubles{});
          squares_[t] = simd::max(squares_[t] + moved, Doubles{});
        }
      if (!rotated) return;
    }
  }

  const Matrices& m_;
  int64_t k_, stride_;
  Buffer<double> rows_;
  Buffer<Doubles> l_, j_;
  std::vector<Doubles> squares_;
  std::vector<int64_t> order_;
};

}  // namespace kdkernels::truncated_svd
