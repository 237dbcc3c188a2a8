// The backward: the stages of the derivative over a batch.
#pragma once

#include "../common/memory.h"
#include "derivative.h"
#include "rounds.h"

namespace kdkernels::truncated_svd {

struct Cotangents {
  Tensor u, s, v;  // [B, k, M], [B, k], [B, k, N] in the compute type, s contiguous; or undefined
};

template <typename T>
class Backward {
 public:
  Backward(const Cotangents& grads, const Tensor& x, const Triplets& t, double gap_eps, Tier tier)
      : tier_(tier),
        m_(x),
        gap_eps_(gap_eps),
        k_(t.s.size(-1)),
        direct_(m_, k_),
        a_(m_.tall ? t.v : t.u),
        b_(m_.tall ? t.u : t.v),
        s_(t.s),
        state_(tier == Tier::krylov || t.state.numel() > 0 ? t.state
                                                           : Decomposition<T>(x, k_, false, false, true, false, Tier::direct).state()),
        ga_(m_.tall ? grads.v : grads.u),
        gs_(grads.s),
        gb_(m_.tall ? grads.u : grads.v) {}

  // The gradient, in the layout of x and, rounded, in its type. unsolved: matrices whose gradient is still to be written.
  Tensor run(std::vector<int64_t>* unsolved = nullptr) {
    const Tensor gradient = recycled_empty_like(m_.tensor()), written = writable(gradient) ? gradient : rows_as_in_blocks();
    if (tier_ == Tier::krylov)
      *unsolved = krylov(Target(*this, written));
    else
      direct(Target(*this, written));
    if (!written.is_same(gradient)) gradient.copy_(written);
    return gradient;
  }

 private:
  // Where gradients are written.
  struct Target {
    Target(const Backward& own, const Tensor& t) : tensor(t), to(t), row(own.m_.along_p ? to.stride_q : to.stride_p) {
      const bool aligned = row * sizeof(T) % simd::kBytes == 0 && reinterpret_cast<uintptr_t>(t.data_ptr()) % simd::kBytes == 0 &&
                           own.m_.row_length(own.m_.q) % kLanes<T> == 0;
      stream = aligned && t.nbytes() > (size_t(32) << 20);
    }
    Tensor tensor;
    Matrices to;
    int64_t row;
    bool stream;
  };

  std::vector<int64_t> krylov(const Target& target) const {
    std::vector<uint8_t> solved(m_.batch);
    at::parallel_for(0, m_.batch, 1, [&](int64_t begin, int64_t end) {
      const int64_t stride = direct_.vector_stride();
      Own own(m_, k_, stride);
      ConjugateGradients<T> solver(m_, k_, stride);
      Room room(1, k_, stride);
      for (int64_t b = begin; b < end; ++b) {
        const auto in = inputs(b, own);
        for (int64_t j = 0; j < k_; ++j) own.lambda[j] = static_cast<double>(in.sigma[j]) * in.sigma[j];
        if (!(own.lambda[0] > kLowestTrace<float> && own.lambda[0] < kHighestTrace<float>)) continue;
        own.derivative.before(in, own.reader, b, 1, room.vectors.get(), room.kept.data());
        solved[b] = solver.solve(b, in.a, own.lambda.data(), room.vectors.get());
        if (solved[b]) finish(target, own, b, 1, room.kept.data(), room.vectors.get());
      }
      if (target.stream) simd::fence();
    });
    std::vector<int64_t> unsolved;
    for (int64_t b = 0; b < m_.batch; ++b)
      if (!solved[b]) unsolved.push_back(b);
    return unsolved;
  }

  void direct(const Target& target) const {
    const int64_t stride = direct_.vector_stride(), numbers = Derivative<T>::kept_size(k_);
    over_groups(
        m_.batch, Direct<T>::kGroup, Direct<T>::kGroup * numbers * static_cast<int64_t>(sizeof(double)),
        [&](int64_t groups) { return Room(groups * Direct<T>::kGroup, k_, stride); }, [&] { return Own(m_, k_, stride); },
        [&](Room& room, Own& own, int64_t b, int64_t slot) {
          own.derivative.before(inputs(b, own), own.reader, b, state_of(b).scale[0][lane(b)], room.vectors.get() + slot * k_ * stride,
                                room.kept.data() + slot * numbers);
        },
        [&](Room& room, Own& own, int64_t g, int64_t group, int64_t count) {
          T* r = room.vectors.get() + group * Direct<T>::kGroup * k_ * stride;
          std::fill(r + count * k_ * stride, r + Direct<T>::kGroup * k_ * stride, T(0));
          direct_.eigen.solve(state_of(g * Direct<T>::kGroup), gap_eps_, r, own.work);
        },
        [&](Room& room, Own& own, int64_t b, int64_t slot) {
          const GroupState<T> state = state_of(b);
          for (int64_t j = 0; j < k_; ++j)
            own.lambda[j] = static_cast<double>(state.lambda_high[j][lane(b)]) + static_cast<double>(state.lambda_low[j][lane(b)]);
          finish(target, own, b, state.scale[0][lane(b)], room.kept.data() + slot * numbers, room.vectors.get() + slot * k_ * stride);
          if (target.stream) simd::fence();
        });
  }

  struct Room {
    Room(int64_t samples, int64_t k, int64_t stride) : vectors(samples * k * stride), kept(samples * Derivative<T>::kept_size(k)) {}
    Buffer<T> vectors;
    std::vector<double> kept;
  };
  struct Own {
    Own(const Matrices& m, int64_t k, int64_t stride)
        : reader(m, gram_columns<T>(m)), work(m.p, k), derivative(m, k, stride, reader.columns()), a(k * stride), lambda(k) {}
    Reader<T> reader;
    typename Eigen<T>::Workspace work;
    Derivative<T> derivative;
    Buffer<T> a, ga, gb;
    std::vector<double> lambda;
  };

  void finish(const Target& target, Own& own, int64_t b, double scale, const double* kept, T* z) const {
    with_storage<T>(target.tensor.scalar_type(), [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      own.derivative.after(inputs(b, own), own.lambda.data(), gap_eps_, own.reader, b, scale, kept, z,
                           target.tensor.template mutable_data_ptr<Storage>() + target.to.offset(b), target.row, target.stream);
    });
  }

  static int lane(int64_t b) { return static_cast<int>(b % Direct<T>::kGroup); }
  GroupState<T> state_of(int64_t b) const {
    auto* memory = reinterpret_cast<Vec<T>*>(const_cast<T*>(state_.template const_data_ptr<T>()));  // it is only read
    return {memory + b / Direct<T>::kGroup * GroupState<T>::size(m_.p, k_), m_.p, k_};
  }

  // Whether rows lie in the gradient as they do in blocks of M.
  bool writable(const Tensor& gradient) const {
    const Matrices g(gradient);
    return (m_.along_p ? g.stride_p : g.stride_q) == 1;
  }
  Tensor rows_as_in_blocks() const {
    auto sizes = m_.tensor().sizes().vec();
    sizes.resize(sizes.size() - 2);
    sizes.insert(sizes.end(), {m_.along_p ? m_.q : m_.p, m_.along_p ? m_.p : m_.q});
    const Tensor result = at::empty(sizes, m_.tensor().options().memory_format(at::MemoryFormat::Contiguous));
    return m_.along_p == m_.tall ? result : result.transpose(-1, -2);
  }

  typename Derivative<T>::Inputs inputs(int64_t b, Own& own) const {
    const int64_t stride = direct_.vector_stride();
    const T* a = a_.template const_data_ptr<T>() + b * k_ * m_.p;
    for (int64_t j = 0; j < k_; ++j) {
      std::copy_n(a + j * m_.p, m_.p, own.a.get() + j * stride);
      std::fill(own.a.get() + j * stride + m_.p, own.a.get() + (j + 1) * stride, T(0));
    }
    const T* vectors = gb_.defined() ? b_.template const_data_ptr<T>() + b * k_ * m_.q : nullptr;
    const T* sigma = s_.template const_data_ptr<T>() + b * k_;
    return {own.a.get(),
            vectors,
            sigma,
            cotangent(ga_, b, own.ga),
            gs_.defined() ? gs_.template const_data_ptr<T>() + b * k_ : nullptr,
            cotangent(gb_, b, own.gb)};
  }

  // Cotangents come with the strides of what made them: a matrix at a time is brought into rows.
  static const T* cotangent(const Tensor& t, int64_t b, Buffer<T>& rows) {
    if (!t.defined()) return nullptr;
    const int64_t k = t.size(1), n = t.size(2), next_row = t.stride(1), next = t.stride(2);
    const T* from = t.template const_data_ptr<T>() + b * t.stride(0);
    if (next == 1 && next_row == n) return from;
    if (!rows.get()) rows = Buffer<T>(k * n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) rows.get()[j * n + i] = from[j * next_row + i * next];
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
