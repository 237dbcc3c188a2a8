// The derivative, as csrc/truncated_svd/derivative.h states it, in two kernels: `solve` makes z_j and what y_j consists of, a block of
// threads a matrix; `update` reads M once and writes dM = sum_j z_j (M^T a_j)^T + a_j y_j^T, columns shared out over blocks.
//
// The solve takes the forward's tridiagonal form of G, or, where that is not there or lost digits, one of P G P, P removing the kept
// vectors: that is G where the solve sees it, and knows nothing of the large values.
#pragma once

#include "forward.h"

namespace kdkernels::truncated_svd::gpu {

// What a matrix's coefficients mean, see coefficients_size.
struct Coefficients {
  double *of_w, *of_gb, *of_b, *factor, *scale;
  KDKERNELS_GPU Coefficients(double* from, int k) : of_w(from), of_gb(of_w + k), of_b(of_gb + k), factor(of_b + k * k), scale(factor + 1) {}
};

template <typename Cta, typename T>
class Solve {
 public:
  KDKERNELS_GPU Solve(Cta& cta, const BackwardProblem& problem, int64_t b, const Room<T>& room)
      : cta_(cta),
        problem_(problem),
        room_(room),
        b_(b),
        p_(problem.p),
        q_(problem.q),
        k_(problem.k),
        stride_(tile_stride(problem.p)),
        a_(room.vectors),
        z_(a_ + int64_t(problem.k) * stride_),
        mg_(z_ + int64_t(problem.k) * stride_) {}

  KDKERNELS_GPU void run() {
    const T* s = static_cast<const T*>(problem_.s) + b_ * k_;
    const Coefficients to(problem_.coefficients + b_ * coefficients_size(k_), k_);
    T* z = static_cast<T*>(problem_.z) + b_ * k_ * p_;
    const double first = static_cast<double>(s[0]);
    if (!(first >
          0)) {  // a matrix of zeros: so is its derivative; or one that holds no numbers, and gives none but to a loss that left it out
      const double value = first == 0 || unused() ? 0.0 : Limits<double>::nan;
      cta_.each(k_ * p_, [&](int i) { z[i] = static_cast<T>(value); });
      cta_.each(static_cast<int>(coefficients_size(k_)) - 1, [&](int i) { to.of_w[i] = value; });
      cta_.each(1, [&](int) { *to.scale = 1; });
      return;
    }
    // The state says what s rounds: below the normal numbers to a few digits, and past the largest to an infinity.
    const State<T> state(static_cast<T*>(const_cast<void*>(problem_.state)) + (problem_.state ? b_ * state_size(p_, k_) : 0), p_, k_);
    auto kept_lambda = [&](int j) { return static_cast<double>(state.lambda_high[j]) + static_cast<double>(state.lambda_low[j]); };
    const bool fresh = !problem_.state || !(kept_lambda(k_ - 1) >= kIllConditioned * kIllConditioned * kept_lambda(0));
    constexpr double most = static_cast<double>(Limits<T>::largest);
    const double scale = fresh ? unit_for<T>(first < most ? first : most) : static_cast<double>(*state.scale);
    const T* a = static_cast<const T*>(problem_.a) + b_ * k_ * p_;
    cta_.warps(k_, [&](const Warp& warp, int j) {
      warp.each(stride_, [&](int i) { a_[j * stride_ + i] = i < p_ ? a[int64_t(j) * p_ + i] : T(0); });
    });
    double *inverse = room_.sigma, *lambda = room_.lambda;
    auto sigma = [&](int j) {
      const double own = static_cast<double>(s[j]);
      return fresh ? (own < most ? own : most) * scale : square_root(kept_lambda(j));
    };
    cta_.each(k_, [&](int j) {
      const double own = sigma(j);
      inverse[j] = own > kNull<T> * sigma(0) ? 1 / own : 0;
      lambda[j] = fresh ? own * own : kept_lambda(j);
    });
    Source<T> m{problem_.x, b_ * problem_.x.stride_batch, p_, q_, T(1), a_, 0, room_.along};
    const double unit = unit_of_cotangents(scale);
    right_sides(m, static_cast<T>(scale), unit);
    const T *ga = cotangents(problem_.ga, p_), *gb = cotangents(problem_.gb, q_), *b = cotangents(problem_.b, q_);
    double *of_a = room_.products, *of_b = of_a + k_ * k_, *inside = of_b + k_ * k_;
    differences(a_, stride_, ga, p_, unit, inside, of_a);
    differences(b, q_, gb, q_, unit, inside, of_b);

    if (fresh) {
      m.scale = static_cast<T>(scale);
      m.count = k_;
      gram(cta_, m, room_.tiles, room_.matrix);
      tridiagonalize(cta_, p_, room_.matrix, room_);
    } else {
      cta_.each(p_, [&](int i) { room_.tau[i] = state.tau[i], room_.d[i] = state.d[i], room_.e[i] = state.e[i]; });
    }
    const T *matrix = room_.matrix, *packed = state.reflectors;
    const int ld = matrix_stride(p_);
    auto reflector = [=](int i) { return fresh ? matrix + int64_t(i) * ld : packed + int64_t(i) * (i + 1) / 2; };
    apply_q(cta_, p_, reflector, room_.tau, true, k_, z_, stride_);
    const double gap_eps = problem_.gap_eps, largest = square_root(cta_.read(lambda[0]));
    for (int begin = 0; begin < k_; begin += kTogether) {
      const int together = fewer(k_ - begin, kTogether);
      cta_.each(together, [&](int own) {
        const double value = lambda[begin + own], eps = gap_noise(largest, square_root(larger(value, 0.0)), gap_eps);
        resolvent(p_, room_.d, room_.e, value, eps, z_ + (begin + own) * stride_, room_.x, together, own);
      });
    }
    apply_q(cta_, p_, reflector, room_.tau, false, k_, z_, stride_);
    remove_kept();
    cta_.warps(k_, [&](const Warp& warp, int j) {
      for (int i = 0; i < k_; ++i) {
        const T factor = static_cast<T>(0.5 * of_a[i * k_ + j] * damped_inverse_gap(lambda[0], lambda[j], lambda[i], gap_eps));
        warp.each(p_, [&](int c) { z_[j * stride_ + c] += factor * a_[i * stride_ + c]; });
      }
      warp.each(p_, [&](int c) { z[int64_t(j) * p_ + c] = z_[j * stride_ + c]; });
    });
    const T* gs = static_cast<const T*>(problem_.gs);
    cta_.each(k_, [&](int j) {
      to.of_w[j] = gs ? static_cast<double>(gs[b_ * k_ + j]) * (unit / scale) * inverse[j] : 0.0;
      to.of_gb[j] = gb ? unit * inverse[j] : 0.0;
      for (int i = 0; i < k_; ++i)
        to.of_b[j * k_ + i] = gb ? sigma(j) * of_b[j * k_ + i] * damped_inverse_gap(lambda[0], lambda[i], lambda[j], gap_eps) -
                                       inside[i * k_ + j] * inverse[j]
                                 : 0.0;
    });
    cta_.each(1, [&](int) { *to.factor = scale / unit, *to.scale = scale; });
  }

 private:
  // Whether all cotangents are 0. Every thread looks for itself: this is rare.
  KDKERNELS_GPU bool unused() const {
    const void* from[] = {problem_.ga, problem_.gb, problem_.gs};
    const int lengths[] = {p_, q_, 1};
    for (int which = 0; which < 3; ++which) {
      const T* g = cotangents(from[which], lengths[which]);
      for (int64_t i = 0; g && i < k_ * int64_t(lengths[which]); ++i)
        if (!(g[i] == T(0))) return false;
    }
    return true;
  }

  KDKERNELS_GPU const T* cotangents(const void* from, int n) const {
    return from ? static_cast<const T*>(from) + b_ * k_ * int64_t(n) : nullptr;
  }

  // A power of two that brings the largest cotangent near 1, or as near as leaves scale / unit a number.
  KDKERNELS_STAGE double unit_of_cotangents(double scale) {
    double largest = 0;
    auto see = [&](const void* from, int n, double factor) {
      const T* g = cotangents(from, n);
      if (!g) return;
      const T most = cta_.template max<T>(T(0), k_ * n, [&](int i) { return absolute(g[i]); });
      largest = larger(largest, static_cast<double>(most) * factor);
    };
    see(problem_.ga, p_, 1);
    see(problem_.gb, q_, 1);
    see(problem_.gs, 1, 1 / scale);
    if (!(largest > 0)) return 1;
    const double unit = is_finite(largest) ? unit_for<T>(largest) : power_of_two(2 - Limits<T>::max_exponent);
    return larger(unit, scale * power_of_two(2 - Limits<double>::max_exponent));
  }

  // r_j = P (ga_j + M gb_j / sigma_j), in units, to z.
  KDKERNELS_STAGE void right_sides(const Source<T>& m, T scale, double unit) {
    const T *ga = cotangents(problem_.ga, p_), *gb = cotangents(problem_.gb, q_);
    const int k = k_, p = p_, stride = stride_, q = q_;
    T *mg = mg_, *z = z_;
    cta_.each(k * stride, [&](int i) { mg[i] = T(0); });
    if (gb)
      stream(cta_, m, 0, q, room_.tiles, [&](const T* tile, int first, int count) {
        KDKERNELS_SHARED(tile);
        cta_.start([&](int t) {
          for (int task = t; task < k * p; task += Cta::kThreads) {
            const int j = task / p, i = task % p;
            T sum = T(0);
            for (int c = 0; c < count; ++c) sum += scale * tile[c * stride + i] * (static_cast<T>(unit) * gb[int64_t(j) * q + first + c]);
            mg[j * stride + i] += sum;
          }
        });
      });
    const double* inverse = room_.sigma;
    cta_.warps(k, [&](const Warp& warp, int j) {
      warp.each(stride, [&](int i) {
        const T own = ga && i < p ? static_cast<T>(unit) * ga[int64_t(j) * p + i] : T(0);
        z[j * stride + i] = own + mg[j * stride + i] * static_cast<T>(inverse[j]);
      });
    });
    remove_kept();
  }

  // z_j minus its parts along the kept vectors
  KDKERNELS_STAGE void remove_kept() {
    cta_.warps(k_, [&](const Warp& warp, int j) {
      T* own = z_ + j * stride_;
      for (int i = 0; i < k_; ++i) {
        const T* kept = a_ + i * stride_;
        const T along = warp.sum<T>(p_, [&](int c) { return own[c] * kept[c]; });
        warp.each(p_, [&](int c) { own[c] -= along * kept[c]; });
      }
    });
  }

  // products [k, k] = <x_i, g_j> and result = <x_i, g_j> - <x_j, g_i>. That of a function of the span is 0 but for rounding, which a small
  // gap would blow up: as much is taken off.
  KDKERNELS_STAGE void differences(const T* x, int x_stride, const T* g, int n, double unit, double* products, double* result) {
    const int k = k_;
    double* squares = room_.squares;
    cta_.each(k * k, [&](int i) { products[i] = 0, result[i] = 0; });
    if (!g) return;
    auto upstream = [=](int j, int c) { return static_cast<double>(g[int64_t(j) * n + c]) * unit; };
    cta_.warps(k * k, [&](const Warp& warp, int task) {
      const int i = task / k, j = task % k;
      const T* own = x + int64_t(i) * x_stride;
      const double product = warp.sum<double>(n, [&](int c) { return static_cast<double>(own[c]) * upstream(j, c); });
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
  const Room<T>& room_;
  const int64_t b_;
  const int p_, q_, k_, stride_;
  T *a_, *z_, *mg_;
};

template <typename T, typename Cta>
KDKERNELS_GPU void solve(Cta& cta, const BackwardProblem& problem, int64_t b, char* shared, int64_t limit) {
  const Plan plan = backward_plan<T>(problem.p, problem.k, limit);
  const Room<T> room(plan, problem.p, problem.k, true, shared, static_cast<char*>(problem.workspace) + b * plan.workspace());
  Solve<Cta, T>(cta, problem, b, room).run();
}

template <typename T, typename Cta>
KDKERNELS_GPU void update(Cta& cta, const BackwardProblem& problem, int64_t b, int block, char* shared) {
  constexpr int kVectors = kUpdateVectors, kPairs = 2 * kVectors;  // z and a of some vectors; w and y
  const int p = problem.p, q = problem.q, k = problem.k, columns = tile_columns(p), stride = tile_stride(p);
  const int begin = block * update_columns(p), end = fewer(q, begin + update_columns(p));
  Pieces pieces(shared + kScratch);
  T* tiles = pieces.take<T>(kStages * columns * stride);
  T* za = pieces.take<T>(kPairs * stride);  // [2 kVectors][stride]
  T* sums = pieces.take<T>(kPairs * (Cta::kThreads + columns));
  T* wy = sums + kPairs * Cta::kThreads;  // [columns][2 kVectors]
  T* results = pieces.take<T>(k > kVectors ? columns * stride : 0);

  const T *a = static_cast<const T*>(problem.a) + b * k * p, *z = static_cast<const T*>(problem.z) + b * k * p;
  const T* gb = problem.gb ? static_cast<const T*>(problem.gb) + b * k * q : nullptr;
  const T* vectors = gb ? static_cast<const T*>(problem.b) + b * k * q : nullptr;
  const Coefficients from(problem.coefficients + b * coefficients_size(k), k);
  const double factor = *from.factor;
  const bool moderate = factor > 8.673617379884035e-19 && factor < 1.152921504606847e18;  // 2^-60, 2^60
  const Source<T> m{problem.x, b * problem.x.stride_batch, p, q, T(1), nullptr, 0, nullptr};
  const T m_scale = static_cast<T>(*from.scale);
  const View& out = problem.gradient;
  auto put = [&](int i, int c, T value) {
    if (factor == 0)
      value = T(0);
    else if (moderate)
      value *= static_cast<T>(factor);
    else
      value = static_cast<T>(larger(-static_cast<double>(Limits<T>::largest), static_cast<double>(value) * factor));
    value = value > Limits<T>::largest ? Limits<T>::largest : value < -Limits<T>::largest ? -Limits<T>::largest : value;
    store(value, out.data, out.storage, b * out.stride_batch + i * out.stride_p + c * out.stride_q);
  };
  auto load_vectors = [&](int j0) {
    cta.each(kPairs * stride, [&](int task) {
      const int row = task / stride, i = task % stride, j = j0 + row % kVectors;
      za[task] = j < k && i < p ? (row < kVectors ? z : a)[int64_t(j) * p + i] : T(0);
    });
  };
  if (k <= kVectors) load_vectors(0);
  const int parts = Cta::kThreads / columns;  // threads that share a column
  stream(cta, m, begin, end, tiles, [&](const T* tile, int first, int count) {
    for (int j0 = 0; j0 < k; j0 += kVectors) {
      if (k > kVectors) load_vectors(j0);
      // w_j = <a_j, m> and <z_j, m> of each column m, every vector at a time from what is read of m once.
      cta.threads([&](int t) {
        const int c = t % columns, part = t / columns;
        T w[kVectors], y[kVectors];
#pragma unroll
        for (int j = 0; j < kVectors; ++j) w[j] = y[j] = T(0);
        for (int i = 4 * part; i < stride; i += 4 * parts) {
          Four<T> x = four(tile + c * stride + i);
#pragma unroll
          for (int l = 0; l < 4; ++l) x.x[l] *= m_scale;
#pragma unroll
          for (int j = 0; j < kVectors; ++j) {
            const Four<T> of_z = four(za + j * stride + i), of_a = four(za + (kVectors + j) * stride + i);
#pragma unroll
            for (int l = 0; l < 4; ++l) w[j] += x.x[l] * of_a.x[l], y[j] += x.x[l] * of_z.x[l];
          }
        }
#pragma unroll
        for (int j = 0; j < kVectors; ++j) sums[j * Cta::kThreads + t] = w[j], sums[(kVectors + j) * Cta::kThreads + t] = y[j];
      });
      cta.each(columns * kVectors, [&](int task) {
        const int c = task / kVectors, own = task % kVectors, j = j0 + own;
        T w = T(0), y = T(0);
        for (int part = 0; part < parts; ++part) {
          w += sums[own * Cta::kThreads + part * columns + c];
          y += sums[(kVectors + own) * Cta::kThreads + part * columns + c];
        }
        if (j < k) {
          y += static_cast<T>(from.of_w[j]) * w;
          if (gb && c < count) {
            y += static_cast<T>(from.of_gb[j]) * gb[int64_t(j) * q + first + c];
            for (int i = 0; i < k; ++i) y += static_cast<T>(from.of_b[j * k + i]) * vectors[int64_t(i) * q + first + c];
          }
        }
        wy[c * kPairs + own] = w, wy[c * kPairs + kVectors + own] = y;
      });
      // A thread keeps its row of z and a in registers.
      cta.threads([&](int t) {
        const int warp = t / 32, lane = t % 32, warps = Cta::kThreads / 32;
        const bool along_p = out.stride_p <= out.stride_q;
        const int across = along_p ? 1 : columns < 8 ? columns : 8, down = 32 / across;
        // Along p: warps take columns in turn. Along q: 8 columns of 4 rows at a time, rows in turn.
        const int row_step = along_p ? 32 : warps * down, column_step = along_p ? warps : across;
        const int row_first = along_p ? lane : warp * down + lane / across, column_first = along_p ? warp : lane % across;
        for (int i = row_first; i < p; i += row_step) {
          T mine[kPairs];
#pragma unroll
          for (int j = 0; j < kPairs; ++j) mine[j] = za[j * stride + i];
          for (int c = column_first; c < count; c += column_step) {
            T value = T(0);
#pragma unroll
            for (int j = 0; j < kPairs; j += 4) {
              const Four<T> pair = four(wy + c * kPairs + j);
#pragma unroll
              for (int l = 0; l < 4; ++l) value += mine[j + l] * pair.x[l];
            }
            if (k <= kVectors) {
              put(i, first + c, value);
              continue;
            }
            if (j0 > 0) value += results[c * stride + i];
            results[c * stride + i] = value;
            if (j0 + kVectors >= k) put(i, first + c, value);
          }
        }
      });
    }
  });
}

}  // namespace kdkernels::truncated_svd::gpu
