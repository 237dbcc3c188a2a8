// The derivative of the triplets (a_j, sigma_j, b_j) of M, from the kept ones alone and one projected solve.
//
// With cotangents ga, gs, gb, G = M M^T, lambda_j = sigma_j^2 and f(x) = x / (x^2 + eps^2):
//
//   h_j  = gs_j - <b_j, gb_j> / sigma_j             g_j = ga_j + M gb_j / sigma_j
//   C_ij = <a_i, g_j>                               r_j = g_j - sum_i a_i C_ij
//   z_j  = P f(lambda_j I - G) r_j + sum_{i != j} a_i (C_ij - C_ji) / 2 f(lambda_j - lambda_i)
//   dM   = sum_j z_j (M^T a_j)^T + a_j (M^T z_j + h_j b_j + gb_j / sigma_j)^T
//
// What a noise of gap_eps sigma_1 in M does to sigma_j^2 is eps = gap_eps sigma_1 sigma_j, with no sigma_j below gap_eps sigma_1, and the
// larger one between two kept values: so no gap makes more of an upstream gradient than 1 / (gap_eps sigma_1) of it.
//
// P removes the kept a. Only C_ij - C_ji enters: a loss of the span alone has none of it, whatever the gap. All of it is in units of M
// scaled by `scale`, a power of two, so that no number leaves its range; 1 / sigma of a vanishing sigma is 0.
#pragma once

#include <cmath>

#include "products.h"

namespace kdkernels::truncated_svd {

template <typename T>
class Derivative {
 public:
  // a [k, stride], 0 from p on; sigma [k]; cotangents ga [k, p], gs [k], gb [k, q], each possibly null.
  struct Inputs {
    const T *a, *sigma, *ga, *gs, *gb;
  };

  Derivative(const Matrices& m, int64_t k, int64_t stride, int64_t columns)
      : m_(m),
        k_(k),
        stride_(stride),
        lines_(padded<T>(columns)),
        inverse_(k),
        mg_(k * stride),
        za_(2 * k * stride),
        scaled_(2 * k * stride),
        wy_(2 * k * lines_),
        line_(padded<T>(std::max(m.p, columns))) {}

  // Numbers of a matrix that the second half needs of the first: C and h.
  static int64_t kept_size(int64_t k) { return k * k + k; }

  // r [k, stride], for the solve.
  void before(const Inputs& in, Reader<T>& reader, int64_t b, double scale, T* r, double* kept) {
    const int64_t p = m_.p;
    double *coefficients = kept, *h = kept + k_ * k_;
    prepare(in, scale);
    std::fill(mg_.get(), mg_.get() + k_ * stride_, T(0));
    if (in.gb) {
      for (int64_t first = 0; first < m_.q; first += reader.columns()) {
        const Block<T> block = reader.read(b, first);
        const int64_t count = std::min(reader.columns(), m_.q - first);
        for (int64_t j = 0; j < k_; ++j) {
          T* to = wy_.get() + j * lines_;
          for (int64_t c = 0; c < count; ++c) to[c] = static_cast<T>(scale) * in.gb[j * m_.q + first + c];
          std::fill(to + count, to + lines_, T(0));
        }
        multiply_block<T>(m_, block, k_, wy_.get(), lines_, mg_.get(), stride_);
      }
      for (int64_t j = 0; j < k_; ++j) std::fill(mg_.get() + j * stride_ + p, mg_.get() + (j + 1) * stride_, T(0));
    }
    for (int64_t j = 0; j < k_; ++j) {
      const T* mg = mg_.get() + j * stride_;
      h[j] = (in.gs ? in.gs[j] / scale : 0.0) - product(in.a + j * stride_, mg) * inverse_[j] * inverse_[j];
      T* g = r + j * stride_;
      for (int64_t i = 0; i < p; ++i) g[i] = (in.ga ? in.ga[j * p + i] : T(0)) + mg[i] * static_cast<T>(inverse_[j]);
      std::fill(g + p, g + stride_, T(0));
      for (int64_t i = 0; i < k_; ++i) coefficients[i * k_ + j] = product(in.a + i * stride_, g);
      remove(in.a, g);
    }
  }

  // z: the solutions, [k, stride]. Writes the gradient of matrix b to `out`, which lies in memory as M does: `along_p` rows of p or rows of
  // q.
  template <typename Storage>
  void after(const Inputs& in, const double* lambda, double gap_eps, Reader<T>& reader, int64_t b, double scale, const double* kept, T* z,
             Storage* out, int64_t out_row, bool stream) {
    prepare(in, scale);
    const double *coefficients = kept, *h = kept + k_ * k_;
    const double first = std::sqrt(lambda[0]);
    T *za = za_.get(), *az = scaled_.get();  // [z; a] as they enter the result, and scale [a; z], which M^T is multiplied with
    for (int64_t j = 0; j < k_; ++j) {
      T* own = z + j * stride_;
      remove(in.a, own);
      for (int64_t i = 0; i < k_; ++i) {
        const double eps = gap_eps * first * std::max(std::sqrt(std::max(lambda[i], lambda[j])), gap_eps * first);
        const double gap = lambda[j] - lambda[i], norm = gap * gap + eps * eps;
        const double factor = i == j || norm == 0 ? 0 : 0.5 * (coefficients[i * k_ + j] - coefficients[j * k_ + i]) * gap / norm;
        if (factor != 0)
          for (int64_t c = 0; c < m_.p; ++c) own[c] += static_cast<T>(factor) * in.a[i * stride_ + c];
      }
      std::copy_n(own, stride_, za + j * stride_);
      std::copy_n(in.a + j * stride_, stride_, za + (k_ + j) * stride_);
      for (int64_t c = 0; c < stride_; ++c) {
        az[j * stride_ + c] = static_cast<T>(scale) * in.a[j * stride_ + c];
        az[(k_ + j) * stride_ + c] = static_cast<T>(scale) * own[c];
      }
    }
    T* wy = wy_.get();
    for (int64_t first = 0; first < m_.q; first += reader.columns()) {
      const Block<T> block = reader.read(b, first);
      const int64_t count = std::min(reader.columns(), m_.q - first);
      project_block<T>(m_, block, 2 * k_, az, stride_, wy, lines_);
      for (int64_t j = 0; j < k_; ++j) {
        T *w = wy + j * lines_, *y = wy + (k_ + j) * lines_;
        const T along = static_cast<T>(h[j] * inverse_[j]), inverse = static_cast<T>(inverse_[j]), back = static_cast<T>(scale);
        const T* gb = in.gb ? in.gb + j * m_.q + first : nullptr;
        for (int64_t c = 0; c < count; ++c) {
          y[c] = back * (y[c] + along * w[c] + (gb ? gb[c] * inverse : T(0)));
          w[c] *= back;
        }
      }
      for (int64_t r = 0; r < block.rows; ++r) {
        Storage* to = m_.along_p ? out + (first + r) * out_row : out + r * out_row + first;
        const T *coefficient = m_.along_p ? wy + r : za + r, *vectors = m_.along_p ? za : wy;
        const int64_t coefficient_stride = m_.along_p ? lines_ : stride_, vector_stride = m_.along_p ? stride_ : lines_;
        sum_of_vectors<T>(2 * k_, coefficient, coefficient_stride, vectors, vector_stride, block.length, line_.get());
        put(line_.get(), block.length, to, stream);
      }
    }
  }

 private:
  void prepare(const Inputs& in, double scale) {
    for (int64_t j = 0; j < k_; ++j)
      inverse_[j] = in.sigma[j] > kNull<T> * in.sigma[0] ? 1 / (static_cast<double>(in.sigma[j]) * scale) : 0;
  }
  double product(const T* x, const T* y) const {
    Vec<T> sum{};
    for (int64_t i = 0; i < stride_; i += kLanes<T>) sum += simd::load<T>(x + i) * simd::load<T>(y + i);
    return simd::sum<T>(sum);
  }
  // x minus its parts along the kept vectors
  void remove(const T* a, T* x) const {
    for (int64_t i = 0; i < k_; ++i) {
      const Vec<T> along = simd::splat<T>(static_cast<T>(product(a + i * stride_, x)));
      for (int64_t c = 0; c < stride_; c += kLanes<T>)
        simd::store<T>(x + c, simd::load<T>(x + c) - along * simd::load<T>(a + i * stride_ + c));
    }
  }
  template <typename Storage>
  static void put(const T* line, int64_t count, Storage* to, bool stream) {
    if constexpr (std::is_same_v<Storage, T>) {
      if (stream) {
        for (int64_t c = 0; c < count; c += kLanes<T>) simd::stream<T>(to + c, simd::load<T>(line + c));
        return;
      }
    }
    convert(line, to, count);
  }

  const Matrices& m_;
  int64_t k_, stride_, lines_;
  std::vector<double> inverse_;
  Buffer<T> mg_, za_, scaled_, wy_, line_;
};

}  // namespace kdkernels::truncated_svd
