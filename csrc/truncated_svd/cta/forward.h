// The k largest triplets of one matrix: Gram matrix, tridiagonal form, eigenvectors, the larger side's vectors, signs.
//
// Squaring costs digits where the kept values span orders of magnitude. So only values down to kIllConditioned of the largest are taken at
// a time; the next ones come from what is left of M without those, which is as exact as M is. Most matrices need one round.
#pragma once

#include "gram.h"
#include "spectrum.h"
#include "tridiagonal.h"

namespace kdkernels::truncated_svd::gpu {

// A matrix's state, see state_size. Rows of the packed triangle are the reflectors.
template <typename T>
struct State {
  T *reflectors, *tau, *d, *e, *lambda_high, *lambda_low, *scale;
  KDKERNELS_GPU State(T* from, int p, int k)
      : reflectors(from),
        tau(from + int64_t(p) * (p + 1) / 2),
        d(tau + p),
        e(d + p),
        lambda_high(e + p),
        lambda_low(lambda_high + k),
        scale(lambda_low + k) {}
};

template <typename Cta, typename T>
class Forward {
 public:
  KDKERNELS_GPU Forward(Cta& cta, const ForwardProblem& problem, int64_t b, const Room<T>& room)
      : cta_(cta),
        problem_(problem),
        room_(room),
        p_(problem.p),
        q_(problem.q),
        k_(problem.k),
        stride_(tile_stride(problem.p)),
        a_(static_cast<T*>(problem.a) + b * k_ * p_),
        b_(problem.b ? static_cast<T*>(problem.b) + b * k_ * q_ : nullptr),
        s_(static_cast<T*>(problem.s) + b * k_),
        state_(problem.state ? static_cast<T*>(problem.state) + b * state_size(p_, k_) : nullptr) {}

  KDKERNELS_GPU void run(int64_t b) {
    Source<T> m{problem_.x, b * problem_.x.stride_batch, p_, q_, T(1), room_.vectors, 0, room_.along};
    double scale, first_unit;
    if (!first_gram(m, scale, first_unit)) return;
    for (int found = 0;;) {
      const int wanted = k_ - found;
      const double unit = found == 0 ? first_unit : residual_gram(m);
      tridiagonalize(cta_, p_, room_.matrix, room_);
      if (found == 0 && state_) save(scale, unit);
      largest_eigenvalues(cta_, p_, wanted, room_);
      eigenvectors(cta_, p_, wanted, room_);
      sort(wanted);
      if (found == 0 && state_) save_lambda(unit);
      take_vectors(found, wanted);
      const double* lambda = room_.lambda;
      cta_.each(wanted, [&](int j) { room_.sigma[found + j] = square_root(lambda[j]) / unit; });
      const int exact = accepted(found, wanted);
      if (exact == wanted) break;
      found += exact;
      m.count = found;
      m.scale = static_cast<T>(scale);
    }
    cta_.warps(k_,
               [&](const Warp& warp, int j) { warp.each(p_, [&](int i) { a_[int64_t(j) * p_ + i] = room_.vectors[j * stride_ + i]; }); });
    if (b_) {
      m.count = 0;
      m.scale = T(1);
      larger_side(m, static_cast<T>(scale));
    }
    cta_.each(1, [&](int) {  // descending: rounds and norms may leave equal ones out of order by a rounding
      double* sigma = room_.sigma;
      for (int j = 1; j < k_; ++j)
        for (int i = j; i > 0 && sigma[i] > sigma[i - 1]; --i) {
          const double other = sigma[i];
          sigma[i] = sigma[i - 1];
          sigma[i - 1] = other;
        }
      for (int j = 0; j < k_; ++j) s_[j] = static_cast<T>(sigma[j] / scale);
    });
    if (problem_.sign) signs();
  }

 private:
  // G of unit scale M, with a trace in [1/4, 1). The scale is a normal number of T; unit is 1, but where that leaves something to do.
  // False: M holds a NaN or an infinity, and so do the results.
  KDKERNELS_STAGE bool first_gram(Source<T>& m, double& scale, double& unit) {
    scale = unit = 1;
    gram(cta_, m, room_.tiles, room_.matrix);
    double total = trace(cta_, p_, room_.matrix);
    if (!(total > kLowestTrace<T> && total < kHighestTrace<T>)) {
      const int broken = cta_.template sum<int>(q_, [&](int c) {
        int count = 0;
        for (int i = 0; i < p_; ++i) count += !is_finite(m.at(i, c));
        return count > 0;
      });
      if (broken > 0) {
        fill(Limits<T>::nan);
        return false;
      }
      const T largest = cta_.template max<T>(T(0), q_, [&](int c) {
        T value = T(0);
        for (int i = 0; i < p_; ++i) value = larger(value, absolute(m.at(i, c)));
        return value;
      });
      if (largest == T(0)) {
        clear();
        return true;
      }
      scale = unit_for<T>(static_cast<double>(largest));
      m.scale = static_cast<T>(scale);
      gram(cta_, m, room_.tiles, room_.matrix);
      total = trace(cta_, p_, room_.matrix);
    }
    constexpr int most = Limits<T>::max_exponent - 2;
    const int wanted = exponent_of(scale) + exponent_of(normalize(total)), own = wanted < -most ? -most : wanted > most ? most : wanted;
    scale = power_of_two(own), unit = power_of_two(wanted - own);
    return true;
  }

  // G of what is left of scale M, times the square of the power of two that is returned.
  KDKERNELS_STAGE double residual_gram(const Source<T>& m) {
    gram(cta_, m, room_.tiles, room_.matrix);
    const double total = trace(cta_, p_, room_.matrix);
    if (total > kLowestTrace<T>) return normalize(total);
    clear();
    return 1;
  }

  // Brings a trace of `total` into [1/4, 1) with the square of the power of two that is returned.
  KDKERNELS_GPU double normalize(double total) {
    const int exponent = exponent_of(total) + 1, half = (exponent + (exponent > 0 ? 1 : 0)) / 2;
    const T factor = static_cast<T>(power_of_two(-2 * half));
    over_matrix([&](T& x) { x *= factor; });
    return power_of_two(-half);
  }
  KDKERNELS_GPU void clear() {
    over_matrix([](T& x) { x = T(0); });
  }
  template <typename F>
  KDKERNELS_GPU void over_matrix(F f) {
    T* matrix = room_.matrix;
    cta_.warps(p_, [&](const Warp& warp, int i) { warp.each(p_, [&](int c) { f(matrix[int64_t(i) * matrix_stride(p_) + c]); }); });
  }

  KDKERNELS_STAGE void fill(T value) {
    cta_.each(k_ * p_, [&](int i) { a_[i] = value; });
    if (b_)
      for (int j = 0; j < k_; ++j) cta_.each(q_, [&](int i) { b_[int64_t(j) * q_ + i] = value; });
    cta_.each(k_, [&](int j) { s_[j] = value; });
  }

  // Of scale M.
  KDKERNELS_STAGE void save(double scale, double unit) {
    const State<T> state(state_, p_, k_);
    const T* matrix = room_.matrix;
    const T back = static_cast<T>(1 / (unit * unit));
    cta_.warps(p_, [&](const Warp& warp, int i) {
      warp.each(i + 1, [&](int c) { state.reflectors[int64_t(i) * (i + 1) / 2 + c] = matrix[int64_t(i) * matrix_stride(p_) + c]; });
    });
    cta_.each(p_, [&](int i) { state.tau[i] = room_.tau[i], state.d[i] = back * room_.d[i], state.e[i] = back * room_.e[i]; });
    cta_.each(1, [&](int) { *state.scale = static_cast<T>(scale); });
  }
  KDKERNELS_GPU void save_lambda(double unit) {
    const State<T> state(state_, p_, k_);
    cta_.each(k_, [&](int j) {
      const double lambda = room_.lambda[j] / (unit * unit);
      state.lambda_high[j] = static_cast<T>(lambda);
      state.lambda_low[j] = static_cast<T>(lambda - static_cast<double>(static_cast<T>(lambda)));
    });
  }

  // Rayleigh quotients of equal eigenvalues may come out of order by a rounding.
  KDKERNELS_GPU void sort(int count) {
    double* lambda = room_.lambda;
    int* order = room_.order;
    cta_.each(1, [&](int) {
      for (int j = 0; j < count; ++j) {
        const double value = lambda[j] > 0 ? lambda[j] : 0.0;
        int i = j;
        for (; i > 0 && value > lambda[i - 1]; --i) lambda[i] = lambda[i - 1], order[i] = order[i - 1];
        lambda[i] = value, order[i] = j;
      }
    });
  }

  // Eigenvectors of T become those of G, of length 1, in the places from `found` on.
  KDKERNELS_STAGE void take_vectors(int found, int count) {
    T* z = room_.vectors + found * stride_;
    const T* matrix = room_.matrix;
    const int ld = matrix_stride(p_);
    cta_.warps(count, [&](const Warp& warp, int j) {
      const double* from = room_.x + int64_t(room_.order[j]) * p_;
      warp.each(stride_, [&](int i) { z[j * stride_ + i] = i < p_ ? static_cast<T>(from[i]) : T(0); });
    });
    apply_q(cta_, p_, [=](int i) { return matrix + int64_t(i) * ld; }, room_.tau, false, count, z, stride_);
    if (found > 0) {
      orthonormalize(cta_, found, k_, p_, room_.vectors, stride_, room_.dots);
      return;
    }
    cta_.warps(count, [&](const Warp& warp, int j) {
      T* own = z + j * stride_;
      const double squares = warp.sum<double>(p_, [&](int i) { return static_cast<double>(own[i]) * static_cast<double>(own[i]); });
      const T factor = static_cast<T>(1 / square_root(squares));
      warp.each(p_, [&](int i) { own[i] *= factor; });
    });
  }

  // How many of a round's values are exact: those near its largest, or all where that is a rounding of the first.
  KDKERNELS_GPU int accepted(int found, int count) {
    const double *sigma = room_.sigma, first = cta_.read(sigma[found]);
    if (found > 0 && !(first > 4 * Limits<T>::eps * cta_.read(sigma[0]))) return count;
    int exact = 1;
    while (exact < count && cta_.read(sigma[found + exact]) >= kIllConditioned * first) ++exact;
    return first > 0 ? exact : count;
  }

  // b_j and sigma_j from W_j = M^T a_j. Where sigma_j is small, roundings of sigma_1 spoil the angles to the vectors before: those are made
  // right again.
  KDKERNELS_STAGE void larger_side(const Source<T>& m, T scale) {
    T* b = b_;
    const int k = k_, stride = stride_, q = q_;
    const T* a = room_.vectors;
    stream(cta_, m, 0, q, room_.tiles, [&](const T* tile, int first, int count) {
      KDKERNELS_SHARED(tile);
      cta_.start([&](int t) {
        for (int task = t; task < count * k; task += Cta::kThreads) {
          const int j = task % k, c = task / k;
          T sum = T(0);
          for (int i = 0; i < stride; i += 4) {
            const Four<T> x = four(tile + c * stride + i), y = four(a + j * stride + i);
            sum += (scale * x.x[0] * y.x[0] + scale * x.x[1] * y.x[1]) + (scale * x.x[2] * y.x[2] + scale * x.x[3] * y.x[3]);
          }
          b[int64_t(j) * q + first + c] = sum;
        }
      });
    });
    double* sigma = room_.sigma;
    cta_.warps(k, [&](const Warp& warp, int j) {
      T* own = b + int64_t(j) * q;
      const double norm =
          square_root(warp.sum<double>(q, [&](int i) { return static_cast<double>(own[i]) * static_cast<double>(own[i]); }));
      if (norm > 1e3 * Limits<T>::smallest) warp.each(q, [&](int i) { own[i] = static_cast<T>(static_cast<double>(own[i]) / norm); });
      warp.each(1, [&](int) { sigma[j] = norm; });
    });
    const double first = cta_.read(sigma[0]);
    for (int j = 0; j < k; ++j) {
      const double own = cta_.read(sigma[j]);
      if (!(own > 0.5 * first) || !(own > 1e3 * Limits<T>::smallest)) orthonormalize(cta_, j, j + 1, q, b, q, room_.dots);
    }
    cta_.barrier();
  }

  // The entry of largest magnitude, the first of equals (see kSignTies), of the side that decides is made positive.
  KDKERNELS_STAGE void signs() {
    T *own = problem_.sign_on_a ? a_ : b_, *other = problem_.sign_on_a ? b_ : a_;
    const int n = problem_.sign_on_a ? p_ : q_, others = problem_.sign_on_a ? q_ : p_;
    cta_.warps(k_, [&](const Warp& warp, int j) {
      T* x = own + int64_t(j) * n;
      const T most = warp.max<T>(T(0), n, [&](int i) { return absolute(x[i]); });
      const T least = static_cast<T>(1 - kSignTies) * most;
      const int first = warp.min<int>(n, n, [&](int i) { return absolute(x[i]) >= least ? i : n; });
      const bool flip = first < n && x[first] < T(0);
      warp.each(1, [&](int) { room_.order[j] = flip; });
    });
    for (int j = 0; j < k_; ++j) {
      if (!cta_.read(room_.order[j])) continue;
      cta_.each(n, [&](int i) { own[int64_t(j) * n + i] = -own[int64_t(j) * n + i]; });
      if (other) cta_.each(others, [&](int i) { other[int64_t(j) * others + i] = -other[int64_t(j) * others + i]; });
    }
  }

  Cta& cta_;
  const ForwardProblem& problem_;
  const Room<T>& room_;
  const int p_, q_, k_, stride_;
  T *a_, *b_, *s_, *state_;
};

template <typename T, typename Cta>
KDKERNELS_GPU void forward(Cta& cta, const ForwardProblem& problem, int64_t b, char* shared, int64_t limit) {
  const Plan plan = forward_plan<T>(problem.p, problem.k, limit);
  const Room<T> room(plan, problem.p, problem.k, false, shared, static_cast<char*>(problem.workspace) + b * plan.workspace());
  Forward<Cta, T>(cta, problem, b, room).run(b);
}

}  // namespace kdkernels::truncated_svd::gpu
