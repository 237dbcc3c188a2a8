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
// scaled by `scale`, and of cotangents scaled by `unit`, powers of two, so that no number leaves its range before the result does, which is
// then held at the largest number. 1 / sigma of a vanishing sigma is 0.
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

  // Numbers of a matrix that the second half needs of the first: C, h, and the unit of the cotangents.
  static int64_t kept_size(int64_t k) { return k * k + k + 1; }

  // r [k, stride], for the solve.
  void before(const Inputs& in, Reader<T>& reader, int64_t b, double scale, T* r, double* kept) {
    const int64_t p = m_.p;
    double *coefficients = kept, *h = kept + k_ * k_;
    prepare(in, scale);
    const double unit = unit_of(in, scale);
    h[k_] = unit;
    const T unit_t = static_cast<T>(unit);
    std::fill(mg_.get(), mg_.get() + k_ * stride_, T(0));
    if (in.gb) {
      for (int64_t first = 0; first < m_.q; first += reader.columns()) {
        const Block<T> block = reader.read(b, first);
        const int64_t count = std::min(reader.columns(), m_.q - first);
        for (int64_t j = 0; j < k_; ++j) {
          T* to = wy_.get() + j * lines_;
          for (int64_t c = 0; c < count; ++c) to[c] = static_cast<T>(scale) * (unit_t * in.gb[j * m_.q + first + c]);
          std::fill(to + count, to + lines_, T(0));
        }
        multiply_block<T>(m_, block, k_, wy_.get(), lines_, mg_.get(), stride_);
      }
      for (int64_t j = 0; j < k_; ++j) std::fill(mg_.get() + j * stride_ + p, mg_.get() + (j + 1) * stride_, T(0));
    }
    for (int64_t j = 0; j < k_; ++j) {
      const T* mg = mg_.get() + j * stride_;
      h[j] = (in.gs ? in.gs[j] * unit / scale : 0.0) - product<T>(in.a + j * stride_, mg, stride_) * inverse_[j] * inverse_[j];
      T* g = r + j * stride_;
      for (int64_t i = 0; i < p; ++i) g[i] = (in.ga ? unit_t * in.ga[j * p + i] : T(0)) + mg[i] * static_cast<T>(inverse_[j]);
      std::fill(g + p, g + stride_, T(0));
      for (int64_t i = 0; i < k_; ++i) coefficients[i * k_ + j] = product<T>(in.a + i * stride_, g, stride_);
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
    // What the result is multiplied with in the end: on the way, or, where that could leave the range, afterwards.
    const double back = scale / h[k_];
    const bool moderate = back > 0x1p-60 && back < 0x1p60;
    T* wy = wy_.get();
    for (int64_t first = 0; first < m_.q; first += reader.columns()) {
      const Block<T> block = reader.read(b, first);
      const int64_t count = std::min(reader.columns(), m_.q - first);
      project_block<T>(m_, block, 2 * k_, az, stride_, wy, lines_);
      for (int64_t j = 0; j < k_; ++j) {
        T *w = wy + j * lines_, *y = wy + (k_ + j) * lines_;
        const T along = static_cast<T>(h[j] * inverse_[j]), inverse = static_cast<T>(inverse_[j]), unit = static_cast<T>(h[k_]);
        const T factor = static_cast<T>(moderate ? back : 1.0);
        const T* gb = in.gb ? in.gb + j * m_.q + first : nullptr;
        for (int64_t c = 0; c < count; ++c) {
          y[c] = factor * (y[c] + along * w[c] + (gb ? unit * gb[c] * inverse : T(0)));
          w[c] *= factor;
        }
      }
      for (int64_t r = 0; r < block.rows; ++r) {
        Storage* to = m_.along_p ? out + (first + r) * out_row : out + r * out_row + first;
        const T *coefficient = m_.along_p ? wy + r : za + r, *vectors = m_.along_p ? za : wy;
        const int64_t coefficient_stride = m_.along_p ? lines_ : stride_, vector_stride = m_.along_p ? stride_ : lines_;
        sum_of_vectors<T>(2 * k_, coefficient, coefficient_stride, vectors, vector_stride, block.length, line_.get());
        if (!moderate) multiply(back, block.length, line_.get());
        put(line_.get(), block.length, to, stream);
      }
    }
  }

 private:
  void prepare(const Inputs& in, double scale) {
    for (int64_t j = 0; j < k_; ++j)
      inverse_[j] = in.sigma[j] > kNull<T> * in.sigma[0] ? 1 / (static_cast<double>(in.sigma[j]) * scale) : 0;
  }

  // A power of two that brings the largest cotangent near 1.
  double unit_of(const Inputs& in, double scale) const {
    double largest = 0;
    auto see = [&](const T* g, int64_t count, double factor) {
      Vec<T> most{};
      int64_t i = 0;
      for (; g && i + kLanes<T> <= count; i += kLanes<T>) most = simd::max(most, abs<T>(simd::load<T>(g + i)));
      T rest = simd::largest<T>(most);
      for (; g && i < count; ++i) rest = std::max(rest, std::abs(g[i]));
      largest = std::max(largest, rest * factor);
    };
    see(in.ga, k_ * m_.p, 1);
    see(in.gb, k_ * m_.q, 1);
    see(in.gs, k_, 1 / scale);
    if (!(largest > 0 && largest < std::numeric_limits<double>::infinity())) return 1;
    constexpr int most = std::numeric_limits<T>::max_exponent - 2;
    return std::ldexp(1.0, std::clamp(-std::ilogb(largest), -most, most));
  }

  static void multiply(double factor, int64_t count, T* line) {
    constexpr double most = std::numeric_limits<T>::max();
    for (int64_t c = 0; c < count; ++c) {
      const double value = line[c] * factor;
      line[c] = static_cast<T>(value > most ? most : value < -most ? -most : value);
    }
  }

  // x minus its parts along the kept vectors
  void remove(const T* a, T* x) const {
    for (int64_t i = 0; i < k_; ++i) add_multiple<T>(static_cast<T>(-product<T>(a + i * stride_, x, stride_)), a + i * stride_, stride_, x);
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
