// The direct tier: Gram matrix, tridiagonal form, bisection, inverse iteration, and the reflections back. Nothing is iterated to
// convergence, so neither the result nor the time depends on gaps or starts.
//
// A group is as many matrices as a vector has lanes; the last one may be filled up with zeros. What a matrix gives does not depend on its
// lane, its neighbours or the number of threads.
#pragma once

#include <cmath>

#include "bisection.h"
#include "gram.h"
#include "resolvent.h"
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

// How a matrix was scaled for its Gram matrix; finite: no NaN and no infinity is in it.
struct Scaling {
  double scale = 1;  // of M: a power of two
  bool finite = true;
};

template <typename T>
class Direct {
 public:
  static constexpr int kGroup = kLanes<T>;

  Direct(const Matrices& m, int64_t k) : m_(m), k_(k), gram_stride_(padded<T>(m.p)) {}

  int64_t groups() const { return (m_.batch + kGroup - 1) / kGroup; }
  int64_t vector_stride() const { return gram_stride_; }  // of "a" vectors, which are 0 from p on
  int64_t gram_size() const { return m_.p * gram_stride_; }

  // Gram matrix of matrix b, [p, vector_stride()], brought to a trace in [1/4, 1) where the matrix is neither zero nor broken.
  Scaling gram_of(int64_t b, Reader<T>& reader, T* matrix) const {
    constexpr double low = sizeof(T) == 4 ? 1e-24 : 1e-200, high = sizeof(T) == 4 ? 1e34 : 1e290;
    Scaling result;
    gram<T>(reader, m_, b, 1, matrix, gram_stride_);
    double total = trace(matrix);
    if (!(total > low && total < high)) {  // squares out of range, or numbers that are none
      const double largest = reader.largest(b);
      result.finite = largest == largest;
      if (!result.finite || largest == 0) {
        std::fill(matrix, matrix + gram_size(), T(0));
        return result;
      }
      // Both ends stay clear of numbers that T has not: half of its exponents are enough.
      result.scale = std::ldexp(1.0, std::min(-std::ilogb(largest), std::numeric_limits<T>::max_exponent - 2));
      gram<T>(reader, m_, b, static_cast<T>(result.scale), matrix, gram_stride_);
      total = trace(matrix);
    }
    int exponent;
    std::frexp(total, &exponent);
    const int half = (exponent + (exponent > 0 ? 1 : 0)) / 2;  // rounded up
    const T factor = static_cast<T>(std::ldexp(1.0, -2 * half));
    for (int64_t i = 0; i < m_.p; ++i)
      for (int64_t j = 0; j <= i; ++j) matrix[i * gram_stride_ + j] *= factor;
    result.scale = std::min(std::ldexp(result.scale, -half), std::ldexp(1.0, std::numeric_limits<T>::max_exponent - 2));
    return result;
  }

  struct Workspace {
    Workspace(int64_t p, int64_t k) : lanes(6 * p + k * p), doubles(2 * p + k + k * p), rows(p), resolvent(p) {}
    Buffer<Vec<T>> lanes;
    Buffer<Doubles> doubles;
    Buffer<TridiagonalLU::Row> rows;
    Buffer<ResolventRow> resolvent;
  };

  // grams [kGroup][p][vector_stride()] -> state; a [kGroup][k][vector_stride()], the eigenvectors, and lambda [kGroup][k], descending.
  void eigen(const T* grams, const double* scales, const GroupState<T>& state, T* a, double* lambda, Workspace& work) const {
    const int64_t p = m_.p;
    Vec<T>*e2 = work.lanes.get() + 3 * p, *bounds = e2 + p, *z = e2 + 3 * p;
    interleave_triangle<T>(grams, p, gram_stride_, simd::splat<T>(1), state.reflectors);
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
    for (int64_t j = 0; j < k_; ++j) separate<T>(z + j * p, p, a + j * gram_stride_, k_ * gram_stride_);
    for (int l = 0; l < kGroup; ++l) {
      order(a + l * k_ * gram_stride_, lambda + l * k_);
      for (int64_t j = 0; j < k_; ++j) {
        const double value = lambda[l * k_ + j];
        state.lambda_high[j][l] = static_cast<T>(value);
        state.lambda_low[j][l] = static_cast<T>(value - static_cast<double>(static_cast<T>(value)));
      }
    }
  }

  // z_j = f(lambda_j I - G) r_j with f(x) = x / (x^2 + (gap_eps lambda_1)^2), G scaled: r [kGroup][k][vector_stride()], replaced by z.
  void solve(const GroupState<T>& state, double gap_eps, T* r, Workspace& work) const {
    const int64_t p = m_.p;
    Vec<T>* z = work.lanes.get() + 6 * p;
    for (int64_t j = 0; j < k_; ++j) interleave<T>(r + j * gram_stride_, k_ * gram_stride_, p, z + j * p);
    apply_q<T>(p, state.reflectors, state.tau, true, k_, z);
    constexpr int lanes = kLanes<double>;
    for (int part = 0; part < kGroup / lanes; ++part) {
      Doubles *d = work.doubles.get(), *e = d + p, *x = e + p;
      for (int64_t i = 0; i < p; ++i) d[i] = doubles(state.d[i], part), e[i] = doubles(state.e[i], part);
      const Doubles eps = gap_eps * doubles(state.lambda_high[0], part);
      for (int64_t j = 0; j < k_; ++j) {
        const Doubles lambda = doubles(state.lambda_high[j], part) + doubles(state.lambda_low[j], part);
        for (int64_t i = 0; i < p; ++i) x[i] = doubles(z[j * p + i], part);
        resolvent(p, d, e, lambda, eps, x, work.resolvent.get());
        for (int64_t i = 0; i < p; ++i) set_part(z[j * p + i], part, x[i]);
      }
    }
    apply_q<T>(p, state.reflectors, state.tau, false, k_, z);
    for (int64_t j = 0; j < k_; ++j) separate<T>(z + j * p, p, r + j * gram_stride_, k_ * gram_stride_);
  }

 private:
  double trace(const T* matrix) const {
    double sum = 0;
    for (int64_t i = 0; i < m_.p; ++i) sum += matrix[i * gram_stride_ + i];
    return sum;
  }

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
        std::swap_ranges(a + i * gram_stride_, a + (i + 1) * gram_stride_, a + (i - 1) * gram_stride_);
      }
    for (int64_t j = 0; j < k_; ++j) {
      lambda[j] = std::max(lambda[j], 0.0);
      T* v = a + j * gram_stride_;
      double squares = 0;
      for (int64_t i = 0; i < m_.p; ++i) squares += static_cast<double>(v[i]) * v[i];
      const T factor = static_cast<T>(1 / std::sqrt(squares));
      for (int64_t i = 0; i < m_.p; ++i) v[i] *= factor;
    }
  }

  const Matrices& m_;
  int64_t k_, gram_stride_;
};

}  // namespace kdkernels::truncated_svd
