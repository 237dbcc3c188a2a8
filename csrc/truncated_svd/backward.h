// The backward pass: runs the stages of the derivative over a batch.
#pragma once

#include "../common/memory.h"
#include "decomposition.h"
#include "derivative.h"

namespace kdkernels::truncated_svd {

struct UpstreamGradients {
  // [B, k, M], [B, k] (contiguous) and [B, k, N] in the dtype of the computation; each may be
  // undefined.
  Tensor u, s, v;
};

template <typename T>
class Backward {
 public:
  Backward(const UpstreamGradients& grads, const Tensor& x, const Triplets& t, double gap_eps, Tier tier)
      : tier_(tier),
        m_(x),
        gap_eps_(gap_eps),
        k_(t.s.size(-1)),
        direct_(m_, k_),
        a_(m_.tall ? t.v : t.u),
        b_(m_.tall ? t.u : t.v),
        s_(t.s),
        state_(tier == Tier::krylov || t.state.numel() > 0 || k_ == m_.p
                   ? t.state
                   : Decomposition<T>(x, k_, false, false, true, true, Tier::direct).state()),
        ga_(m_.tall ? grads.v : grads.u),
        gs_(grads.s),
        gb_(m_.tall ? grads.u : grads.v) {}

  // Returns the gradient, with the layout of x, rounded to its dtype. `unsolved` receives the
  // matrices whose gradient has not been written.
  Tensor run(std::vector<int64_t>* unsolved = nullptr) {
    const Tensor gradient = recycled_empty_like(m_.tensor()),
                 target = has_layout_of_blocks(gradient) ? gradient : empty_with_layout_of_blocks();
    if (tier_ == Tier::krylov)
      *unsolved = run_krylov(Target(*this, target));
    else if (k_ == m_.p)
      run_complete(Target(*this, target));
    else
      run_direct(Target(*this, target));
    if (!target.is_same(gradient)) gradient.copy_(target);
    return gradient;
  }

 private:
  // The tensor to which gradients are written.
  struct Target {
    Target(const Backward& backward, const Tensor& t) : tensor(t), to(t), row_stride(backward.m_.p_contiguous ? to.stride_q : to.stride_p) {
      const bool aligned = row_stride * sizeof(T) % simd::kBytes == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % simd::kBytes == 0 &&
                           backward.m_.row_length(backward.m_.q) % kLanes<T> == 0;
      stream = aligned && bypasses_caches(t.nbytes());
    }
    Tensor tensor;
    Matrices to;
    int64_t row_stride;
    bool stream;
  };

  std::vector<int64_t> run_krylov(const Target& target) const {
    std::vector<uint8_t> solved(m_.batch);
    const int64_t stride = direct_.vector_stride();
    auto make_state = [&] {
      return std::tuple(ThreadState(m_, k_, stride), ConjugateGradients<T>(m_, k_, stride), MatrixBuffers(1, k_, stride));
    };
    parallel_for(0, m_.batch, 1, make_state, [&](auto& state, int64_t begin, int64_t end) {
      auto& [thread, solver, buffers] = state;
      for (int64_t b = begin; b < end; ++b) {
        const auto in = inputs(b, thread);
        for (int64_t j = 0; j < k_; ++j) thread.lambda[j] = static_cast<double>(in.sigma[j]) * in.sigma[j];
        if (!(thread.lambda[0] > kLowestTrace<float> && thread.lambda[0] < kHighestTrace<float>)) continue;
        thread.derivative.compute_right_sides(in, thread.reader, b, 1, buffers.vectors.get(), buffers.saved.data());
        solved[b] = solver.solve(b, in.a, thread.lambda.data(), thread.derivative.right_side_squares(), buffers.vectors.get());
        if (solved[b]) finish(target, thread, b, 1, buffers.saved.data(), buffers.vectors.get());
      }
      if (target.stream) simd::fence();
    });
    std::vector<int64_t> unsolved;
    for (int64_t b = 0; b < m_.batch; ++b)
      if (!solved[b]) unsolved.push_back(b);
    return unsolved;
  }

  // All triplets are kept: the projected solve has the result 0, and needs no state.
  void run_complete(const Target& target) const {
    const int64_t stride = direct_.vector_stride();
    auto make_state = [&] { return std::pair(ThreadState(m_, k_, stride), MatrixBuffers(1, k_, stride)); };
    parallel_for(0, m_.batch, 1, make_state, [&](auto& state, int64_t begin, int64_t end) {
      auto& [thread, buffers] = state;
      for (int64_t b = begin; b < end; ++b) {
        const auto in = inputs(b, thread);
        const double largest = in.sigma[0], scale = largest > 0 && std::isfinite(largest) ? std::ldexp(1.0, -std::ilogb(largest)) : 1;
        for (int64_t j = 0; j < k_; ++j) thread.lambda[j] = (in.sigma[j] * scale) * (in.sigma[j] * scale);
        thread.derivative.compute_right_sides(in, thread.reader, b, scale, nullptr, buffers.saved.data());
        std::fill(buffers.vectors.get(), buffers.vectors.get() + k_ * stride, T(0));
        finish(target, thread, b, scale, buffers.saved.data(), buffers.vectors.get());
      }
      if (target.stream) simd::fence();
    });
  }

  void run_direct(const Target& target) const {
    const int64_t stride = direct_.vector_stride(), saved_size = Derivative<T>::saved_size(k_);
    for_each_group(
        m_.batch, Direct<T>::kGroup, Direct<T>::kGroup * saved_size * static_cast<int64_t>(sizeof(double)), gb_.defined(),
        [&](int64_t groups) { return MatrixBuffers(groups * Direct<T>::kGroup, k_, stride); }, [&] { return ThreadState(m_, k_, stride); },
        [&](MatrixBuffers& buffers, ThreadState& thread, int64_t b, int64_t slot) {
          thread.derivative.compute_right_sides(inputs(b, thread), thread.reader, b, state_of(b).scale[0][lane(b)],
                                                buffers.vectors.get() + slot * k_ * stride, buffers.saved.data() + slot * saved_size);
        },
        [&](MatrixBuffers& buffers, ThreadState& thread, int64_t g, int64_t group, int64_t count) {
          T* r = buffers.vectors.get() + group * Direct<T>::kGroup * k_ * stride;
          std::fill(r + count * k_ * stride, r + Direct<T>::kGroup * k_ * stride, T(0));
          direct_.eigen.solve(state_of(g * Direct<T>::kGroup), gap_eps_, r, thread.work);
        },
        [&](MatrixBuffers& buffers, ThreadState& thread, int64_t b, int64_t slot) {
          const GroupState<T> state = state_of(b);
          for (int64_t j = 0; j < k_; ++j)
            thread.lambda[j] = static_cast<double>(state.lambda_high[j][lane(b)]) + static_cast<double>(state.lambda_low[j][lane(b)]);
          finish(target, thread, b, state.scale[0][lane(b)], buffers.saved.data() + slot * saved_size,
                 buffers.vectors.get() + slot * k_ * stride);
          if (target.stream) simd::fence();
        });
  }

  struct MatrixBuffers {
    MatrixBuffers(int64_t samples, int64_t k, int64_t stride)
        : vectors(samples * k * stride), saved(samples * Derivative<T>::saved_size(k)) {}
    Buffer<T> vectors;
    std::vector<double> saved;
  };
  struct ThreadState {
    ThreadState(const Matrices& m, int64_t k, int64_t stride)
        : reader(m, product_columns<T>(m)), work(m.p, k), derivative(m, k, stride, reader.columns()), a(k * stride), lambda(k) {}
    Reader<T> reader;
    typename Eigen<T>::Workspace work;
    Derivative<T> derivative;
    Buffer<T> a, ga, gb;
    std::vector<double> lambda;
  };

  void finish(const Target& target, ThreadState& thread, int64_t b, double scale, const double* saved, T* z) const {
    with_storage<T>(target.tensor.scalar_type(), [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      thread.derivative.write_gradient(inputs(b, thread), thread.lambda.data(), gap_eps_, thread.reader, b, scale, saved, z,
                                       target.tensor.template mutable_data_ptr<Storage>() + target.to.offset(b), target.row_stride,
                                       target.stream);
    });
  }

  static int lane(int64_t b) { return static_cast<int>(b % Direct<T>::kGroup); }
  GroupState<T> state_of(int64_t b) const {
    // The memory is only read.
    auto* memory = reinterpret_cast<Vec<T>*>(const_cast<T*>(state_.template const_data_ptr<T>()));
    return {memory + b / Direct<T>::kGroup * GroupState<T>::size(m_.p, k_), m_.p, k_};
  }

  // Whether the rows of the gradient are contiguous like the rows of the blocks of M.
  bool has_layout_of_blocks(const Tensor& gradient) const {
    const Matrices g(gradient);
    return (m_.p_contiguous ? g.stride_p : g.stride_q) == 1;
  }
  Tensor empty_with_layout_of_blocks() const {
    auto sizes = m_.tensor().sizes().vec();
    sizes.resize(sizes.size() - 2);
    sizes.insert(sizes.end(), {m_.p_contiguous ? m_.q : m_.p, m_.p_contiguous ? m_.p : m_.q});
    const Tensor result = at::empty(sizes, m_.tensor().options().memory_format(at::MemoryFormat::Contiguous));
    return m_.p_contiguous == m_.tall ? result : result.transpose(-1, -2);
  }

  typename Derivative<T>::Inputs inputs(int64_t b, ThreadState& thread) const {
    const int64_t stride = direct_.vector_stride();
    const T* a = a_.template const_data_ptr<T>() + b * k_ * m_.p;
    for (int64_t j = 0; j < k_; ++j) {
      std::copy_n(a + j * m_.p, m_.p, thread.a.get() + j * stride);
      std::fill(thread.a.get() + j * stride + m_.p, thread.a.get() + (j + 1) * stride, T(0));
    }
    const T* vectors = gb_.defined() ? b_.template const_data_ptr<T>() + b * k_ * m_.q : nullptr;
    const T* sigma = s_.template const_data_ptr<T>() + b * k_;
    return {thread.a.get(),
            vectors,
            sigma,
            contiguous_rows(ga_, b, thread.ga),
            gs_.defined() ? gs_.template const_data_ptr<T>() + b * k_ : nullptr,
            contiguous_rows(gb_, b, thread.gb)};
  }

  // Copies the columns of `from` [n, Columns] to rows. The compiler transposes them in registers.
  template <int Columns>
  static void separate(const T* from, int64_t n, T* to) {
    for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Columns; ++j) to[j * n + i] = from[i * Columns + j];
  }

  // The upstream gradients of matrix b, as contiguous rows. They may have any strides, and are
  // copied to `rows` if necessary.
  static const T* contiguous_rows(const Tensor& t, int64_t b, Buffer<T>& rows) {
    if (!t.defined()) return nullptr;
    const int64_t k = t.size(1), n = t.size(2), row_stride = t.stride(1), column_stride = t.stride(2);
    const T* from = t.template const_data_ptr<T>() + b * t.stride(0);
    if (column_stride == 1 && row_stride == n) return from;
    if (!rows.get()) rows = Buffer<T>(k * n);
    T* to = rows.get();
    const bool alternate = row_stride == 1 && column_stride == k;  // as in a contiguous gradient of v
    if (alternate && k == 2)
      separate<2>(from, n, to);
    else if (alternate && k == 4)
      separate<4>(from, n, to);
    else
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j) to[j * n + i] = from[j * row_stride + i * column_stride];
    return rows.get();
  }

  Tier tier_;
  const Matrices m_;
  double gap_eps_;
  int64_t k_;
  Direct<T> direct_;
  Tensor a_, b_, s_, state_, ga_, gs_, gb_;
};

}  // namespace kdkernels::truncated_svd
