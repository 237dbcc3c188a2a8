// The derivative of the triplets (a_j, sigma_j, b_j) of M, computed from the kept triplets alone
// and one projected solve.
//
// With the upstream gradients ga, gs, gb, G = M M^T, lambda_j = sigma_j^2, the projector P that
// removes the kept a_i, and f(x) = x / (x^2 + eps^2):
//
//   r_j  = P (ga_j + M gb_j / sigma_j)
//   A_ij = <a_i, ga_j> - <a_j, ga_i>                B_ij = <b_i, gb_j> - <b_j, gb_i>
//   z_j  = P f(lambda_j I - G) r_j + sum_{i != j} a_i A_ij / 2 f(lambda_j - lambda_i)
//   y_j  = M^T z_j + gs_j b_j + (gb_j - sum_i b_i <b_i, gb_j>) / sigma_j
//          + sum_{i != j} b_i sigma_j B_ji f(lambda_i - lambda_j)
//   dM   = sum_j z_j (M^T a_j)^T + a_j y_j^T
//
// eps = gap_eps sigma_1 sigma_j is the change of sigma_j^2 that noise of size gap_eps sigma_1 in M
// causes. A sigma_j below gap_eps sigma_1 counts as gap_eps sigma_1, and for two kept values the
// larger one is used. So no gap amplifies an upstream gradient by more than 1 / (gap_eps sigma_1).
//
// The gaps between kept values enter only in products with A and B, which are 0 for a function of
// the span, whatever the gaps are.
//
// All computations use M scaled by `scale` and upstream gradients scaled by `grad_scale`. Both are
// powers of two, chosen so that no number leaves the range of its dtype before the result does; the
// result is clamped to the largest number. For a vanishing sigma, 1 / sigma is replaced by 0.
#pragma once

#include <cmath>

#include "products.h"
#include "truncated_svd.h"

namespace kdkernels::truncated_svd {

template <typename T>
class Derivative {
 public:
  // a [k, stride], 0 from p on; b [k, q], needed only with gb; sigma [k]; upstream gradients ga [k,
  // p], gs [k], gb [k, q], each of which may be null.
  struct Inputs {
    const T *a, *b, *sigma, *ga, *gs, *gb;
  };

  Derivative(const Matrices& m, int64_t k, int64_t stride, int64_t columns)
      : m_(m),
        k_(k),
        stride_(stride),
        line_stride_(line_stride<T>(columns)),
        inverse_(k),
        right_side_squares_(k),
        b_factors_(k),
        mg_(k * stride),
        za_(2 * k * stride),
        scaled_(2 * k * stride),
        wy_(2 * k * line_stride_),
        line_(padded<T>(std::max(m.p, columns))) {}

  // The number of values per matrix that compute_right_sides() saves for write_gradient(): A, B,
  // <b_i, gb_j> and grad_scale.
  static int64_t saved_size(int64_t k) { return 3 * k * k + 1; }

  // Computes r [k, stride], the right-hand sides of the solve, and `saved`. r may be null: if all p
  // triplets are kept, there is nothing to solve.
  void compute_right_sides(const Inputs& in, Reader<T>& reader, int64_t b, double scale, T* r, double* saved) {
    const int64_t p = m_.p;
    const int64_t square = k_ * k_;
    compute_inverses(in, scale);
    const double grad_scale = scale_of_gradients(in, scale);
    saved[3 * square] = grad_scale;
    const T grad_scale_t = static_cast<T>(grad_scale);
    differences(in.a, stride_, in.ga, p, grad_scale, saved + 2 * square, saved);
    differences(in.b, m_.q, in.gb, m_.q, grad_scale, saved + 2 * square, saved + square);
    if (!r) return;
    std::fill(mg_.get(), mg_.get() + k_ * stride_, T(0));
    if (in.gb) {
      for (int64_t first = 0; first < m_.q; first += reader.columns()) {
        const Block<T> block = reader.read(b, first);
        const int64_t count = std::min(reader.columns(), m_.q - first);
        for (int64_t j = 0; j < k_; ++j) {
          T* to = wy_.get() + j * line_stride_;
          for (int64_t c = 0; c < count; ++c) to[c] = static_cast<T>(scale) * (grad_scale_t * in.gb[j * m_.q + first + c]);
          std::fill(to + count, to + line_stride_, T(0));
        }
        multiply_block<T>(m_, block, k_, wy_.get(), line_stride_, mg_.get(), stride_);
      }
      for (int64_t j = 0; j < k_; ++j) std::fill(mg_.get() + j * stride_ + p, mg_.get() + (j + 1) * stride_, T(0));
    }
    for (int64_t j = 0; j < k_; ++j) {
      const T* mg = mg_.get() + j * stride_;
      T* g = r + j * stride_;
      for (int64_t i = 0; i < p; ++i) g[i] = (in.ga ? grad_scale_t * in.ga[j * p + i] : T(0)) + mg[i] * static_cast<T>(inverse_[j]);
      std::fill(g + p, g + stride_, T(0));
      right_side_squares_[j] = product<T>(g, g, stride_);
      remove_kept(in.a, g);
      remove_kept(in.a, g);  // again: if little of g remains, the rounding errors of the first time count
    }
  }

  // |ga_j + M gb_j / sigma_j|^2 [k], times grad_scale^2: the squares of the right-hand sides that
  // compute_right_sides() computed last, before P. Their rounding errors are relative to them.
  const double* right_side_squares() const { return right_side_squares_.data(); }

  // z [k, stride]: the solutions. Writes the gradient of matrix b to `out`, whose rows are like
  // those of a block of M: each has p numbers if p_contiguous, else q.
  template <typename Storage>
  void write_gradient(const Inputs& in, const double* lambda, double gap_eps, Reader<T>& reader, int64_t b, double scale,
                      const double* saved, T* z, Storage* out, int64_t out_row, bool stream) {
    compute_inverses(in, scale);
    const double *a_differences = saved, grad_scale = saved[3 * k_ * k_];
    // [z; a], the left factors of the result, and scale * [a; z], which M^T is multiplied by.
    T *za = za_.get(), *az = scaled_.get();
    for (int64_t j = 0; j < k_; ++j) {
      T* z_j = z + j * stride_;
      remove_kept(in.a, z_j);
      for (int64_t i = 0; i < k_; ++i) {
        const double factor = 0.5 * a_differences[i * k_ + j] * damped_inverse_gap(lambda[0], lambda[j], lambda[i], gap_eps);
        if (factor != 0)
          for (int64_t c = 0; c < m_.p; ++c) z_j[c] += static_cast<T>(factor) * in.a[i * stride_ + c];
      }
      std::copy_n(z_j, stride_, za + j * stride_);
      std::copy_n(in.a + j * stride_, stride_, za + (k_ + j) * stride_);
      for (int64_t c = 0; c < stride_; ++c) {
        az[j * stride_ + c] = static_cast<T>(scale) * in.a[j * stride_ + c];
        az[(k_ + j) * stride_ + c] = static_cast<T>(scale) * z_j[c];
      }
    }
    // The final factor of the result. It is applied to w and y, or, if that could leave the range,
    // to the result.
    const double final_factor = scale / grad_scale;
    const bool in_range = final_factor > 0x1p-60 && final_factor < 0x1p60;
    T* wy = wy_.get();
    for (int64_t first = 0; first < m_.q; first += reader.columns()) {
      const Block<T> block = reader.read(b, first);
      const int64_t count = std::min(reader.columns(), m_.q - first);
      project_block<T>(m_, block, 2 * k_, az, stride_, wy, line_stride_);
      const T factor = static_cast<T>(in_range ? final_factor : 1.0);
      for (int64_t j = 0; j < k_; ++j) compute_line(in, lambda, gap_eps, j, first, count, scale, saved, factor);
      const T *coefficient = m_.p_contiguous ? wy : za, *vectors = m_.p_contiguous ? za : wy;
      const int64_t coefficient_stride = m_.p_contiguous ? line_stride_ : stride_, vector_stride = m_.p_contiguous ? stride_ : line_stride_;
      Storage* to = out + (m_.p_contiguous ? first * out_row : first);
      // Rows are written directly to the gradient if they consist of whole vectors, or if the
      // numbers written past the end of a row are overwritten by the rows that follow.
      int64_t direct = 0;
      if constexpr (std::is_same_v<Storage, T>) {
        if (in_range && block.length % kLanes<T> == 0)
          direct = block.rows;
        else if (in_range && m_.p_contiguous && out_row == m_.p)
          direct = std::clamp<int64_t>(m_.q - first - (padded<T>(m_.p) - 1) / m_.p, 0, block.rows);
        sums_of_vectors<T>(2 * k_, coefficient, coefficient_stride, vectors, vector_stride, block.length, stream, to, out_row, direct);
      }
      for (int64_t r = direct; r < block.rows; ++r) {
        sum_of_vectors<T>(2 * k_, coefficient + r, coefficient_stride, vectors, vector_stride, block.length, false, line_.get());
        if (!in_range) multiply_and_clamp(final_factor, block.length, line_.get());
        convert(line_.get(), to + r * out_row, block.length);
      }
    }
  }

 private:
  // Completes line j of w = scale M^T a and of y, columns [first, first + count) of M; both are
  // multiplied by `factor`. wy_ contains scale M^T a_j and scale M^T z_j.
  void compute_line(const Inputs& in, const double* lambda, double gap_eps, int64_t j, int64_t first, int64_t count, double scale,
                    const double* saved, T factor) {
    const double *b_differences = saved + k_ * k_, *b_products = b_differences + k_ * k_, grad_scale = b_products[k_ * k_];
    T *w = wy_.get() + j * line_stride_, *y = wy_.get() + (k_ + j) * line_stride_;
    const T w_factor = static_cast<T>((in.gs ? in.gs[j] * grad_scale / scale : 0.0) * inverse_[j]);
    if (in.gb)
      for (int64_t i = 0; i < k_; ++i)
        b_factors_[i] = static_cast<T>(static_cast<double>(in.sigma[j]) * scale * b_differences[j * k_ + i] *
                                           damped_inverse_gap(lambda[0], lambda[i], lambda[j], gap_eps) -
                                       b_products[i * k_ + j] * inverse_[j]);
    const T inverse = static_cast<T>(inverse_[j]), grad_scale_t = static_cast<T>(grad_scale);
    auto complete = [&](auto number, int64_t c) {
      using V = decltype(number);  // T or Vec<T>
      auto at = [&](const T* from) {
        V v;
        std::memcpy(&v, from + c, sizeof v);
        return v;
      };
      auto write = [&](V v, T* to) { std::memcpy(to + c, &v, sizeof v); };
      V sum = at(y) + w_factor * at(w);
      if (in.gb) {
        sum += grad_scale_t * at(in.gb + j * m_.q + first) * inverse;
        for (int64_t i = 0; i < k_; ++i)
          if (b_factors_[i] != 0) sum += b_factors_[i] * at(in.b + i * m_.q + first);
      }
      write(sum * factor, y);
      write(at(w) * factor, w);
    };
    int64_t c = 0;
    for (; c + kLanes<T> <= count; c += kLanes<T>) complete(Vec<T>{}, c);
    for (; c < count; ++c) complete(T(0), c);
  }

  void compute_inverses(const Inputs& in, double scale) {
    for (int64_t j = 0; j < k_; ++j)
      inverse_[j] = in.sigma[j] > kVanishing<T> * in.sigma[0] ? 1 / (static_cast<double>(in.sigma[j]) * scale) : 0;
  }

  // products [k, k] = <x_i, g_j> and result = <x_i, g_j> - <x_j, g_i>. For a function of the span,
  // the result is 0 except for rounding errors, which a small gap would amplify. The largest
  // possible rounding error is therefore subtracted.
  void differences(const T* x, int64_t x_stride, const T* g, int64_t length, double grad_scale, double* products, double* result) const {
    std::fill(products, products + k_ * k_, 0.0);
    std::fill(result, result + k_ * k_, 0.0);
    if (!g) return;
    std::vector<double> squares(k_);
    for (int64_t j = 0; j < k_; ++j) {
      squares[j] = dot(g + j * length, g + j * length, length, grad_scale) * grad_scale;
      for (int64_t i = 0; i < k_; ++i) products[i * k_ + j] = dot(x + i * x_stride, g + j * length, length, grad_scale);
    }
    for (int64_t i = 0; i < k_; ++i)
      for (int64_t j = 0; j < i; ++j) {
        const double noise = 8 * std::numeric_limits<T>::epsilon() * std::sqrt(std::max(squares[i], squares[j]));
        const double value = products[i * k_ + j] - products[j * k_ + i];
        result[i * k_ + j] = value > noise ? value - noise : value < -noise ? value + noise : value - value;
        result[j * k_ + i] = -result[i * k_ + j];
      }
  }

  // <x, grad_scale y>, in double, because differences() treats values of the size of a rounding
  // error of T as 0.
  static double dot(const T* x, const T* y, int64_t count, double grad_scale) {
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
      for (int c = 0; c < 4; ++c) sum[c] += widened(x + i + c * lanes) * (widened(y + i + c * lanes) * grad_scale);
    double total = simd::sum<double>((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < count; ++i) total += static_cast<double>(x[i]) * (static_cast<double>(y[i]) * grad_scale);
    return total;
  }

  // A power of two that brings the largest upstream gradient near 1.
  double scale_of_gradients(const Inputs& in, double scale) const {
    double largest = 0;
    auto update_largest = [&](const T* g, int64_t count, double factor) {
      Vec<T> lane_max{};
      int64_t i = 0;
      for (; g && i + kLanes<T> <= count; i += kLanes<T>) lane_max = simd::max(lane_max, abs<T>(simd::load<T>(g + i)));
      T max_magnitude = simd::largest<T>(lane_max);
      for (; g && i < count; ++i) max_magnitude = std::max(max_magnitude, std::abs(g[i]));
      largest = std::max(largest, max_magnitude * factor);
    };
    update_largest(in.ga, k_ * m_.p, 1);
    update_largest(in.gb, k_ * m_.q, 1);
    update_largest(in.gs, k_, 1 / scale);
    if (!(largest > 0 && largest < std::numeric_limits<double>::infinity())) return 1;
    constexpr int max_exponent = std::numeric_limits<T>::max_exponent - 2;
    return std::ldexp(1.0, std::clamp(-std::ilogb(largest), -max_exponent, max_exponent));
  }

  static void multiply_and_clamp(double factor, int64_t count, T* line) {
    constexpr double max_value = std::numeric_limits<T>::max();
    for (int64_t c = 0; c < count; ++c) {
      const double value = line[c] * factor;
      line[c] = static_cast<T>(value > max_value ? max_value : value < -max_value ? -max_value : value);
    }
  }

  // Subtracts from x its projections onto the kept vectors.
  void remove_kept(const T* a, T* x) const {
    for (int64_t i = 0; i < k_; ++i) add_multiple<T>(static_cast<T>(-product<T>(a + i * stride_, x, stride_)), a + i * stride_, stride_, x);
  }

  const Matrices& m_;
  int64_t k_, stride_, line_stride_;
  std::vector<double> inverse_, right_side_squares_;
  std::vector<T> b_factors_;
  Buffer<T> mg_, za_, scaled_, wy_, line_;
};

}  // namespace kdkernels::truncated_svd
