// The derivative, with the formulas of csrc/truncated_svd/derivative.h, in two kernels. `solve`
// computes z_j and the coefficients of y_j, with one block of threads per matrix (several small
// matrices share a block). `update` reads M once and writes dM = sum_j z_j (M^T a_j)^T + a_j y_j^T;
// the columns of a matrix are distributed over blocks.
//
// `solve` uses the tridiagonal form of G from the forward pass. If that was not saved or is
// inaccurate, it computes the tridiagonal form of P G P, where P removes the kept vectors. This is
// equal to G on the subspace in which the system is solved, and does not contain the large
// eigenvalues.
#pragma once

#include "forward.h"

namespace kdkernels::truncated_svd::gpu {

// The coefficients of a matrix, see coefficients_size.
struct Coefficients {
  double *w_factor, *gb_factor, *b_factor, *factor, *scale;
  KDKERNELS_GPU Coefficients(double* from, int k)
      : w_factor(from), gb_factor(w_factor + k), b_factor(gb_factor + k), factor(b_factor + k * k), scale(factor + 1) {}
};

template <typename Cta, typename T>
class Solve {
 public:
  KDKERNELS_GPU Solve(Cta& cta, const BackwardProblem& problem, int64_t b, const WorkingMemory<T>& memory)
      : cta_(cta),
        problem_(problem),
        memory_(memory),
        b_(b),
        p_(problem.p),
        q_(problem.q),
        k_(problem.k),
        stride_(tile_stride(problem.p)),
        a_(memory.vectors),
        z_(a_ + int64_t(problem.k) * stride_),
        mg_(z_ + int64_t(problem.k) * stride_) {}

  KDKERNELS_GPU void run() {
    const T* s = static_cast<const T*>(problem_.s) + b_ * k_;
    const Coefficients to(problem_.coefficients + b_ * coefficients_size(k_), k_);
    T* z = static_cast<T*>(problem_.z) + b_ * k_ * p_;
    const double sigma_1 = static_cast<double>(s[0]);
    // The gradient of a zero matrix is 0. The gradient of a matrix that contains a NaN or an
    // infinity is NaN, or 0 if the loss left the matrix out.
    if (!(sigma_1 > 0)) {
      const double value = sigma_1 == 0 || gradients_are_zero() ? 0.0 : Limits<double>::nan;
      cta_.each(k_ * p_, [&](int i) { z[i] = static_cast<T>(value); });
      cta_.each(static_cast<int>(coefficients_size(k_)) - 1, [&](int i) { to.w_factor[i] = value; });
      cta_.each(1, [&](int) { *to.scale = 1; });
      return;
    }
    // The state is more accurate than s, which has few digits below the normal numbers and is
    // infinite past the largest number.
    const State<T> state(static_cast<T*>(const_cast<void*>(problem_.state)) + (problem_.state ? b_ * state_size(p_, k_) : 0), p_, k_);
    auto saved_lambda = [&](int j) { return static_cast<double>(state.lambda_high[j]) + static_cast<double>(state.lambda_low[j]); };
    const bool recompute = !problem_.state || !(saved_lambda(k_ - 1) >= kIllConditioned * kIllConditioned * saved_lambda(0));
    constexpr double max_value = static_cast<double>(Limits<T>::largest);
    const double scale = recompute ? normalizing_power<T>(sigma_1 < max_value ? sigma_1 : max_value) : static_cast<double>(*state.scale);
    const T* a = static_cast<const T*>(problem_.a) + b_ * k_ * p_;
    cta_.warps(k_, [&](const Warp& warp, int j) {
      warp.each(stride_, [&](int i) { a_[j * stride_ + i] = i < p_ ? a[int64_t(j) * p_ + i] : T(0); });
    });
    double *inverse = memory_.sigma, *lambda = memory_.lambda;
    auto sigma = [&](int j) {
      const double sigma_j = static_cast<double>(s[j]);
      return recompute ? (sigma_j < max_value ? sigma_j : max_value) * scale : square_root(saved_lambda(j));
    };
    cta_.each(k_, [&](int j) {
      const double sigma_j = sigma(j);
      inverse[j] = sigma_j > kVanishing<T> * sigma(0) ? 1 / sigma_j : 0;
      lambda[j] = recompute ? sigma_j * sigma_j : saved_lambda(j);
    });
    MatrixSource<T> m{problem_.x, b_ * problem_.x.stride_batch, p_, q_, T(1), a_, 0, memory_.projections};
    const double grad_scale = scale_of_gradients(scale);
    compute_right_sides(m, static_cast<T>(scale), grad_scale);
    const T *ga = gradient_rows(problem_.ga, p_), *gb = gradient_rows(problem_.gb, q_), *b = gradient_rows(problem_.b, q_);
    double *a_differences = memory_.products, *b_differences = a_differences + k_ * k_, *b_products = b_differences + k_ * k_;
    differences(a_, stride_, ga, p_, grad_scale, b_products, a_differences);
    differences(b, q_, gb, q_, grad_scale, b_products, b_differences);

    if (recompute) {
      m.scale = static_cast<T>(scale);
      m.count = k_;
      gram(cta_, m, memory_.tiles, memory_.matrix);
      tridiagonalize(cta_, p_, memory_.matrix, memory_);
    } else {
      cta_.each(p_, [&](int i) { memory_.tau[i] = state.tau[i], memory_.d[i] = state.d[i], memory_.e[i] = state.e[i]; });
    }
    const T *matrix = memory_.matrix, *packed = state.reflectors;
    const int ld = matrix_stride(p_);
    auto reflector = [=](int i) { return recompute ? matrix + int64_t(i) * ld : packed + int64_t(i) * (i + 1) / 2; };
    apply_q(cta_, p_, reflector, memory_.tau, true, k_, z_, stride_);
    const double gap_eps = problem_.gap_eps, largest = square_root(cta_.read(lambda[0]));
    for (int begin = 0; begin < k_; begin += kVectorsAtOnce) {
      const int at_once = smaller(k_ - begin, kVectorsAtOnce);
      cta_.each(at_once, [&](int system) {
        const double value = lambda[begin + system], eps = gap_noise(largest, square_root(larger(value, 0.0)), gap_eps);
        resolvent(p_, memory_.d, memory_.e, value, eps, z_ + (begin + system) * stride_, memory_.x, at_once, system);
      });
    }
    apply_q(cta_, p_, reflector, memory_.tau, false, k_, z_, stride_);
    remove_kept();
    cta_.warps(k_, [&](const Warp& warp, int j) {
      for (int i = 0; i < k_; ++i) {
        const T factor = static_cast<T>(0.5 * a_differences[i * k_ + j] * damped_inverse_gap(lambda[0], lambda[j], lambda[i], gap_eps));
        warp.each(p_, [&](int c) { z_[j * stride_ + c] += factor * a_[i * stride_ + c]; });
      }
      warp.each(p_, [&](int c) { z[int64_t(j) * p_ + c] = z_[j * stride_ + c]; });
    });
    const T* gs = static_cast<const T*>(problem_.gs);
    cta_.each(k_, [&](int j) {
      to.w_factor[j] = gs ? static_cast<double>(gs[b_ * k_ + j]) * (grad_scale / scale) * inverse[j] : 0.0;
      to.gb_factor[j] = gb ? grad_scale * inverse[j] : 0.0;
      for (int i = 0; i < k_; ++i)
        to.b_factor[j * k_ + i] = gb ? sigma(j) * b_differences[j * k_ + i] * damped_inverse_gap(lambda[0], lambda[i], lambda[j], gap_eps) -
                                           b_products[i * k_ + j] * inverse[j]
                                     : 0.0;
    });
    cta_.each(1, [&](int) { *to.factor = scale / grad_scale, *to.scale = scale; });
  }

 private:
  // Whether all upstream gradients are 0. Every thread reads all of them, because this case is
  // rare.
  KDKERNELS_GPU bool gradients_are_zero() const {
    const void* gradients[] = {problem_.ga, problem_.gb, problem_.gs};
    const int lengths[] = {p_, q_, 1};
    for (int i_gradient = 0; i_gradient < 3; ++i_gradient) {
      const T* g = gradient_rows(gradients[i_gradient], lengths[i_gradient]);
      for (int64_t i = 0; g && i < k_ * int64_t(lengths[i_gradient]); ++i)
        if (!(g[i] == T(0))) return false;
    }
    return true;
  }

  KDKERNELS_GPU const T* gradient_rows(const void* from, int n) const {
    return from ? static_cast<const T*>(from) + b_ * k_ * int64_t(n) : nullptr;
  }

  // A power of two that brings the largest upstream gradient near 1, or as close to it as keeps
  // scale / grad_scale in range.
  KDKERNELS_STAGE double scale_of_gradients(double scale) {
    double largest = 0;
    auto update_largest = [&](const void* from, int n, double factor) {
      const T* g = gradient_rows(from, n);
      if (!g) return;
      const T max_magnitude = cta_.template max<T>(T(0), k_ * n, [&](int i) { return absolute(g[i]); });
      largest = larger(largest, static_cast<double>(max_magnitude) * factor);
    };
    update_largest(problem_.ga, p_, 1);
    update_largest(problem_.gb, q_, 1);
    update_largest(problem_.gs, 1, 1 / scale);
    if (!(largest > 0)) return 1;
    const double grad_scale = is_finite(largest) ? normalizing_power<T>(largest) : power_of_two(2 - Limits<T>::max_exponent);
    return larger(grad_scale, scale * power_of_two(2 - Limits<double>::max_exponent));
  }

  // Writes r_j = P (ga_j + M gb_j / sigma_j), scaled, to z.
  KDKERNELS_STAGE void compute_right_sides(const MatrixSource<T>& m, T scale, double grad_scale) {
    const T *ga = gradient_rows(problem_.ga, p_), *gb = gradient_rows(problem_.gb, q_);
    const int k = k_, p = p_, stride = stride_, q = q_;
    T *mg = mg_, *z = z_;
    cta_.each(k * stride, [&](int i) { mg[i] = T(0); });
    if (gb)
      stream(cta_, m, 0, q, memory_.tiles, [&](const T* tile, int first, int count) {
        KDKERNELS_SHARED(tile);
        cta_.start([&](int t) {
          for (int task = t; task < k * p; task += Cta::kThreads) {
            const int j = task / p, i = task % p;
            T sum = T(0);
            for (int c = 0; c < count; ++c)
              sum += scale * tile[c * stride + i] * (static_cast<T>(grad_scale) * gb[int64_t(j) * q + first + c]);
            mg[j * stride + i] += sum;
          }
        });
      });
    const double* inverse = memory_.sigma;
    cta_.warps(k, [&](const Warp& warp, int j) {
      warp.each(stride, [&](int i) {
        const T gradient = ga && i < p ? static_cast<T>(grad_scale) * ga[int64_t(j) * p + i] : T(0);
        z[j * stride + i] = gradient + mg[j * stride + i] * static_cast<T>(inverse[j]);
      });
    });
    remove_kept();
  }

  // Subtracts from z_j its projections onto the kept vectors.
  KDKERNELS_STAGE void remove_kept() {
    cta_.warps(k_, [&](const Warp& warp, int j) {
      T* z_j = z_ + j * stride_;
      for (int i = 0; i < k_; ++i) {
        const T* kept = a_ + i * stride_;
        const T projection = warp.sum<T>(p_, [&](int c) { return z_j[c] * kept[c]; });
        warp.each(p_, [&](int c) { z_j[c] -= projection * kept[c]; });
      }
    });
  }

  // products [k, k] = <x_i, g_j> and result = <x_i, g_j> - <x_j, g_i>. For a function of the span,
  // the result is 0 except for rounding errors, which a small gap would amplify. The largest
  // possible rounding error is therefore subtracted.
  KDKERNELS_STAGE void differences(const T* x, int x_stride, const T* g, int n, double grad_scale, double* products, double* result) {
    const int k = k_;
    double* squares = memory_.squares;
    cta_.each(k * k, [&](int i) { products[i] = 0, result[i] = 0; });
    if (!g) return;
    auto upstream = [=](int j, int c) { return static_cast<double>(g[int64_t(j) * n + c]) * grad_scale; };
    cta_.warps(k * k, [&](const Warp& warp, int task) {
      const int i = task / k, j = task % k;
      const T* x_i = x + int64_t(i) * x_stride;
      const double product = warp.sum<double>(n, [&](int c) { return static_cast<double>(x_i[c]) * upstream(j, c); });
      const double square = i == 0 ? warp.sum<double>(n, [&](int c) { return upstream(j, c) * upstream(j, c); }) : 0.0;
      warp.each(1, [&](int) {
        products[task] = product;
        if (i == 0) squares[j] = square;
      });
    });
    cta_.each(k * k, [&](int task) {
      const int i = task / k, j = task % k;
      const double noise = 8 * Limits<T>::eps * square_root(larger(squares[i], squares[j]));
      const double value = products[i * k + j] - products[j * k + i];
      result[task] = value > noise ? value - noise : value < -noise ? value + noise : value - value;
    });
  }

  Cta& cta_;
  const BackwardProblem& problem_;
  const WorkingMemory<T>& memory_;
  const int64_t b_;
  const int p_, q_, k_, stride_;
  T *a_, *z_, *mg_;
};

template <typename T, typename Cta>
KDKERNELS_GPU void solve(Cta& cta, const BackwardProblem& problem, int64_t b, char* shared, int64_t limit) {
  const Plan plan = backward_plan<T>(problem.p, problem.k, limit);
  const WorkingMemory<T> memory(plan, problem.p, problem.k, true, shared, static_cast<char*>(problem.workspace) + b * plan.workspace());
  Solve<Cta, T>(cta, problem, b, memory).run();
}

template <typename T, typename Cta>
KDKERNELS_GPU void update(Cta& cta, const BackwardProblem& problem, int64_t b, int block, char* shared) {
  // A pass processes kVectors vectors: their z and a, and their w and y.
  constexpr int kVectors = kUpdateVectors, kPairs = 2 * kVectors;
  const int p = problem.p, q = problem.q, k = problem.k, columns = update_tile_columns(p, sizeof(T)), stride = update_tile_stride(p);
  const int begin = block * update_columns(p, sizeof(T)), end = smaller(q, begin + update_columns(p, sizeof(T)));
  BumpAllocator allocator(shared + kScratch);
  T* tiles = allocator.take<T>(kUpdateTilesInFlight * columns * stride);
  T* za = allocator.take<T>(kPairs * stride);  // [2 kVectors][stride]
  constexpr int kRow = update_row(sizeof(T));
  T* sums = allocator.take<T>(kPairs * Cta::kThreads + kRow * columns);
  T* wy = sums + kPairs * Cta::kThreads;  // [columns][kRow], of which 2 kVectors are used
  // With several passes, the sums so far. With one, gb and b of the tiles in flight, which arrive
  // with their tile, and the coefficients.
  const bool one_pass = k <= kVectors;
  T* results = allocator.take<T>(one_pass ? 0 : columns * stride);
  T* sides = allocator.take<T>(one_pass && problem.gb ? kUpdateTilesInFlight * kPairs * columns : 0);  // [tiles][2 kVectors][columns]
  T* factors = allocator.take<T>(one_pass ? kUpdateFactors : 0);  // w_factor, gb_factor and b_factor [k], [k] and [k, k]

  const T *a = static_cast<const T*>(problem.a) + b * k * p, *z = static_cast<const T*>(problem.z) + b * k * p;
  const T* gb = problem.gb ? static_cast<const T*>(problem.gb) + b * k * q : nullptr;
  const T* b_vectors = gb ? static_cast<const T*>(problem.b) + b * k * q : nullptr;
  const Coefficients from(problem.coefficients + b * coefficients_size(k), k);
  const double factor = *from.factor;
  // Between 2^-60 and 2^60.
  const bool in_range = factor > 8.673617379884035e-19 && factor < 1.152921504606847e18;
  const MatrixSource<T> m{problem.x, b * problem.x.stride_batch, p, q, T(1), nullptr, 0, nullptr};
  const T m_scale = static_cast<T>(*from.scale);
  const View& out = problem.gradient;
  const bool p_contiguous = p > 1 && out.stride_p <= out.stride_q;
  auto clamped = [](T value) {
    return value > Limits<T>::largest ? Limits<T>::largest : value < -Limits<T>::largest ? -Limits<T>::largest : value;
  };
  const T simple_factor = static_cast<T>(in_range ? factor : 0);
  auto times_any_factor = [&](T value) {
    if (factor == 0) return T(0);
    if (in_range) return clamped(value * simple_factor);
    return clamped(static_cast<T>(larger(-static_cast<double>(Limits<T>::largest), static_cast<double>(value) * factor)));
  };
  auto load_vectors = [&](int j0) {
    cta.each(kPairs * stride, [&](int task) {
      const int row = task / stride, i = task % stride, j = j0 + row % kVectors;
      za[task] = j < k && i < p ? (row < kVectors ? z : a)[int64_t(j) * p + i] : T(0);
    });
  };
  const int parts = Cta::kThreads / columns;  // threads that share a column
  if (one_pass) {
    load_vectors(0);
    cta.each(gb ? 2 * k + k * k : k, [&](int i) { factors[i] = static_cast<T>(from.w_factor[i]); });
  }
  auto sides_of = [&](int first) { return sides + (first - begin) / columns % kUpdateTilesInFlight * kPairs * columns; };
  auto load = [&](int first, T* tile) {
    load_wide_tile(cta, m, columns, stride, first, tile);
    if (!gb || !one_pass) return;
    T* to = sides_of(first);
    cta.start([&](int t) {
      const int c = t % columns, column = first + c;
      for (int row = t / columns; row < 2 * k; row += parts) {
        const T* line = row < k ? gb + int64_t(row) * q : b_vectors + int64_t(row - k) * q;
        cta.copy_async(to + row * columns + c, line + (column < q ? column : 0), column < q);
      }
    });
  };
  stream_tiles<kUpdateTilesInFlight>(cta, m, columns, stride, begin, end, tiles, load, [&](const T* tile, int first, int count) {
    const T* side = sides_of(first);
    for (int j0 = 0; j0 < k; j0 += kVectors) {
      if (!one_pass) load_vectors(j0);
      // w_j = <a_j, m> and <z_j, m> for each column m, which is read once for several vectors.
      cta.threads([&](int t) {
        const int c = t % columns, part = t / columns;
        T w[kVectors], y[kVectors];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) w[j] = y[j] = T(0);
        for (int i = 4 * part; i < stride; i += 4 * parts) {
          Four<T> x = load_four(tile + c * stride + i);
#pragma unroll
          for (int l = 0; l < 4; ++l) x.x[l] *= m_scale;
#pragma unroll
          for (int j = 0; j < kVectors; ++j) {
            const Four<T> z_j = load_four(za + j * stride + i), a_j = load_four(za + (kVectors + j) * stride + i);
#pragma unroll
            for (int l = 0; l < 4; ++l) w[j] += x.x[l] * a_j.x[l], y[j] += x.x[l] * z_j.x[l];
          }
        }
#pragma unroll
        for (int j = 0; j < kVectors; ++j) sums[j * Cta::kThreads + t] = w[j], sums[(kVectors + j) * Cta::kThreads + t] = y[j];
      });
      cta.each(columns * kVectors, [&](int task) {
        const int c = task / kVectors, offset = task % kVectors, j = j0 + offset;
        T w = T(0), y = T(0);
        for (int part = 0; part < parts; ++part) {
          w += sums[offset * Cta::kThreads + part * columns + c];
          y += sums[(kVectors + offset) * Cta::kThreads + part * columns + c];
        }
        if (j < k && one_pass) {
          y += factors[j] * w;
          if (gb) {
            y += factors[k + j] * side[j * columns + c];
            for (int i = 0; i < k; ++i) y += factors[2 * k + j * k + i] * side[(k + i) * columns + c];
          }
        } else if (j < k) {
          y += static_cast<T>(from.w_factor[j]) * w;
          if (gb && c < count) {
            y += static_cast<T>(from.gb_factor[j]) * gb[int64_t(j) * q + first + c];
            for (int i = 0; i < k; ++i) y += static_cast<T>(from.b_factor[j * k + i]) * b_vectors[int64_t(i) * q + first + c];
          }
        }
        wy[c * kRow + offset] = w, wy[c * kRow + kVectors + offset] = y;
      });
      cta.threads([&](int t) {
        const int warp = t / 32, lane = t % 32, warps = Cta::kThreads / 32;
        const int64_t origin = b * out.stride_batch + first * out.stride_q;
        // Calls write(i, c, value, index) for the sums of this pass.
        auto for_each_sum = [&](auto write) {
          if (p_contiguous) {
            // Warps process columns in turn. A thread keeps its row of z and a in registers.
            for (int i = lane; i < p; i += 32) {
              T za_row[kPairs];
#pragma unroll
              for (int j = 0; j < kPairs; ++j) za_row[j] = za[j * stride + i];
              int64_t index = origin + i * out.stride_p + warp * out.stride_q;
              for (int c = warp; c < count; c += warps, index += warps * out.stride_q) {
                T value = T(0);
#pragma unroll
                for (int j = 0; j < kPairs; j += 4) {
                  const Four<T> wy_j = load_four(wy + c * kRow + j);
#pragma unroll
                  for (int l = 0; l < 4; ++l) value += za_row[j + l] * wy_j.x[l];
                }
                write(i, c, value, index);
              }
            }
          } else {
            // The threads of a warp process neighbouring columns, up to 32, which are adjacent in
            // memory, and four rows at once, whose z and a they all read.
            const int across = smaller(columns, 32), down = 32 / across, groups = columns / across;
            const int c = warp % groups * across + lane % across, row_step = 4 * (warps / groups * down);
            if (c >= count) return;
            for (int i = 4 * (warp / groups * down + lane / across); i < p; i += row_step) {
              T values[4] = {};
#pragma unroll
              for (int j = 0; j < kPairs; j += 4) {
                const Four<T> wy_j = load_four(wy + c * kRow + j);
#pragma unroll
                for (int l = 0; l < 4; ++l) {
                  const Four<T> za_j = load_four(za + (j + l) * stride + i);
#pragma unroll
                  for (int r = 0; r < 4; ++r) values[r] += za_j.x[r] * wy_j.x[l];
                }
              }
              int64_t index = origin + i * out.stride_p + c * out.stride_q;
#pragma unroll
              for (int r = 0; r < 4; ++r, index += out.stride_p)
                if (i + r < p) write(i + r, c, values[r], index);
            }
          }
        };
        with_storage<T>(out.data, out.storage, [&](auto* to) {
          if (one_pass && in_range)
            for_each_sum([&](int, int, T value, int64_t index) { round_to(clamped(value * simple_factor), to[index]); });
          else
            for_each_sum([&](int i, int c, T value, int64_t index) {
              T& so_far = results[p_contiguous ? c * stride + i : i * columns + c];
              if (j0 > 0) value += so_far;
              if (j0 + kVectors >= k)
                round_to(times_any_factor(value), to[index]);
              else
                so_far = value;
            });
        });
      });
    }
  });
}

}  // namespace kdkernels::truncated_svd::gpu
