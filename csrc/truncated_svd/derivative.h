// The derivative of the triplets (a_j, sigma_j, b_j) of M, from the kept ones alone and one projected solve.
//
// With cotangents ga, gs, gb, G = M M^T, lambda_j = sigma_j^2, P that removes the kept a, and f(x) = x / (x^2 + eps^2):
//
//   r_j  = P (ga_j + M gb_j / sigma_j)
//   A_ij = <a_i, ga_j> - <a_j, ga_i>                B_ij = <b_i, gb_j> - <b_j, gb_i>
//   z_j  = P f(lambda_j I - G) r_j + sum_{i != j} a_i A_ij / 2 f(lambda_j - lambda_i)
//   y_j  = M^T z_j + gs_j b_j + (gb_j - sum_i b_i <b_i, gb_j>) / sigma_j + sum_{i != j} b_i sigma_j B_ji f(lambda_i - lambda_j)
//   dM   = sum_j z_j (M^T a_j)^T + a_j y_j^T
//
// What a noise of gap_eps sigma_1 in M does to sigma_j^2 is eps = gap_eps sigma_1 sigma_j, with no sigma_j below gap_eps sigma_1, and the
// larger one between two kept values: so no gap makes more of an upstream gradient than 1 / (gap_eps sigma_1) of it.
//
// The kept vectors meet in A and B alone, which are 0 for a function of a span, whatever the gap.
//
// All of it is in units of M scaled by `scale`, and of cotangents scaled by `unit`, powers of two, so that no number leaves its range
// before the result does, which is then held at the largest number. 1 / sigma of a vanishing sigma is 0.
#pragma once

#include <cmath>

#include "products.h"
#include "truncated_svd.h"

namespace kdkernels::truncated_svd {

template <typename T>
class Derivative {
 public:
  // a [k, stride], 0 from p on; b [k, q], where gb is; sigma [k]; cotangents ga [k, p], gs [k], gb [k, q], each possibly null.
  struct Inputs {
    const T *a, *b, *sigma, *ga, *gs, *gb;
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

  // Numbers of a matrix that the second half needs of the first: A, B, <b_i, gb_j>, and the unit of the cotangents.
  static int64_t kept_size(int64_t k) { return 3 * k * k + 1; }

  // r [k, stride], for the solve.
  void before(const Inputs& in, Reader<T>& reader, int64_t b, double scale, T* r, double* kept) {
    const int64_t p = m_.p;
    const int64_t square = k_ * k_;
    prepare(in, scale);
    const double unit = unit_of(in, scale);
    kept[3 * square] = unit;
    const T unit_t = static_cast<T>(unit);
    differences(in.a, stride_, in.ga, p, unit, kept + 2 * square, kept);
    differences(in.b, m_.q, in.gb, m_.q, unit, kept + 2 * square, kept + square);
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
      T* g = r + j * stride_;
      for (int64_t i = 0; i < p; ++i) g[i] = (in.ga ? unit_t * in.ga[j * p + i] : T(0)) + mg[i] * static_cast<T>(inverse_[j]);
      std::fill(g + p, g + stride_, T(0));
      remove(in.a, g);
    }
  }

  // z: the solutions, [k, stride]. Writes the gradient of matrix b to `out`, which lies in memory as M does: `along_p` rows of p or rows of
  // q.
  template <typename Storage>
  void after(const Inputs& in, const double* lambda, double gap_eps, Reader<T>& reader, int64_t b, double scale, const double* kept, T* z,
             Storage* out, int64_t out_row, bool stream) {
    prepare(in, scale);
    const double *of_a = kept, *of_b = kept + k_ * k_, *inside = of_b + k_ * k_, unit_of_gradients = inside[k_ * k_];
    T *za = za_.get(), *az = scaled_.get();  // [z; a] as they enter the result, and scale [a; z], which M^T is multiplied with
    for (int64_t j = 0; j < k_; ++j) {
      T* own = z + j * stride_;
      remove(in.a, own);
      for (int64_t i = 0; i < k_; ++i) {
        const double factor = 0.5 * of_a[i * k_ + j] * damped_inverse_gap(lambda[0], lambda[j], lambda[i], gap_eps);
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
    const double back = scale / unit_of_gradients;
    const bool moderate = back > 0x1p-60 && back < 0x1p60;
    T* wy = wy_.get();
    for (int64_t first = 0; first < m_.q; first += reader.columns()) {
      const Block<T> block = reader.read(b, first);
      const int64_t count = std::min(reader.columns(), m_.q - first);
      project_block<T>(m_, block, 2 * k_, az, stride_, wy, lines_);
      for (int64_t j = 0; j < k_; ++j) {
        T *w = wy + j * lines_, *y = wy + (k_ + j) * lines_;
        const double upstream = in.gs ? in.gs[j] * unit_of_gradients / scale : 0.0;
        const T along = static_cast<T>(upstream * inverse_[j]), inverse = static_cast<T>(inverse_[j]),
                unit = static_cast<T>(unit_of_gradients);
        const T factor = static_cast<T>(moderate ? back : 1.0);
        const T* gb = in.gb ? in.gb + j * m_.q + first : nullptr;
        for (int64_t c = 0; c < count; ++c) y[c] += along * w[c] + (gb ? unit * gb[c] * inverse : T(0));
        for (int64_t i = 0; gb && i < k_; ++i) {
          const double sigma = static_cast<double>(in.sigma[j]) * scale;
          const T share = static_cast<T>(sigma * of_b[j * k_ + i] * damped_inverse_gap(lambda[0], lambda[i], lambda[j], gap_eps) -
                                         inside[i * k_ + j] * inverse_[j]);
          const T* other = in.b + i * m_.q + first;
          for (int64_t c = 0; share != 0 && c < count; ++c) y[c] += share * other[c];
        }
        for (int64_t c = 0; c < count; ++c) y[c] *= factor;
      }
      for (int64_t j = 0; j < k_; ++j)
        for (int64_t c = 0; c < count; ++c) wy[j * lines_ + c] *= static_cast<T>(moderate ? back : 1.0);
      for (int64_t r = 0; r < block.rows; ++r) {
        Storage* to = m_.along_p ? out + (first + r) * out_row : out + r * out_row + first;
        const T *coefficient = m_.along_p ? wy + r : za + r, *vectors = m_.along_p ? za : wy;
        const int64_t coefficient_stride = m_.along_p ? lines_ : stride_, vector_stride = m_.along_p ? stride_ : lines_;
        // Straight to where it belongs, if it is made of whole vectors, or if what is written too much is overwritten by the rows that
        // follow.
        if constexpr (std::is_same_v<Storage, T>) {
          const bool whole = block.length % kLanes<T> == 0;
          const bool followed = m_.along_p && out_row == m_.p && (m_.q - first - r) * out_row >= padded<T>(m_.p);
          if (moderate && (whole || followed)) {
            sum_of_vectors<T>(2 * k_, coefficient, coefficient_stride, vectors, vector_stride, block.length, stream, to);
            continue;
          }
        }
        sum_of_vectors<T>(2 * k_, coefficient, coefficient_stride, vectors, vector_stride, block.length, false, line_.get());
        if (!moderate) multiply(back, block.length, line_.get());
        convert(line_.get(), to, block.length);
      }
    }
  }

 private:
  void prepare(const Inputs& in, double scale) {
    for (int64_t j = 0; j < k_; ++j)
      inverse_[j] = in.sigma[j] > kNull<T> * in.sigma[0] ? 1 / (static_cast<double>(in.sigma[j]) * scale) : 0;
  }

  // products [k, k] = <x_i, g_j> and result = <x_i, g_j> - <x_j, g_i>. That of a function of the span is 0 but for rounding, which a small
  // gap would blow up: as much is taken off.
  void differences(const T* x, int64_t x_stride, const T* g, int64_t length, double unit, double* products, double* result) const {
    std::fill(products, products + k_ * k_, 0.0);
    std::fill(result, result + k_ * k_, 0.0);
    if (!g) return;
    std::vector<double> squares(k_);
    for (int64_t j = 0; j < k_; ++j) {
      squares[j] = dot(g + j * length, g + j * length, length, unit) * unit;
      for (int64_t i = 0; i < k_; ++i) products[i * k_ + j] = dot(x + i * x_stride, g + j * length, length, unit);
    }
    for (int64_t i = 0; i < k_; ++i)
      for (int64_t j = 0; j < i; ++j) {
        const double noise = 8 * std::numeric_limits<T>::epsilon() * std::sqrt(std::max(squares[i], squares[j]));
        const double value = products[i * k_ + j] - products[j * k_ + i];
        result[i * k_ + j] = value > noise ? value - noise : value < -noise ? value + noise : value - value;
        result[j * k_ + i] = -result[i * k_ + j];
      }
  }

  // <x, unit y>, in double: a function of the span is told by roundings.
  static double dot(const T* x, const T* y, int64_t count, double unit) {
    constexpr int lanes = kLanes<double>;
    typedef T Part __attribute__((vector_size(lanes * sizeof(T))));
    auto widened = [](const T* from) {
      Part part;
      std::memcpy(&part, from, sizeof part);
      return __builtin_convertvector(part, Vec<double>);
    };
    Vec<double> sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * lanes <= count; i += 4 * lanes)
      for (int c = 0; c < 4; ++c) sum[c] += widened(x + i + c * lanes) * (widened(y + i + c * lanes) * unit);
    double total = simd::sum<double>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < count; ++i) total += static_cast<double>(x[i]) * (static_cast<double>(y[i]) * unit);
    return total;
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

  const Matrices& m_;
  int64_t k_, stride_, lines_;
  std::vector<double> inverse_;
  Buffer<T> mg_, za_, scaled_, wy_, line_;
};

}  // namespace kdkernels::truncated_svd
