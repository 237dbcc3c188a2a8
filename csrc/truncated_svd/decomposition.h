// Schedules the forward pass: distributes matrices over threads and stages, and recomputes the
// matrices for which squaring lost accuracy or the Krylov tier did not converge.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include <tuple>

#include "../common/memory.h"
#include "direct.h"
#include "groups.h"
#include "jacobi.h"
#include "krylov.h"
#include "rounds.h"
#include "tier.h"
#include "triplets.h"
#include "truncated_svd.h"

namespace kdkernels::truncated_svd {

using at::Tensor;

template <typename T>
constexpr at::ScalarType kType = c10::CppTypeToScalarType<T>::value;

// The results that stages pass on, for some groups: the groups that a thread works on, or all of
// them.
template <typename T>
struct GroupBuffers {
  GroupBuffers(int64_t groups, const Direct<T>& direct, int64_t k)
      : grams(groups * Direct<T>::kGroup * direct.gram_size()),
        vectors(groups * Direct<T>::kGroup * k * direct.vector_stride()),
        lambda(groups * Direct<T>::kGroup * k),
        scales(groups * Direct<T>::kGroup, 1),
        range(groups * Direct<T>::kGroup) {}
  Buffer<T> grams, vectors;
  std::vector<double> lambda;
  std::vector<double> scales;
  std::vector<Range> range;
};

template <typename T>
struct ThreadWorkspace {
  ThreadWorkspace(const Matrices& m, int64_t k, int64_t state_size) : reader(m, gram_columns<T>(m)), work(m.p, k), state(state_size) {}
  Reader<T> reader;
  typename Eigen<T>::Workspace work;
  Buffer<Vec<T>> state;
};

struct Triplets {
  Tensor u, s, v, state;  // u [B, k, M] or empty, s [B, k], v [B, k, N]
};

inline Tensor index_tensor(const std::vector<int64_t>& indices) {
  const Tensor index = at::empty({static_cast<int64_t>(indices.size())}, at::kLong);
  std::copy(indices.begin(), indices.end(), index.mutable_data_ptr<int64_t>());
  return index;
}

// The matrices `indices` of a batch, as [n, M, N].
inline Tensor select_matrices(const Matrices& m, const std::vector<int64_t>& indices, at::ScalarType dtype) {
  if (m.tensor().dim() == 3) return m.tensor().index_select(0, index_tensor(indices)).to(dtype);
  std::vector<Tensor> selected;
  for (int64_t b : indices) selected.push_back(m.matrix(b).to(dtype));
  return at::stack(selected);
}

// x [n, M, N] is finite and in double: each matrix is multiplied by the power of two that brings
// its largest magnitude near 1. This power is stored as two factors [n, 1, 1], because it may
// itself be out of range.
struct Rescaled {
  explicit Rescaled(const Tensor& original)
      : factor_1(at::empty({original.size(0), 1, 1}, original.options())), factor_2(at::empty_like(factor_1)) {
    const Tensor largest = original.abs().amax({-2, -1}).contiguous();
    for (int64_t b = 0; b < original.size(0); ++b) {
      const int exponent = -std::ilogb(largest.const_data_ptr<double>()[b]);
      factor_1.mutable_data_ptr<double>()[b] = std::ldexp(1.0, exponent / 2);
      factor_2.mutable_data_ptr<double>()[b] = std::ldexp(1.0, exponent - exponent / 2);
    }
    x = original.mul(factor_1).mul(factor_2);
  }
  Tensor factor_1, factor_2, x;
};

template <typename T>
class Decomposition {
 public:
  // use_rounds: whether ill-conditioned float64 matrices are computed without a Gram matrix or in
  // rounds. subset: see Matrices. x may have another dtype than T.
  Decomposition(const Tensor& x, int64_t k, bool sign, bool return_u, bool save_state, bool use_rounds, Tier tier,
                std::vector<int64_t> subset = {})
      : m_(x, std::move(subset)), k_(k), sign_(sign), use_rounds_(use_rounds), tier_(tier), direct_(m_, k), status_(m_.batch, Status::ok) {
    needs_b_ = return_u || !m_.tall;
    out_.v = recycled_empty({m_.batch, k, x.size(-1)}, kType<T>);
    out_.s = recycled_empty({m_.batch, k}, kType<T>);
    out_.u = recycled_empty({needs_b_ ? m_.batch : 0, k, x.size(-2)}, kType<T>);
    state_size_ = GroupState<T>::size(m_.p, k);
    out_.state =
        recycled_empty({save_state && tier == Tier::direct && k < m_.p ? direct_.groups() * state_size_ * Direct<T>::kGroup : 0}, kType<T>);
    Tensor &a = m_.tall ? out_.v : out_.u, &b = m_.tall ? out_.u : out_.v;
    a_ = a.mutable_data_ptr<T>();
    b_ = needs_b_ ? b.mutable_data_ptr<T>() : nullptr;
  }

  Triplets run() {
    if (tier_ == Tier::jacobi)
      run_jacobi();
    else if (tier_ == Tier::krylov)
      run_krylov();
    else
      run_stages([&](GroupBuffers<T>& buffers, ThreadWorkspace<T>& workspace, int64_t b, int64_t slot) {
        finish(b, buffers.vectors.get() + slot * k_ * direct_.vector_stride(), buffers.lambda.data() + slot * k_,
               {buffers.scales[slot], buffers.range[slot]}, workspace.reader);
      });
    recompute(Status::not_converged);
    recompute(Status::out_of_range);
    if constexpr (sizeof(T) == 8)
      recompute_ill_conditioned();
    else
      recompute(Status::ill_conditioned);
    return std::move(out_);
  }

  // Computes only the state that the derivative needs.
  Tensor state() {
    run_stages([](GroupBuffers<T>&, ThreadWorkspace<T>&, int64_t, int64_t) {});
    return out_.state;
  }

 private:
  // Fewer numbers are scanned by one thread. An estimate: it scans them in the time that waking a
  // second one takes, some microseconds.
  static constexpr int64_t kNumbersPerThread = 1 << 15;

  // not_converged: in the Krylov tier; out_of_range: see Range.
  enum class Status : uint8_t { ok, not_converged, out_of_range, ill_conditioned };

  void run_krylov() {
    constexpr int64_t group = Krylov<T>::kGroup;
    auto make_state = [&] {
      return std::tuple(Krylov<T>(m_, k_), Reader<T>(m_, product_columns<T>(m_)), Buffer<T>(group * k_ * padded<T>(m_.p)),
                        std::vector<double>(group * k_));
    };
    parallel_for(0, (m_.batch + group - 1) / group, 1, make_state, [&](auto& state, int64_t begin, int64_t end) {
      auto& [krylov, reader, vectors, lambda] = state;
      bool converged[group];
      for (int64_t first = begin * group; first < std::min(end * group, m_.batch); first += group) {
        const int64_t count = std::min(group, m_.batch - first);
        krylov.run(first, count, vectors.get(), lambda.data(), converged);
        for (int64_t i = 0; i < count; ++i) {
          if (converged[i])
            finish(first + i, vectors.get() + i * k_ * krylov.stride(), lambda.data() + i * k_, Scaling{}, reader);
          else
            status_[first + i] = Status::not_converged;
        }
      }
    });
  }

  template <typename Finish>
  void run_stages(Finish&& finish) {
    const bool save = out_.state.numel() > 0;
    for_each_group(
        m_.batch, Direct<T>::kGroup, Direct<T>::kGroup * direct_.gram_size() * static_cast<int64_t>(sizeof(T)), true,
        [&](int64_t groups) { return GroupBuffers<T>(groups, direct_, k_); },
        [&] { return ThreadWorkspace<T>(m_, k_, save ? 0 : state_size_); },
        [&](GroupBuffers<T>& buffers, ThreadWorkspace<T>& workspace, int64_t b, int64_t slot) {
          const Scaling scaling = direct_.compute_gram(b, workspace.reader, buffers.grams.get() + slot * direct_.gram_size());
          buffers.scales[slot] = scaling.scale;
          buffers.range[slot] = scaling.range;
        },
        [&](GroupBuffers<T>& buffers, ThreadWorkspace<T>& workspace, int64_t g, int64_t group, int64_t count) {
          Vec<T>* memory =
              save ? reinterpret_cast<Vec<T>*>(out_.state.template mutable_data_ptr<T>()) + g * state_size_ : workspace.state.get();
          const int64_t first = group * Direct<T>::kGroup;
          const double least_ratio = use_rounds_ || sizeof(T) == 4 ? kLeastRatio<T> * kLeastRatio<T> : 0;
          direct_.eigen.largest_eigenpairs(buffers.grams.get() + first * direct_.gram_size(), buffers.scales.data() + first, count,
                                           GroupState<T>(memory, m_.p, k_), save, least_ratio,
                                           buffers.vectors.get() + first * k_ * direct_.vector_stride(), buffers.lambda.data() + first * k_,
                                           workspace.work);
        },
        finish);
  }

  void finish(int64_t b, const T* a, const double* lambda, const Scaling& scaling, Reader<T>& reader) {
    T *a_out = a_ + b * k_ * m_.p, *b_out = needs_b_ ? b_ + b * k_ * m_.q : nullptr, *s = out_.s.template mutable_data_ptr<T>() + b * k_;
    if (scaling.range == Range::out_of_range) {
      status_[b] = Status::out_of_range;
      return;
    }
    if (scaling.range == Range::not_finite) {
      fill_nan(b);
      return;
    }
    const bool ill_conditioned = lambda[k_ - 1] < kLeastRatio<T> * kLeastRatio<T> * lambda[0];
    if (ill_conditioned && (use_rounds_ || sizeof(T) == 4)) {
      status_[b] = Status::ill_conditioned;
      return;
    }
    for (int64_t j = 0; j < k_; ++j) {
      std::copy_n(a + j * direct_.vector_stride(), m_.p, a_out + j * m_.p);
      s[j] = static_cast<T>(std::sqrt(lambda[j]) / scaling.scale);
    }
    // |M^T a_j| is an accurate sigma_j even if the square root of lambda_j is not.
    if (b_out || lambda[k_ - 1] < kIllConditioned * kIllConditioned * lambda[0]) {
      const int64_t numbers = k_ * direct_.vector_stride();
      Buffer<T> scaled(numbers), products(b_out ? 0 : k_ * m_.q);
      for (int64_t i = 0; i < numbers; ++i) scaled.get()[i] = static_cast<T>(scaling.scale) * a[i];
      T* w = b_out ? b_out : products.get();
      project<T>(b, scaled.get(), direct_.vector_stride(), reader, w);
      std::vector<double> sigma(k_);
      if (b_out)
        normalize_triplets<T>(k_, b_out, m_.q, sigma.data());
      else
        compute_lengths<T>(k_, w, m_.q, sigma.data());
      for (int64_t j = 0; j < k_; ++j) s[j] = static_cast<T>(sigma[j] / scaling.scale);
      std::sort(s, s + k_, std::greater<T>());
    }
    if (sign_) fix_matrix_signs(b);
  }

  // The result for a matrix that contains a NaN or an infinity.
  void fill_nan(int64_t b) {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    std::fill(a_ + b * k_ * m_.p, a_ + (b + 1) * k_ * m_.p, nan);
    if (needs_b_) std::fill(b_ + b * k_ * m_.q, b_ + (b + 1) * k_ * m_.q, nan);
    std::fill(out_.s.template mutable_data_ptr<T>() + b * k_, out_.s.template mutable_data_ptr<T>() + (b + 1) * k_, nan);
  }

  void fix_matrix_signs(int64_t b) {
    T *a_out = a_ + b * k_ * m_.p, *b_out = needs_b_ ? b_ + b * k_ * m_.q : nullptr;
    if (m_.tall)
      fix_signs<T>(k_, a_out, m_.p, b_out, m_.q);
    else
      fix_signs<T>(k_, b_out, m_.q, a_out, m_.p);
  }

  // out [k, q] = M^T a for a [k, stride], 0 from p on
  template <typename U>
  void project(int64_t b, const U* a, int64_t stride, Reader<U>& reader, U* out) {
    const int64_t line = line_stride<U>(reader.columns());
    Buffer<U> block_products(k_ * line);
    for (int64_t first = 0; first < m_.q; first += reader.columns()) {
      project_block<U>(m_, reader.read(b, first), k_, a, stride, block_products.get(), line);
      const int64_t count = std::min(reader.columns(), m_.q - first);
      for (int64_t j = 0; j < k_; ++j) std::copy_n(block_products.get() + j * line, count, out + j * m_.q + first);
    }
  }

  std::vector<int64_t> with_status(Status status) const {
    std::vector<int64_t> indices;
    for (int64_t b = 0; b < m_.batch; ++b)
      if (status_[b] == status) indices.push_back(b);
    return indices;
  }

  // Recomputes the matrices that have this status. Matrices for which the Krylov tier did not
  // converge go to the direct tier. Float32 matrices whose squares leave the range of float32, or
  // whose kept singular values span orders of magnitude, so that squaring loses accuracy, are
  // recomputed in double, which has range and precision enough for both. Float64 matrices of the
  // first kind are rescaled.
  void recompute(Status status) {
    const std::vector<int64_t> indices = with_status(status);
    if (indices.empty()) return;
    std::vector<int64_t> subset;
    for (int64_t b : indices) subset.push_back(m_.index(b));
    const Tensor& x = m_.tensor();
    Triplets recomputed;
    if (status == Status::not_converged) {
      recomputed = Decomposition<T>(x, k_, sign_, needs_b_, false, use_rounds_, Tier::direct, subset).run();
    } else if (sizeof(T) == 4) {
      recomputed = Decomposition<double>(x, k_, sign_, needs_b_, false, false, Tier::direct, subset).run();
    } else {
      const Rescaled rescaled(select_matrices(m_, indices, at::kDouble));
      recomputed = Decomposition<double>(rescaled.x, k_, sign_, needs_b_, false, use_rounds_, Tier::direct).run();
      recomputed.s = recomputed.s.div(rescaled.factor_1.squeeze(-1)).div(rescaled.factor_2.squeeze(-1));
    }
    const Tensor index = index_tensor(indices);
    out_.s.index_copy_(0, index, recomputed.s.to(kType<T>));
    out_.v.index_copy_(0, index, recomputed.v.to(kType<T>));
    if (needs_b_) out_.u.index_copy_(0, index, recomputed.u.to(kType<T>));
    for (size_t i = 0; sign_ && i < indices.size(); ++i) fix_matrix_signs(indices[i]);
  }

  // Recomputes ill-conditioned float64 matrices by a method that does not square them: small ones
  // with Jacobi rotations, others in rounds.
  void recompute_ill_conditioned() {
    const std::vector<int64_t> indices = with_status(Status::ill_conditioned);
    if (m_.p <= Jacobi::kMaxSide) return decompose_by_jacobi(indices);
    auto make_state = [&] {
      return std::tuple(Reader<double>(m_, product_columns<double>(m_)), Rounds(m_, k_), Buffer<double>(k_ * m_.p));
    };
    parallel_for(0, static_cast<int64_t>(indices.size()), 1, make_state, [&](auto& state, int64_t begin, int64_t end) {
      auto& [reader, rounds, a] = state;
      for (int64_t i = begin; i < end; ++i) {
        rounds.run(indices[i], reader, a.get());
        finish_accurate(indices[i], a.get(), reader);
      }
    });
  }

  void run_jacobi() {
    std::vector<uint8_t> accepted(m_.batch, false);
    auto make_reader = [&] { return Reader<T>(m_, product_columns<T>(m_)); };
    parallel_for(0, m_.batch, kNumbersPerThread / (m_.p * m_.q) + 1, make_reader, [&](Reader<T>& reader, int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const double largest = reader.largest(b);
        if (!(largest == largest))
          fill_nan(b);
        else if (sizeof(T) == 8 && largest != 0 && !(largest > 1e-100 && largest < 1e140))
          status_[b] = Status::out_of_range;
        else
          accepted[b] = true;
      }
    });
    std::vector<int64_t> indices;
    for (int64_t b = 0; b < m_.batch; ++b)
      if (accepted[b]) indices.push_back(b);
    decompose_by_jacobi(indices);
  }

  void decompose_by_jacobi(const std::vector<int64_t>& indices) {
    constexpr int64_t group = Jacobi::kGroup;
    const int64_t count = static_cast<int64_t>(indices.size());
    auto make_state = [&] {
      return std::tuple(Reader<double>(m_, product_columns<double>(m_)), Jacobi(m_, k_), Buffer<double>(group * k_ * m_.p));
    };
    parallel_for(0, (count + group - 1) / group, 1, make_state, [&](auto& state, int64_t begin, int64_t end) {
      auto& [reader, jacobi, a] = state;
      for (int64_t first = begin * group; first < std::min(end * group, count); first += group) {
        const int64_t n = std::min(group, count - first);
        jacobi.run(indices.data() + first, n, reader, a.get());
        for (int64_t i = 0; i < n; ++i) finish_accurate(indices[first + i], a.get() + i * k_ * m_.p, reader);
      }
    });
  }

  // Writes the triplets of matrix b from its vectors a [k, p].
  void finish_accurate(int64_t b, const double* a, Reader<double>& reader) {
    const int64_t p = m_.p, q = m_.q, stride = padded<double>(p);
    Buffer<double> rows(k_ * stride), products(k_ * q);
    for (int64_t j = 0; j < k_; ++j) {
      std::copy_n(a + j * p, p, rows.get() + j * stride);
      std::fill(rows.get() + j * stride + p, rows.get() + (j + 1) * stride, 0.0);
    }
    project<double>(b, rows.get(), stride, reader, products.get());
    std::vector<double> sigma(k_);
    if (needs_b_) {
      normalize_triplets<double>(k_, products.get(), q, sigma.data());
      std::copy_n(products.get(), k_ * q, b_ + b * k_ * q);
    } else {
      compute_lengths<double>(k_, products.get(), q, sigma.data());
    }
    std::sort(sigma.begin(), sigma.end(), std::greater<double>());
    T* s = out_.s.template mutable_data_ptr<T>() + b * k_;
    for (int64_t j = 0; j < k_; ++j) s[j] = static_cast<T>(sigma[j]);
    std::copy_n(a, k_ * p, a_ + b * k_ * p);
    if (sign_) fix_matrix_signs(b);
  }

  const Matrices m_;
  int64_t k_;
  bool sign_, use_rounds_, needs_b_;
  Tier tier_;
  Direct<T> direct_;
  std::vector<Status> status_;
  int64_t state_size_;
  Triplets out_;
  T *a_, *b_;
};

}  // namespace kdkernels::truncated_svd
