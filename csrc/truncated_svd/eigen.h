// The largest eigenvalues of a group of symmetric positive semi-definite matrices in lanes, with
// their eigenvectors: tridiagonal form, bisection, inverse iteration, and back-transformation by
// the reflections. Also the projected solve of the derivative. No stage iterates to convergence, so
// neither the result nor the time depends on gaps or start vectors.
#pragma once

#include <cmath>

#include "products.h"
#include "spectrum.h"
#include "tridiagonal.h"

namespace kdkernels::truncated_svd {

// The state of a group that the derivative needs, as vectors of lanes: G scaled by scale^2, which
// has a trace in [1/4, 1), is Q T Q^T.
template <typename T>
struct GroupState {
  GroupState(Vec<T>* memory, int64_t p, int64_t k)
      : reflectors(memory),
        tau(memory + triangle(p)),
        d(tau + p),
        e(d + p),
        lambda_high(e + p),  // lambda_high + lambda_low: the k largest eigenvalues of T
        lambda_low(lambda_high + k),
        scale(lambda_low + k) {}
  static int64_t size(int64_t p, int64_t k) { return triangle(p) + 3 * p + 2 * k + 1; }
  Vec<T>*reflectors, *tau, *d, *e, *lambda_high, *lambda_low, *scale;
};

template <typename T>
class Eigen {
 public:
  static constexpr int kGroup = kLanes<T>;

  // For the k largest eigenvalues of p x p matrices, whose rows are stride() numbers apart.
  Eigen(int64_t p, int64_t k) : p_(p), k_(k), stride_(padded<T>(p)) {}

  // The distance between rows of matrices and between vectors, which are 0 from p on.
  int64_t stride() const { return stride_; }

  struct Workspace {
    Workspace(int64_t p, int64_t k) : lanes(6 * p + k * p), doubles(2 * p + k + k * p), rows(p), resolvent(p) {}
    Buffer<Vec<T>> lanes;
    Buffer<Doubles> doubles;
    Buffer<TridiagonalLU::Row> rows;
    Buffer<ResolventRow> resolvent;
  };

  // grams [kGroup][p][stride()] -> state, eigenvectors a [kGroup][k][stride()], and eigenvalues
  // lambda [kGroup][k], descending.
  void largest_eigenpairs(const T* grams, const double* scales, const GroupState<T>& state, T* a, double* lambda, Workspace& work) const {
    const int64_t p = p_;
    Vec<T>*e2 = work.lanes.get() + 3 * p, *bounds = e2 + p, *z = e2 + 3 * p;
    interleave_triangle<T>(grams, p, stride_, state.reflectors);
    for (int l = 0; l < kGroup; ++l) (*state.scale)[l] = static_cast<T>(scales[l]);
    tridiagonalize<T>(p, state.reflectors, state.d, state.e, state.tau, work.lanes.get());
    state.e[p - 1] = Vec<T>{};

    Vec<T> high{};  // an upper bound of the eigenvalues (Gershgorin)
    for (int64_t i = 0; i < p; ++i) {
      const Vec<T> e_left = i > 0 ? abs<T>(state.e[i - 1]) : Vec<T>{};
      e2[i] = e_left * e_left;
      high = simd::max(high, state.d[i] + e_left + abs<T>(state.e[i]));
    }
    largest_eigenvalues<T>(p, state.d, e2, Vec<T>{}, high * (1 + 4 * std::numeric_limits<T>::epsilon()), k_, bounds);

    constexpr int lanes = kLanes<double>;
    for (int part = 0; part < kGroup / lanes; ++part) {
      Doubles *d = work.doubles.get(), *e = d + p, *eigenvalues = e + p, *x = eigenvalues + k_;
      for (int64_t i = 0; i < p; ++i) d[i] = to_doubles(state.d[i], part), e[i] = to_doubles(state.e[i], part);
      for (int64_t j = 0; j < k_; ++j) eigenvalues[j] = to_doubles(bounds[j], part);
      eigenvectors(p, d, e, k_, eigenvalues, x, work.rows.get());
      for (int64_t i = 0; i < k_ * p; ++i) set_doubles(z[i], part, x[i]);
      for (int64_t j = 0; j < k_; ++j)
        for (int l = 0; l < lanes; ++l) lambda[(part * lanes + l) * k_ + j] = eigenvalues[j][l];
    }
    apply_q<T>(p, state.reflectors, state.tau, false, k_, z);
    for (int64_t j = 0; j < k_; ++j) deinterleave<T>(z + j * p, p, a + j * stride_, k_ * stride_);
    for (int l = 0; l < kGroup; ++l) {
      sort_and_normalize(a + l * k_ * stride_, lambda + l * k_);
      for (int64_t j = 0; j < k_; ++j) {
        const double value = lambda[l * k_ + j];
        state.lambda_high[j][l] = static_cast<T>(value);
        state.lambda_low[j][l] = static_cast<T>(value - static_cast<double>(static_cast<T>(value)));
      }
    }
  }

  // Replaces r [kGroup][k][stride()] by z: z_j = f(lambda_j I - G) r_j with f(x) = x / (x^2 +
  // eps_j^2), for the scaled G. For eps_j see gap_noise.
  void solve(const GroupState<T>& state, double gap_eps, T* r, Workspace& work) const {
    const int64_t p = p_;
    Vec<T>* z = work.lanes.get() + 6 * p;
    for (int64_t j = 0; j < k_; ++j) interleave<T>(r + j * stride_, k_ * stride_, p, z + j * p);
    apply_q<T>(p, state.reflectors, state.tau, true, k_, z);
    constexpr int lanes = kLanes<double>;
    for (int part = 0; part < kGroup / lanes; ++part) {
      Doubles *d = work.doubles.get(), *e = d + p, *x = e + p;
      for (int64_t i = 0; i < p; ++i) d[i] = to_doubles(state.d[i], part), e[i] = to_doubles(state.e[i], part);
      const Doubles sigma_1 = simd::sqrt(to_doubles(state.lambda_high[0], part));
      for (int64_t j = 0; j < k_; ++j) {
        const Doubles lambda = to_doubles(state.lambda_high[j], part) + to_doubles(state.lambda_low[j], part);
        for (int64_t i = 0; i < p; ++i) x[i] = to_doubles(z[j * p + i], part);
        const Doubles sigma_j = simd::sqrt(simd::max(lambda, Doubles{}));
        resolvent(p, d, e, lambda, gap_eps * sigma_1 * simd::max(sigma_j, gap_eps * sigma_1), x, work.resolvent.get());
        for (int64_t i = 0; i < p; ++i) set_doubles(z[j * p + i], part, x[i]);
      }
    }
    apply_q<T>(p, state.reflectors, state.tau, false, k_, z);
    for (int64_t j = 0; j < k_; ++j) deinterleave<T>(z + j * p, p, r + j * stride_, k_ * stride_);
  }

 private:
  // Part `part` of the lanes of v as doubles: as many lanes as a vector of doubles has.
  static Doubles to_doubles(Vec<T> v, int part) {
    if constexpr (sizeof(T) == sizeof(double)) return v;
    Doubles result;
    for (int l = 0; l < kLanes<double>; ++l) result[l] = v[part * kLanes<double> + l];
    return result;
  }
  static void set_doubles(Vec<T>& v, int part, Doubles x) {
    if constexpr (sizeof(T) == sizeof(double))
      v = x;
    else
      for (int l = 0; l < kLanes<double>; ++l) v[part * kLanes<double> + l] = static_cast<T>(x[l]);
  }

  // Sorts the eigenpairs, because rounding may leave the Rayleigh quotients of equal eigenvalues in
  // the wrong order, and scales the vectors to length 1.
  void sort_and_normalize(T* a, double* lambda) const {
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
