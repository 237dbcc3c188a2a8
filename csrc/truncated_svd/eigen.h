// The largest eigenvalues of a group of symmetric positive semi-definite matrices in lanes, with
// their eigenvectors: tridiagonal form, bisection, inverse iteration, and back-transformation by
// the reflections. Also the projected solve of the derivative. No stage iterates to convergence, so
// neither the result nor the time depends on gaps or start vectors.
#pragma once

#include <cmath>
#include <numeric>

#include "clusters.h"
#include "tridiagonal_one.h"

namespace kdkernels::truncated_svd {

// A tridiagonal matrix counts as diagonal if, in every row, the norm of the elements beside the diagonal
// is at most this fraction of the largest element on it. Its eigenvectors are unit vectors. For a matrix
// with orthogonal rows of equal length these elements are the rounding errors of the Gram matrix, 3 to
// 10 units in double and 3 to 5 in float for p from 16 to 128.
template <typename T>
constexpr T kDecoupled = (sizeof(T) == 4 ? 8 : 16) * std::numeric_limits<T>::epsilon();

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
    Workspace(int64_t p, int64_t k)
        : lanes(6 * p + k * p + 4),
          doubles(2 * p + k * p),
          rows(p),
          resolvent(p),
          clusters(p, k),
          numbers(9 * padded<T>(p)),
          bounds(padded<T>(k) / kGroup + 4),
          one_d(2 * p),
          start(p + k + kGroup),
          shifts(padded<T>(k)),
          order(p) {
      fill_start_vectors(p + k + kGroup, start.get());
    }
    template <int N>
    typename TridiagonalLU<N>::Row* rows_for() {
      return reinterpret_cast<typename TridiagonalLU<N>::Row*>(rows.get());
    }
    Buffer<Vec<T>> lanes;
    Buffer<Doubles> doubles;
    Buffer<TridiagonalLU<2>::Row> rows;
    Buffer<ResolventRow> resolvent;
    ClusterWorkspace clusters;
    // For one matrix: d, e, tau and e2, and working memory; eigenvalues from bisection, in lanes; d
    // and e in double; start vectors; eigenvalues; eigenvectors in lanes.
    Buffer<T> numbers;
    Buffer<Vec<T>> bounds;
    Buffer<double> one_d, start, shifts;
    std::vector<int64_t> order;
    Buffer<Vec<T>> one_lanes;
    Buffer<Doubles> one_doubles;
  };

  // How the stages of a group are computed; the results are the same.
  struct Layout {
    bool rows_in_lanes;         // tridiagonal form: one matrix after another, with its rows in lanes
    bool eigenvalues_in_lanes;  // eigenpairs: one matrix after another, with its eigenvalues in lanes
  };

  // grams [kGroup][p][stride()], of which the first `count` are given -> state, eigenvectors a
  // [kGroup][k][stride()], and eigenvalues lambda [kGroup][k], descending. Overwrites grams. The
  // vectors of a matrix with lambda_k < least_ratio lambda_1 may be left out. keep_state: whether
  // all of `state` is needed afterwards.
  void largest_eigenpairs(T* grams, const double* scales, int64_t count, const GroupState<T>& state, bool keep_state, double least_ratio,
                          T* a, double* lambda, Workspace& work) const {
    const Layout layout = layout_for(count);
    for (int l = 0; l < kGroup; ++l) (*state.scale)[l] = static_cast<T>(l < count ? scales[l] : 1.0);
    if (layout.rows_in_lanes) {
      tridiagonalize_each(grams, count, state, work);
      if (keep_state || !layout.eigenvalues_in_lanes) interleave_triangle<T>(grams, p_, stride_, state.reflectors);
    } else {
      std::fill(grams + count * p_ * stride_, grams + kGroup * p_ * stride_, T(0));
      interleave_triangle<T>(grams, p_, stride_, state.reflectors);
      tridiagonalize<T>(p_, state.reflectors, state.d, state.e, state.tau, work.lanes.get());
      state.e[p_ - 1] = Vec<T>{};
    }
    if (layout.eigenvalues_in_lanes)
      for (int64_t l = 0; l < count; ++l)
        eigenpairs_of_one(grams + l * p_ * stride_, layout.rows_in_lanes, static_cast<int>(l), state, least_ratio, a + l * k_ * stride_,
                          lambda + l * k_, work);
    else
      eigenpairs_of_group(count, state, least_ratio, a, lambda, work);
    for (int64_t l = 0; l < count; ++l) {
      const double* values = lambda + l * k_;
      for (int64_t j = 0; j < k_; ++j) {
        state.lambda_high[j][l] = static_cast<T>(values[j]);
        state.lambda_low[j][l] = static_cast<T>(values[j] - static_cast<double>(static_cast<T>(values[j])));
      }
    }
    for (int64_t j = 0; j < k_; ++j)
      for (int64_t l = count; l < kGroup; ++l) state.lambda_high[j][l] = state.lambda_low[j][l] = 0;
  }

  // The eigenpairs of one matrix [p][stride()] (its lower triangle, which is overwritten) whose
  // eigenvalues are not below least_ratio times the largest one, at most `most` of them. Returns
  // their number.
  int64_t leading_eigenpairs(T* matrix, int64_t most, double least_ratio, T* a, double* lambda, Workspace& work) const {
    T *d = work.numbers.get(), *e = d + stride_, *tau = e + stride_;
    mirror_triangle<T>(p_, stride_, matrix);
    tridiagonalize_one<T>(p_, stride_, matrix, d, e, tau, work.numbers.get() + 4 * stride_);
    e[p_ - 1] = 0;
    const int64_t count = bisect_one(most, least_ratio, true, lambda, work);
    eigenvectors_of_one(matrix, count, false, a, lambda, work);
    return count;
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
  // The layout that takes the least time. Measured with AVX2 (Zen 3) for 1 to 8 matrices, p from 8 to
  // 320 and k from 1 to 64, relative to lanes of matrices in both stages (float; k = 4 / 16 / 64):
  //
  //            1 matrix           2 matrices         4 matrices         8 matrices
  //   p =  32  0.76/0.50/ -       1.00/0.69/ -       1.40/1.00/ -       2.10/1.42/ -
  //   p =  64  0.54/0.37/0.23     0.83/0.58/0.36     1.30/0.93/0.70     1.91/1.21/1.17
  //   p = 128  0.42/0.30/0.26     0.71/0.55/0.43     1.14/0.90/0.68     1.61/1.39/1.20
  //   p = 256    - /0.31/0.24       - /0.54/0.43       - /0.87/0.76       - /1.28/1.10
  Layout layout_for(int64_t count) const {
    const int64_t vectors = count * ((k_ + kGroup - 1) / kGroup);
    return {count == 1 || (3 * count <= kGroup && p_ >= 32), count == 1 || (2 * vectors <= k_ && (2 * count < kGroup || k_ >= 2 * kGroup))};
  }

  // Reduces one matrix after another. The reflectors stay in the rows of the matrices.
  void tridiagonalize_each(T* grams, int64_t count, const GroupState<T>& state, Workspace& work) const {
    T *d = work.numbers.get(), *e = d + stride_, *tau = e + stride_, *memory = d + 4 * stride_;
    for (int64_t i = 0; i < p_; ++i) state.d[i] = state.e[i] = state.tau[i] = Vec<T>{};
    for (int64_t l = 0; l < count; ++l) {
      T* matrix = grams + l * p_ * stride_;
      mirror_triangle<T>(p_, stride_, matrix);
      tridiagonalize_one<T>(p_, stride_, matrix, d, e, tau, memory);
      for (int64_t i = 0; i < p_; ++i) {
        state.d[i][l] = d[i];
        state.e[i][l] = i + 1 < p_ ? e[i] : T(0);
        state.tau[i][l] = tau[i];
      }
    }
  }

  // Bounds of the eigenvalues are 0 and `high` (Gershgorin). e2: the squares of e, shifted by one.
  void prepare_bisection(const Vec<T>* d, const Vec<T>* e, Vec<T>* e2, Vec<T>& high) const {
    for (int64_t i = 0; i < p_; ++i) {
      const Vec<T> e_left = i > 0 ? abs<T>(e[i - 1]) : Vec<T>{};
      e2[i] = e_left * e_left;
      high = simd::max(high, d[i] + e_left + abs<T>(e[i]));
    }
    high *= 1 + 4 * std::numeric_limits<T>::epsilon();
  }

  // Which matrices T count as diagonal (kDecoupled). e2: see prepare_bisection.
  Mask<T> decoupled_matrices(const Vec<T>* d, const Vec<T>* e2) const {
    Vec<T> largest{}, coupling{};
    for (int64_t i = 0; i < p_; ++i) {
      largest = simd::max(d[i], largest);
      coupling = simd::max(e2[i] + (i + 1 < p_ ? e2[i + 1] : Vec<T>{}), coupling);
    }
    largest *= kDecoupled<T>;
    return coupling <= largest * largest;
  }

  // The same for one matrix. e2: memory for p numbers.
  bool is_decoupled(const T* d, const T* e, T* e2) const {
    for (int64_t i = 0; i < p_; ++i) e2[i] = i > 0 ? e[i - 1] * e[i - 1] : T(0);
    T largest = 0, coupling = 0;
    for (int64_t i = 0; i < p_; ++i) {
      largest = std::max(d[i], largest);
      coupling = std::max(e2[i] + (i + 1 < p_ ? e2[i + 1] : T(0)), coupling);
    }
    largest *= kDecoupled<T>;
    return coupling <= largest * largest;
  }

  // Sorts the numbers of the rows by the elements of a diagonal, descending.
  template <typename Element>
  static void sort_diagonal(Element&& element, std::vector<int64_t>& order) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return element(i) > element(j); });
  }

  void eigenpairs_of_group(int64_t count, const GroupState<T>& state, double least_ratio, T* a, double* lambda, Workspace& work) const {
    const int64_t p = p_;
    Vec<T>*e2 = work.lanes.get() + 3 * p, *bounds = e2 + p, *z = e2 + 3 * p + 4, high{};
    prepare_bisection(state.d, state.e, e2, high);
    const Mask<T> decoupled = decoupled_matrices(state.d, e2) & first_lanes<T>(count), coupled = ~decoupled & first_lanes<T>(count);
    if (simd::any(coupled)) largest_eigenvalues<T>(p, state.d, e2, Vec<T>{}, high, k_, bounds);
    bool any_complete = false;
    for (int64_t l = 0; l < count; ++l) {
      if (decoupled[l]) sort_diagonal([&](int64_t i) { return state.d[i][l]; }, work.order);
      for (int64_t j = 0; j < k_; ++j) lambda[l * k_ + j] = decoupled[l] ? std::max(state.d[work.order[j]][l], T(0)) : bounds[j][l];
      any_complete |= !(lambda[l * k_ + k_ - 1] < least_ratio * lambda[l * k_]);
    }
    if (!any_complete) return;
    std::vector<double> quotients(kGroup * k_);
    constexpr int lanes = kLanes<double>;
    if (count <= kGroup - lanes || !simd::any(coupled)) std::fill(z, z + k_ * p, Vec<T>{});  // the parts without a matrix
    for (int part = 0; part * lanes < count && simd::any(coupled); ++part) {
      Doubles *d = work.doubles.get(), *e = d + p, *x = e + p;
      for (int64_t i = 0; i < p; ++i) d[i] = to_doubles(state.d[i], part), e[i] = to_doubles(state.e[i], part);
      auto run = [&](auto n, int64_t first) {
        constexpr int N = n();
        Doubles values[N];
        for (int j = 0; j < N; ++j) values[j] = to_doubles(bounds[first + j], part) + kShiftOffset<T> * to_doubles(bounds[0], part);
        for (int64_t i = 0; i < p; ++i)
          for (int j = 0; j < N; ++j) x[first * p + i * N + j] = simd::splat<double>(work.start.get()[first + j + i]);
        inverse_iteration<N>(p, d, e, kSolves, values, x + first * p, N, work.template rows_for<N>());
        for (int j = 0; j < N; ++j) {
          for (int64_t i = 0; i < p; ++i) set_doubles(z[(first + j) * p + i], part, x[first * p + i * N + j]);
          for (int l = 0; l < lanes; ++l) quotients[(part * lanes + l) * k_ + first + j] = values[j][l];
        }
      };
      int64_t j = 0;
      for (; j + 2 <= k_; j += 2) run(std::integral_constant<int, 2>{}, j);
      if (j < k_) run(std::integral_constant<int, 1>{}, j);
      for (int l = 0; l < lanes && part * lanes + l < count; ++l) {
        const int64_t matrix = part * lanes + l;
        const double* shifts = lambda + matrix * k_;
        if (decoupled[matrix] || !has_cluster(shifts, k_, kCluster<T> * shifts[0])) continue;
        double *one_d = work.one_d.get(), *one_e = one_d + p;
        for (int64_t i = 0; i < p; ++i) one_d[i] = d[i][l], one_e[i] = e[i][l];
        double* rows = work.clusters.vectors.get();
        const int64_t row = padded<double>(p);
        for (int64_t i = 0; i < k_; ++i) {
          const int64_t pair = i / 2 * 2, n = pair + 2 <= k_ ? 2 : 1;
          for (int64_t c = 0; c < p; ++c) rows[i * row + c] = x[pair * p + c * n + (i - pair)][l];
          std::fill(rows + i * row + p, rows + (i + 1) * row, 0.0);
        }
        improve_clusters<T>(p, one_d, one_e, k_, shifts, kCluster<T> * shifts[0], quotients.data() + matrix * k_, work.clusters);
        for (int64_t i = 0; i < k_; ++i)
          for (int64_t c = 0; c < p; ++c) z[i * p + c][matrix] = static_cast<T>(rows[i * row + c]);
      }
    }
    for (int64_t l = 0; l < count; ++l) {
      if (!decoupled[l]) continue;
      sort_diagonal([&](int64_t i) { return state.d[i][l]; }, work.order);
      for (int64_t j = 0; j < k_; ++j) {
        for (int64_t i = 0; i < p; ++i) z[j * p + i][l] = i == work.order[j] ? 1 : 0;
        quotients[l * k_ + j] = lambda[l * k_ + j];
      }
    }
    apply_q<T>(p, state.reflectors, state.tau, false, k_, z);
    for (int64_t j = 0; j < k_; ++j) deinterleave<T>(z + j * p, p, a + j * stride_, k_ * stride_);
    for (int64_t l = 0; l < count; ++l) {
      if (lambda[l * k_ + k_ - 1] < least_ratio * lambda[l * k_]) continue;
      std::copy_n(quotients.data() + l * k_, k_, lambda + l * k_);
      sort_and_normalize(k_, a + l * k_ * stride_, lambda + l * k_);
    }
  }

  // matrix: memory for [p][stride()]; it contains the reflectors in its rows if has_reflectors.
  void eigenpairs_of_one(T* matrix, bool has_reflectors, int lane, const GroupState<T>& state, double least_ratio, T* a, double* lambda,
                         Workspace& work) const {
    T *d = work.numbers.get(), *e = d + stride_, *tau = e + stride_;
    for (int64_t i = 0; i < p_; ++i) d[i] = state.d[i][lane], e[i] = state.e[i][lane], tau[i] = state.tau[i][lane];
    if (!has_reflectors)
      for (int64_t i = 2; i < p_; ++i)
        for (int64_t c = 0; c < i; ++c) matrix[i * stride_ + c] = state.reflectors[triangle(i) + c][lane];
    const bool decoupled = is_decoupled(d, e, d + 3 * stride_);
    if (decoupled) {
      sort_diagonal([=](int64_t i) { return d[i]; }, work.order);
      for (int64_t j = 0; j < k_; ++j) lambda[j] = std::max(d[work.order[j]], T(0));
    } else {
      bisect_one(k_, least_ratio, false, lambda, work);
    }
    if (lambda[k_ - 1] < least_ratio * lambda[0]) return;
    eigenvectors_of_one(matrix, k_, decoupled, a, lambda, work);
  }

  // Eigenvalues of the matrix in work.numbers (d, e), by bisection, in lanes. Writes them to lambda
  // and work.shifts, and returns their number: k, or, if `truncate`, the number of those that are
  // not below least_ratio times the largest one.
  int64_t bisect_one(int64_t k, double least_ratio, bool truncate, double* lambda, Workspace& work) const {
    const int64_t p = p_;
    T *d = work.numbers.get(), *e = d + stride_, *e2 = d + 3 * stride_;
    T high = 0;
    for (int64_t i = 0; i < p; ++i) {
      const T e_left = i > 0 ? std::abs(e[i - 1]) : T(0), bound = d[i] + e_left + std::abs(e[i]);
      e2[i] = e_left * e_left;
      high = high > bound ? high : bound;
    }
    high *= 1 + 4 * std::numeric_limits<T>::epsilon();
    auto bisect_from = [&](int64_t first, int64_t last) {
      Vec<T>* bounds = work.bounds.get();
      largest_eigenvalues_one<T>(p, d, e2, T(0), high, first, last, bounds);
      for (int64_t j = first; j < padded<T>(last); ++j) work.shifts.get()[j] = bounds[(j - first) / kGroup][(j - first) % kGroup];
    };
    if (truncate) {
      bisect_from(0, std::min<int64_t>(k, kGroup));
      const Vec<T> threshold = simd::splat<T>(static_cast<T>(least_ratio * work.shifts.get()[0]));
      Mask<T> count;
      count_above<T, 1>(p, d, e2, &threshold, &count);
      k = std::clamp<int64_t>(count[0], 1, k);
      if (k > kGroup) bisect_from(kGroup, k);
    } else {
      bisect_from(0, k);
    }
    std::copy_n(work.shifts.get(), k, lambda);
    return k;
  }

  // The eigenvectors of T in lanes, work.one_lanes [p][vectors], of the first k eigenvalues that
  // bisect_one() found, and their eigenvalues.
  void inverse_iteration_of_one(int64_t k, double* lambda, Workspace& work) const {
    constexpr int lanes = kLanes<double>;
    const int64_t p = p_, vectors = (k + kGroup - 1) / kGroup, double_vectors = vectors * (kGroup / lanes);
    const T *d = work.numbers.get(), *e = d + stride_;
    const double* shifts = work.shifts.get();
    double *one_d = work.one_d.get(), *one_e = one_d + p;
    for (int64_t i = 0; i < p; ++i) one_d[i] = d[i], one_e[i] = e[i];
    Vec<T>* z = work.one_lanes.get();
    Doubles* x = work.one_doubles.get();  // [p][double_vectors]
    auto run = [&](auto n, int64_t first) {
      constexpr int N = n();
      Doubles values[N];
      for (int v = 0; v < N; ++v) {
        values[v] = simd::load<double>(shifts + (first + v) * lanes) + kShiftOffset<T> * shifts[0];
        for (int64_t i = 0; i < p; ++i) x[i * double_vectors + first + v] = simd::load<double>(work.start.get() + (first + v) * lanes + i);
      }
      inverse_iteration<N>(p, one_d, one_e, kSolves, values, x + first, double_vectors, work.template rows_for<N>());
      for (int64_t j = first * lanes; j < std::min((first + N) * lanes, k); ++j) lambda[j] = values[j / lanes - first][j % lanes];
    };
    const int64_t used = (k + lanes - 1) / lanes;
    int64_t v = 0;
    for (; v + 2 <= used; v += 2) run(std::integral_constant<int, 2>{}, v);
    if (v < used) run(std::integral_constant<int, 1>{}, v);
    if (used < double_vectors)
      for (int64_t i = 0; i < p; ++i) std::fill(x + i * double_vectors + used, x + (i + 1) * double_vectors, Doubles{});
    if (has_cluster(shifts, k, kCluster<T> * shifts[0])) {
      double* rows = work.clusters.vectors.get();
      const int64_t row = padded<double>(p);
      for (int64_t j = 0; j < k; ++j) {
        for (int64_t i = 0; i < p; ++i) rows[j * row + i] = x[i * double_vectors + j / lanes][j % lanes];
        std::fill(rows + j * row + p, rows + (j + 1) * row, 0.0);
      }
      improve_clusters<T>(p, one_d, one_e, k, shifts, kCluster<T> * shifts[0], lambda, work.clusters);
      for (int64_t j = 0; j < k; ++j)
        for (int64_t i = 0; i < p; ++i) x[i * double_vectors + j / lanes][j % lanes] = rows[j * row + i];
    }
    if constexpr (sizeof(T) == sizeof(double))
      std::copy_n(x, p * double_vectors, z);
    else
      for (int64_t i = 0; i < p * vectors; ++i)
        for (int part = 0; part < kGroup / lanes; ++part) set_doubles(z[i], part, x[i * (kGroup / lanes) + part]);
  }

  // The eigenvectors a [k][stride()] of the first k eigenvalues that bisect_one() found, or of the
  // elements of a decoupled T in the order of work.order, and their eigenvalues. matrix contains the
  // reflectors, work.numbers tau.
  void eigenvectors_of_one(const T* matrix, int64_t k, bool decoupled, T* a, double* lambda, Workspace& work) const {
    const int64_t p = p_, vectors = (k + kGroup - 1) / kGroup;
    const T* tau = work.numbers.get() + 2 * stride_;
    if (!work.one_lanes.get()) {
      const int64_t most = (k_ + kGroup - 1) / kGroup;
      work.one_lanes = Buffer<Vec<T>>(p * most);
      work.one_doubles = Buffer<Doubles>(p * most * (kGroup / kLanes<double>));
    }
    Vec<T>* z = work.one_lanes.get();
    if (decoupled) {
      std::fill(z, z + p * vectors, Vec<T>{});
      for (int64_t j = 0; j < k; ++j) z[work.order[j] * vectors + j / kGroup][j % kGroup] = 1;
    } else {
      inverse_iteration_of_one(k, lambda, work);
    }
    apply_q_one<T>(p, matrix, stride_, tau, vectors, z);
    for (int64_t first = 0; first < p; first += kGroup) {
      for (int64_t n = 0; n < vectors; ++n) {
        Vec<T> block[kGroup];
        for (int i = 0; i < kGroup; ++i) block[i] = first + i < p ? z[(first + i) * vectors + n] : Vec<T>{};
        transpose<T>(block);
        for (int64_t j = n * kGroup; j < std::min<int64_t>((n + 1) * kGroup, k); ++j)
          simd::store<T>(a + j * stride_ + first, block[j % kGroup]);
      }
    }
    sort_and_normalize(k, a, lambda);
  }

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
  void sort_and_normalize(int64_t k, T* a, double* lambda) const {
    for (int64_t j = 1; j < k; ++j)
      for (int64_t i = j; i > 0 && lambda[i] > lambda[i - 1]; --i) {
        std::swap(lambda[i], lambda[i - 1]);
        std::swap_ranges(a + i * stride_, a + (i + 1) * stride_, a + (i - 1) * stride_);
      }
    for (int64_t j = 0; j < k; ++j) {
      lambda[j] = std::max(lambda[j], 0.0);
      T* v = a + j * stride_;
      const T factor = static_cast<T>(1 / std::sqrt(product<T>(v, v, stride_)));
      for (int64_t i = 0; i < p_; ++i) v[i] *= factor;
    }
    if (sizeof(T) == sizeof(double)) orthonormalize_rows<T>(a, k, stride_);
  }

  static constexpr int kSolves = 3;

  int64_t p_, k_, stride_;
};

}  // namespace kdkernels::truncated_svd
