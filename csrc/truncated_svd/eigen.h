// The top of the spectrum of a group of symmetric positive semi-definite matrices in lanes, and the projected solve of the derivative:
// tridiagonal form, bisection, inverse iteration, and the reflections back. Nothing is iterated to convergence, so neither the result nor
// the time depends on gaps or starts.
#pragma once

#include <cmath>

#include "products.h"
#include "spectrum.h"
#include "tridiagonal.h"

namespace kdkernels::truncated_svd {

// What the derivative needs of a group's Gram matrices, as vectors of lanes: G scaled by scale^2 to a trace in [1/4, 1) is Q T Q^T.
template <typename T>
struct GroupState {
  GroupState(Vec<T>* memory, int64_t p, int64_t k)
      : reflectors(memory),
        tau(memory + triangle(p)),
        d(tau + p),
        e(d + p),
        lambda_high(e + p),  // the k largest eigenvalues of T, in two parts
        lambda_low(lambda_high + k),
        scale(lambda_low + k) {}
  static int64_t size(int64_t p, int64_t k) { return triangle(p) + 3 * p + 2 * k + 1; }
  Vec<T>*reflectors, *tau, *d, *e, *lambda_high, *lambda_low, *scale;
};

template <typename T>
class Eigen {
 public:
  static constexpr int kGroup = kLanes<T>;

  // The k largest eigenvalues of p x p matrices, which come with rows `stride` apart, a whole number of vectors.
  Eigen(int64_t p, int64_t k) : p_(p), k_(k), stride_(padded<T>(p)) {}

  int64_t stride() const { return stride_; }  // of matrices and of vectors, which are 0 from p on

  struct Workspace {
    Workspace(int64_t p, int64_t k) : lanes(6 * p + k * p), doubles(2 * p + k + k * p), rows(p), resolvent(p) {}
    Buffer<Vec<T>> lanes;
    Buffer<Doubles> doubles;
    Buffer<TridiagonalLU::Row> rows;
    Buffer<ResolventRow> resolvent;
  };

  // grams [kGroup][p][stride()] -> state; a [kGroup][k][stride()], the eigenvectors, and lambda [kGroup][k], descending.
  void top(const T* grams, const double* scales, const GroupState<T>& state, T* a, double* lambda, Workspace& work) const {
    const int64_t p = p_;
    Vec<T>*e2 = work.lanes.get() + 3 * p, *bounds = e2 + p, *z = e2 + 3 * p;
    interleave_triangle<T>(grams, p, stride_, state.reflectors);
    for (int l = 0; l < kGroup; ++l) (*state.scale)[l] = static_cast<T>(scales[l]);
    tridiagonalize<T>(p, state.reflectors, state.d, state.e, state.tau, work.lanes.get());
    state.e[p - 1] = Vec<T>{};

    Vec<T> high{};  // Gershgorin
    for (int64_t i = 0; i < p; ++i) {
      const Vec<T> before = i > 0 ? abs<T>(state.e[i - 1]) : Vec<T>{};
      e2[i] = before * before;
      high = simd::max(high, state.d[i] + before + abs<T>(state.e[i]));
    }
    largest_eigenvalues<T>(p, state.d, e2, Vec<T>{}, high * (1 + 4 * std::numeric_limits<T>::epsilon()), k_, bounds);

    constexpr int lanes = kLanes<double>;
    for (int part = 0; part < kGroup / lanes; ++part) {
      Doubles *d = work.doubles.get(), *e = d + p, *own = e + p, *x = own + k_;
      for (int64_t i = 0; i < p; ++i) d[i] = doubles(state.d[i], part), e[i] = doubles(state.e[i], part);
      for (int64_t j = 0; j < k_; ++j) own[j] = doubles(bounds[j], part);
      eigenvectors(p, d, e, k_, own, x, work.rows.get());
      for (int64_t i = 0; i < k_ * p; ++i) set_part(z[i], part, x[i]);
      for (int64_t j = 0; j < k_; ++j)
        for (int l = 0; l < lanes; ++l) lambda[(part * lanes + l) * k_ + j] = own[j][l];
    }
    apply_q<T>(p, state.reflectors, state.tau, false, k_, z);
    for (int64_t j = 0; j < k_; ++j) separate<T>(z + j * p, p, a + j * stride_, k_ * stride_);
    for (int l = 0; l < kGroup; ++l) {
      order(a + l * k_ * stride_, lambda + l * k_);
      for (int64_t j = 0; j < k_; ++j) {
        const double value = lambda[l * k_ + j];
        state.lambda_high[j][l] = static_cast<T>(value);
        state.lambda_low[j][l] = static_cast<T>(value - static_cast<double>(static_cast<T>(value)));
      }
    }
  }

  // z_j = f(lambda_j I - G) r_j with f(x) = x / (x^2 + eps_j^2), see gap_noise, G scaled: r [kGroup][k][stride()], replaced by z.
  void solve(const GroupState<T>& state, double gap_eps, T* r, Workspace& work) const {
    const int64_t p = p_;
    Vec<T>* z = work.lanes.get() + 6 * p;
    for (int64_t j = 0; j < k_; ++j) interleave<T>(r + j * stride_, k_ * stride_, p, z + j * p);
    apply_q<T>(p, state.reflectors, state.tau, true, k_, z);
    constexpr int lanes = kLanes<double>;
    for (int part = 0; part < kGroup / lanes; ++part) {
      Doubles *d = work.doubles.get(), *e = d + p, *x = e + p;
      for (int64_t i = 0; i < p; ++i) d[i] = doubles(state.d[i], part), e[i] = doubles(state.e[i], part);
      const Doubles first = simd::sqrt(doubles(state.lambda_high[0], part));
      for (int64_t j = 0; j < k_; ++j) {
        const Doubles lambda = doubles(state.lambda_high[j], part) + doubles(state.lambda_low[j], part);
        for (int64_t i = 0; i < p; ++i) x[i] = doubles(z[j * p + i], part);
        const Doubles own = simd::sqrt(simd::max(lambda, Doubles{}));
        resolvent(p, d, e, lambda, gap_eps * first * simd::max(own, gap_eps * first), x, work.resolvent.get());
        for (int64_t i = 0; i < p; ++i) set_part(z[j * p + i], part, x[i]);
      }
    }
    apply_q<T>(p, state.reflectors, state.tau, false, k_, z);
    for (int64_t j = 0; j < k_; ++j) separate<T>(z + j * p, p, r + j * stride_, k_ * stride_);
  }

 private:
  // The lanes of a group come as doubles in parts of a vector's width.
  static Doubles doubles(Vec<T> v, int part) {
    if constexpr (sizeof(T) == sizeof(double)) return v;
    Doubles result;
    for (int l = 0; l < kLanes<double>; ++l) result[l] = v[part * kLanes<double> + l];
    return result;
  }
  static void set_part(Vec<T>& v, int part, Doubles x) {
    if constexpr (sizeof(T) == sizeof(double))
      v = x;
    else
      for (int l = 0; l < kLanes<double>; ++l) v[part * kLanes<double> + l] = static_cast<T>(x[l]);
  }

  // Rayleigh quotients of equal eigenvalues may come out of order by a rounding. Vectors are brought to length 1.
  void order(T* a, double* lambda) const {
    for (int64_t j = 1; j < k_; ++j)
      for (int64_t i = j; i > 0 && lambda[i] > lambda[i - 1]; --i) {
        std::swap(lambda[i], lambda[i - 1]);
        std::swap_ranges(a + i * stride_, a + (i + 1) * stride_, a + (i - 1) * stride_);
      }
    for (int64_t j = 0; j < k_; ++j) {
      lambda[j] = std::max(lambda[j], 0.0);
      T* v = a + j * stride_;
      const T factor = static_cast<T>(1 / std::sqrt(product<T>(v, v, stride_)));
      for (int64_t i = 0; i < p_; ++i) v[i] *= factor;
    }
  }

  int64_t p_, k_, stride_;
};

}  // namespace kdkernels::truncated_svd
