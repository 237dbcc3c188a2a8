// The k largest triplets of one matrix: Gram matrix, tridiagonal form, eigenvectors, the vectors of
// the larger side, signs.
//
// Squaring loses accuracy if the kept singular values span orders of magnitude. Therefore a round
// takes only the values down to kIllConditioned times its largest one. The next values come from
// the residual of M without the vectors found so far, which is as accurate as M. Most matrices need
// one round.
#pragma once

#include "gram.h"
#include "spectrum.h"
#include "tridiagonal.h"

namespace kdkernels::truncated_svd::gpu {

// The state of a matrix, see state_size. Row i of the packed triangle contains the reflector i.
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
  KDKERNELS_GPU Forward(Cta& cta, const ForwardProblem& problem, int64_t b, const WorkingMemory<T>& memory)
      : cta_(cta),
        problem_(problem),
        memory_(memory),
        p_(problem.p),
        q_(problem.q),
        k_(problem.k),
        stride_(tile_stride(problem.p)),
        a_(static_cast<T*>(problem.a) + b * k_ * p_),
        b_(problem.b ? static_cast<T*>(problem.b) + b * k_ * q_ : nullptr),
        s_(static_cast<T*>(problem.s) + b * k_),
        state_(problem.state ? static_cast<T*>(problem.state) + b * state_size(p_, k_) : nullptr) {}

  KDKERNELS_GPU void run(int64_t b) {
    MatrixSource<T> m{problem_.x, b * problem_.x.stride_batch, p_, q_, T(1), memory_.vectors, 0, memory_.projections};
    double scale, first_unit;
    if (!first_gram(m, scale, first_unit)) return;
    for (int found = 0;;) {
      const int wanted = k_ - found;
      const double unit = found == 0 ? first_unit : residual_gram(m);
      tridiagonalize(cta_, p_, memory_.matrix, memory_);
      if (found == 0 && state_) save_state(scale, unit);
      largest_eigenvalues(cta_, p_, wanted, memory_);
      eigenvectors(cta_, p_, wanted, memory_);
      sort_eigenvalues(wanted);
      if (found == 0 && state_) save_lambda(unit);
      back_transform(found, wanted);
      const double* lambda = memory_.lambda;
      cta_.each(wanted, [&](int j) { memory_.sigma[found + j] = square_root(lambda[j]) / unit; });
      const int accurate = count_accurate(found, wanted);
      if (accurate == wanted) break;
      found += accurate;
      m.count = found;
      m.scale = static_cast<T>(scale);
    }
    cta_.warps(k_,
               [&](const Warp& warp, int j) { warp.each(p_, [&](int i) { a_[int64_t(j) * p_ + i] = memory_.vectors[j * stride_ + i]; }); });
    if (b_) {
      m.count = 0;
      m.scale = T(1);
      compute_larger_side(m, static_cast<T>(scale));
    }
    // Sort, because rounding may leave equal values of different rounds in the wrong order.
    cta_.each(1, [&](int) {
      double* sigma = memory_.sigma;
      for (int j = 1; j < k_; ++j)
        for (int i = j; i > 0 && sigma[i] > sigma[i - 1]; --i) {
          const double sigma_i = sigma[i];
          sigma[i] = sigma[i - 1];
          sigma[i - 1] = sigma_i;
        }
      for (int j = 0; j < k_; ++j) s_[j] = static_cast<T>(sigma[j] / scale);
    });
    if (problem_.sign) fix_signs();
  }

 private:
  // Computes the Gram matrix of unit * scale * M, which has a trace in [1/4, 1). scale is a normal
  // number of T; unit is 1 unless scale alone would not be a normal number. Returns false if M
  // contains a NaN or an infinity; the results are then NaN.
  KDKERNELS_STAGE bool first_gram(MatrixSource<T>& m, double& scale, double& unit) {
    scale = unit = 1;
    gram(cta_, m, memory_.tiles, memory_.matrix);
    double total = trace(cta_, p_, memory_.matrix);
    if (!(total > kLowestTrace<T> && total < kHighestTrace<T>)) {
      const int not_finite = cta_.template sum<int>(q_, [&](int c) {
        int count = 0;
        for (int i = 0; i < p_; ++i) count += !is_finite(m.at(i, c));
        return count > 0;
      });
      if (not_finite > 0) {
        fill_results(Limits<T>::nan);
        return false;
      }
      const T largest = cta_.template max<T>(T(0), q_, [&](int c) {
        T value = T(0);
        for (int i = 0; i < p_; ++i) value = larger(value, absolute(m.at(i, c)));
        return value;
      });
      if (largest == T(0)) {
        zero_matrix();
        return true;
      }
      scale = normalizing_power<T>(static_cast<double>(largest));
      m.scale = static_cast<T>(scale);
      gram(cta_, m, memory_.tiles, memory_.matrix);
      total = trace(cta_, p_, memory_.matrix);
    }
    constexpr int max_exponent = Limits<T>::max_exponent - 2;
    const int exponent = exponent_of(scale) + exponent_of(normalize(total)), scale_exponent = exponent < -max_exponent  ? -max_exponent
                                                                                              : exponent > max_exponent ? max_exponent
                                                                                                                        : exponent;
    scale = power_of_two(scale_exponent), unit = power_of_two(exponent - scale_exponent);
    return true;
  }

  // Computes the Gram matrix of the residual of scale * M, times the square of the returned power
  // of two.
  KDKERNELS_STAGE double residual_gram(const MatrixSource<T>& m) {
    gram(cta_, m, memory_.tiles, memory_.matrix);
    const double total = trace(cta_, p_, memory_.matrix);
    if (total > kLowestTrace<T>) return normalize(total);
    zero_matrix();
    return 1;
  }

  // Scales a Gram matrix with the trace `total` by the square of the returned power of two, so that
  // the trace is in [1/4, 1).
  KDKERNELS_GPU double normalize(double total) {
    const int exponent = exponent_of(total) + 1, half = (exponent + (exponent > 0 ? 1 : 0)) / 2;
    const T factor = static_cast<T>(power_of_two(-2 * half));
    for_each_entry([&](T& x) { x *= factor; });
    return power_of_two(-half);
  }
  KDKERNELS_GPU void zero_matrix() {
    for_each_entry([](T& x) { x = T(0); });
  }
  template <typename F>
  KDKERNELS_GPU void for_each_entry(F f) {
    T* matrix = memory_.matrix;
    cta_.warps(p_, [&](const Warp& warp, int i) { warp.each(p_, [&](int c) { f(matrix[int64_t(i) * matrix_stride(p_) + c]); }); });
  }

  KDKERNELS_STAGE void fill_results(T value) {
    cta_.each(k_ * p_, [&](int i) { a_[i] = value; });
    if (b_)
      for (int j = 0; j < k_; ++j) cta_.each(q_, [&](int i) { b_[int64_t(j) * q_ + i] = value; });
    cta_.each(k_, [&](int j) { s_[j] = value; });
  }

  // Saves the tridiagonal form of the Gram matrix of scale * M.
  KDKERNELS_STAGE void save_state(double scale, double unit) {
    const State<T> state(state_, p_, k_);
    const T* matrix = memory_.matrix;
    const T inverse_square = static_cast<T>(1 / (unit * unit));
    cta_.warps(p_, [&](const Warp& warp, int i) {
      warp.each(i + 1, [&](int c) { state.reflectors[int64_t(i) * (i + 1) / 2 + c] = matrix[int64_t(i) * matrix_stride(p_) + c]; });
    });
    cta_.each(p_, [&](int i) {
      state.tau[i] = memory_.tau[i], state.d[i] = inverse_square * memory_.d[i], state.e[i] = inverse_square * memory_.e[i];
    });
    cta_.each(1, [&](int) { *state.scale = static_cast<T>(scale); });
  }
  KDKERNELS_GPU void save_lambda(double unit) {
    const State<T> state(state_, p_, k_);
    cta_.each(k_, [&](int j) {
      const double lambda = memory_.lambda[j] / (unit * unit);
      state.lambda_high[j] = static_cast<T>(lambda);
      state.lambda_low[j] = static_cast<T>(lambda - static_cast<double>(static_cast<T>(lambda)));
    });
  }

  // Sorts the eigenvalues, because rounding may leave the Rayleigh quotients of equal eigenvalues
  // in the wrong order.
  KDKERNELS_GPU void sort_eigenvalues(int count) {
    double* lambda = memory_.lambda;
    int* order = memory_.order;
    cta_.each(1, [&](int) {
      for (int j = 0; j < count; ++j) {
        const double value = lambda[j] > 0 ? lambda[j] : 0.0;
        int i = j;
        for (; i > 0 && value > lambda[i - 1]; --i) lambda[i] = lambda[i - 1], order[i] = order[i - 1];
        lambda[i] = value, order[i] = j;
      }
    });
  }

  // Transforms the eigenvectors of T to eigenvectors of G of length 1, which become vectors `found`
  // and following.
  KDKERNELS_STAGE void back_transform(int found, int count) {
    T* z = memory_.vectors + found * stride_;
    const T* matrix = memory_.matrix;
    const int ld = matrix_stride(p_);
    cta_.warps(count, [&](const Warp& warp, int j) {
      const double* from = memory_.x + int64_t(memory_.order[j]) * p_;
      warp.each(stride_, [&](int i) { z[j * stride_ + i] = i < p_ ? static_cast<T>(from[i]) : T(0); });
    });
    apply_q(cta_, p_, [=](int i) { return matrix + int64_t(i) * ld; }, memory_.tau, false, count, z, stride_);
    if (found > 0) {
      orthonormalize(cta_, found, k_, p_, memory_.vectors, stride_, memory_.dots);
      return;
    }
    cta_.warps(count, [&](const Warp& warp, int j) {
      T* vector = z + j * stride_;
      const double squares = warp.sum<double>(p_, [&](int i) { return static_cast<double>(vector[i]) * static_cast<double>(vector[i]); });
      const T factor = static_cast<T>(1 / square_root(squares));
      warp.each(p_, [&](int i) { vector[i] *= factor; });
    });
  }

  // The number of accurate values of a round: those near its largest value, or all of them if the
  // largest value is only a rounding error of sigma_1.
  KDKERNELS_GPU int count_accurate(int found, int count) {
    const double *sigma = memory_.sigma, first = cta_.read(sigma[found]);
    if (found > 0 && !(first > 4 * Limits<T>::eps * cta_.read(sigma[0]))) return count;
    int accurate = 1;
    while (accurate < count && cta_.read(sigma[found + accurate]) >= kIllConditioned * first) ++accurate;
    return first > 0 ? accurate : count;
  }

  // Computes b_j and sigma_j from W_j = M^T a_j. If sigma_j is small, rounding errors of sigma_1
  // spoil the angles between b_j and the vectors before it, so b_j is made orthogonal to them
  // again.
  KDKERNELS_STAGE void compute_larger_side(const MatrixSource<T>& m, T scale) {
    T* b = b_;
    const int k = k_, stride = stride_, q = q_;
    const T* a = memory_.vectors;
    stream(cta_, m, 0, q, memory_.tiles, [&](const T* tile, int first_column, int count) {
      KDKERNELS_SHARED(tile);
      cta_.start([&](int t) {
        for (int task = t; task < count * k; task += Cta::kThreads) {
          const int j = task % k, c = task / k;
          T sum = T(0);
          for (int i = 0; i < stride; i += 4) {
            const Four<T> x = load_four(tile + c * stride + i), y = load_four(a + j * stride + i);
            sum += (scale * x.x[0] * y.x[0] + scale * x.x[1] * y.x[1]) + (scale * x.x[2] * y.x[2] + scale * x.x[3] * y.x[3]);
          }
          b[int64_t(j) * q + first_column + c] = sum;
        }
      });
    });
    double* sigma = memory_.sigma;
    cta_.warps(k, [&](const Warp& warp, int j) {
      T* vector = b + int64_t(j) * q;
      const double norm =
          square_root(warp.sum<double>(q, [&](int i) { return static_cast<double>(vector[i]) * static_cast<double>(vector[i]); }));
      if (norm > 1e3 * Limits<T>::smallest) warp.each(q, [&](int i) { vector[i] = static_cast<T>(static_cast<double>(vector[i]) / norm); });
      warp.each(1, [&](int) { sigma[j] = norm; });
    });
    const double sigma_1 = cta_.read(sigma[0]);
    for (int j = 0; j < k; ++j) {
      const double sigma_j = cta_.read(sigma[j]);
      if (!(sigma_j > 0.5 * sigma_1) || !(sigma_j > 1e3 * Limits<T>::smallest)) orthonormalize(cta_, j, j + 1, q, b, q, memory_.dots);
    }
    cta_.barrier();
  }

  // Flips vectors so that the entry of largest magnitude, on the side that decides, is positive.
  // Among equal magnitudes (see kSignTies) the first entry decides.
  KDKERNELS_STAGE void fix_signs() {
    T *deciding = problem_.sign_on_a ? a_ : b_, *other = problem_.sign_on_a ? b_ : a_;
    const int n = problem_.sign_on_a ? p_ : q_, other_length = problem_.sign_on_a ? q_ : p_;
    cta_.warps(k_, [&](const Warp& warp, int j) {
      T* x = deciding + int64_t(j) * n;
      const T max_magnitude = warp.max<T>(T(0), n, [&](int i) { return absolute(x[i]); });
      const T threshold = static_cast<T>(1 - kSignTies) * max_magnitude;
      const int first = warp.min<int>(n, n, [&](int i) { return absolute(x[i]) >= threshold ? i : n; });
      const bool flip = first < n && x[first] < T(0);
      warp.each(1, [&](int) { memory_.order[j] = flip; });
    });
    for (int j = 0; j < k_; ++j) {
      if (!cta_.read(memory_.order[j])) continue;
      cta_.each(n, [&](int i) { deciding[int64_t(j) * n + i] = -deciding[int64_t(j) * n + i]; });
      if (other) cta_.each(other_length, [&](int i) { other[int64_t(j) * other_length + i] = -other[int64_t(j) * other_length + i]; });
    }
  }

  Cta& cta_;
  const ForwardProblem& problem_;
  const WorkingMemory<T>& memory_;
  const int p_, q_, k_, stride_;
  T *a_, *b_, *s_, *state_;
};

template <typename T, typename Cta>
KDKERNELS_GPU void forward(Cta& cta, const ForwardProblem& problem, int64_t b, char* shared, int64_t limit) {
  const Plan plan = forward_plan<T>(problem.p, problem.k, limit);
  const WorkingMemory<T> memory(plan, problem.p, problem.k, false, shared, static_cast<char*>(problem.workspace) + b * plan.workspace());
  Forward<Cta, T>(cta, problem, b, memory).run(b);
}

}  // namespace kdkernels::truncated_svd::gpu
