// CPU kernels of the truncated_svd ops. Compiled once per instruction set.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/implementations.h"
#include "backward.h"

namespace kdkernels::truncated_svd {
namespace {

// The rows `indices` of a batch.
Tensor select_rows(const Tensor& t, const std::vector<int64_t>& indices, at::ScalarType dtype) {
  if (!t.defined()) return t;
  return t.index_select(0, index_tensor(indices)).to(dtype);
}

// Gives recomputed triplets the signs of `reference`, the vectors v that the forward pass returned.
void match_signs(const Tensor& reference, Triplets& recomputed) {
  const Tensor product = recomputed.v.mul(reference).sum(-1, true), flip = product.sign().add(product.eq(0));
  recomputed.v = recomputed.v.mul(flip);
  if (recomputed.u.numel() > 0) recomputed.u = recomputed.u.mul(flip);
}

// Writes gradients [n, M, N], in float or double, to the matrices `indices` of `gradient`. A number
// past the largest number of float32 or float64 is clamped to it: double has a wider range than
// float, and rescaled matrices have a wider range than double. Half dtypes become infinite instead,
// which is what gradient scalers look for.
void write_gradients(const std::vector<int64_t>& indices, const Tensor& result, const Tensor& gradient) {
  if (gradient.scalar_type() == at::kFloat) result.clamp_(-std::numeric_limits<float>::max(), std::numeric_limits<float>::max());
  if (gradient.scalar_type() == at::kDouble) result.clamp_(-std::numeric_limits<double>::max(), std::numeric_limits<double>::max());
  if (gradient.dim() == 3) {
    gradient.index_copy_(0, index_tensor(indices), result.to(gradient.scalar_type()));
    return;
  }
  const Matrices to(gradient);
  for (size_t i = 0; i < indices.size(); ++i) to.matrix(indices[i]).copy_(result.select(0, static_cast<int64_t>(i)));
}

// Computes the gradients of matrices X whose squares leave the range of their dtype. It uses X / c,
// with c a power of two, which has the same vectors and the singular values sigma / c. The part of
// the gradient that comes from vectors is c times that of X; the part that comes from singular
// values is that of X, whatever c is.
void write_rescaled_gradients(const std::vector<int64_t>& indices, const UpstreamGradients& grads, const Matrices& m, const Triplets& t,
                              double gap_eps, const Tensor& gradient) {
  if (indices.empty()) return;
  const Rescaled rescaled(select_matrices(m, indices, at::kDouble));
  const bool use_rounds = t.s.scalar_type() == at::kDouble;
  Triplets triplets =
      Decomposition<double>(rescaled.x, t.s.size(-1), false, !m.tall || t.u.defined(), true, use_rounds, Tier::direct).run();
  match_signs(select_rows(t.v, indices, at::kDouble), triplets);
  auto gradient_of = [&](const Tensor& u, const Tensor& s, const Tensor& v) {
    const UpstreamGradients upstream{select_rows(u, indices, at::kDouble), select_rows(s, indices, at::kDouble),
                                     select_rows(v, indices, at::kDouble)};
    return Backward<double>(upstream, rescaled.x, triplets, gap_eps, Tier::direct).run();
  };
  Tensor result = gradient_of(grads.u, {}, grads.v).mul(rescaled.factor_1).mul(rescaled.factor_2);
  if (grads.s.defined()) result = result.add(gradient_of({}, grads.s, {}));
  write_gradients(indices, result, gradient);
}

template <typename T>
std::vector<int64_t> matrices_out_of_range(const Tensor& s) {
  std::vector<int64_t> indices;
  const int64_t k = s.size(-1);
  for (int64_t b = 0; b < s.size(0); ++b)
    if (out_of_range(s.const_data_ptr<T>()[b * k])) indices.push_back(b);
  return indices;
}

// Recomputes the gradients of some matrices with the direct tier in T. They are copied, as many at a
// time as make use of all threads and lanes.
template <typename T>
void recompute_gradients(const std::vector<int64_t>& indices, const UpstreamGradients& grads, const Matrices& m, const Triplets& t,
                         double gap_eps, const Tensor& gradient) {
  constexpr int64_t max_numbers = int64_t(1) << 20;
  const size_t at_once = std::max<int64_t>(max_numbers / (m.p * m.q), 2 * kLanes<T> * at::get_num_threads());
  if (indices.empty()) return;
  if (indices.size() > at_once) {
    for (size_t first = 0; first < indices.size(); first += at_once)
      recompute_gradients<T>({indices.begin() + first, indices.begin() + std::min(indices.size(), first + at_once)}, grads, m, t, gap_eps,
                             gradient);
    return;
  }
  const auto dtype = kType<T>;
  const Tensor x = select_matrices(m, indices, dtype);
  Triplets triplets{select_rows(t.u, indices, dtype), select_rows(t.s, indices, dtype), select_rows(t.v, indices, dtype),
                    at::empty({0}, x.options())};
  if (sizeof(T) == 8) {
    triplets = Decomposition<T>(x, t.s.size(-1), false, !m.tall || t.u.defined(), true, false, Tier::direct).run();
    match_signs(select_rows(t.v, indices, dtype), triplets);
  }
  const UpstreamGradients upstream{select_rows(grads.u, indices, dtype), select_rows(grads.s, indices, dtype),
                                   select_rows(grads.v, indices, dtype)};
  write_gradients(indices, Backward<T>(upstream, x, triplets, gap_eps, Tier::direct).run(), gradient);
}

// Whether any upstream gradient of a triplet is not 0: [B, k].
Tensor used_triplets(const UpstreamGradients& grads, int64_t batch, int64_t k) {
  Tensor used = at::zeros({batch, k}, at::kBool);
  if (grads.s.defined()) used = used.logical_or(grads.s.ne(0));
  for (const Tensor* g : {&grads.u, &grads.v})
    if (g->defined()) used = used.logical_or(g->ne(0).any(-1));
  return used.contiguous();
}

// The float32 matrices whose gradient is computed in double: those that the forward pass recomputed
// in double, unless the loss does not use the triplets with the small singular values. SVD-KD
// computes one more vector than it needs, and uses it only if the order of the vectors has changed.
std::vector<int64_t> ill_conditioned_matrices(const UpstreamGradients& grads, const Tensor& s, int64_t batch) {
  const int64_t k = s.size(-1);
  const float* sigma = s.const_data_ptr<float>();
  std::vector<int64_t> indices;
  Tensor used;
  for (int64_t b = 0; b < batch; ++b) {
    if (out_of_range(sigma[b * k]) || !(sigma[b * k + k - 1] < kLeastRatio<float> * sigma[b * k])) continue;
    if (!used.defined()) used = used_triplets(grads, batch, k);
    const bool* used_triplet = used.const_data_ptr<bool>() + b * k;
    for (int64_t j = k - 1; sigma[b * k + j] < kLeastRatio<float> * sigma[b * k]; --j)
      if (used_triplet[j]) {
        indices.push_back(b);
        break;
      }
  }
  return indices;
}

// Sets the gradient of a matrix that contains a NaN or an infinity to 0, instead of NaN, if its
// upstream gradients are all 0, because the loss then leaves the matrix out.
void zero_unused_gradients(const UpstreamGradients& grads, const Tensor& s, const Tensor& gradient) {
  const int64_t k = s.size(-1), batch = s.numel() / k;
  Tensor not_finite = s.view({batch, k}).select(1, 0).isnan();
  if (!not_finite.any().item().toBool()) return;
  not_finite = not_finite.logical_and(used_triplets(grads, batch, k).any(1).logical_not());
  const Matrices to(gradient);
  const Tensor indices = not_finite.nonzero().flatten();
  for (int64_t i = 0; i < indices.numel(); ++i) to.matrix(indices[i].item().toLong()).zero_();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> truncated_svd_cpu(const Tensor& x, int64_t k, int64_t sign, bool return_u, double gap_eps,
                                                             bool save_state, int64_t implementation) {
  if (const auto chosen = parse_implementation(implementation); chosen != Implementation::fastest)
    return implementation_op<Signature>("truncated_svd", chosen).call(x, k, sign, return_u, gap_eps, save_state);
  check_matrices(x, k);
  const bool sign_fixed = parse_sign(sign), is_double = compute_dtype(x) == at::kDouble;
  Triplets t = is_double ? Decomposition<double>(x, k, sign_fixed, return_u, save_state, true, tier_for<double>(Matrices(x), k)).run()
                         : Decomposition<float>(x, k, sign_fixed, return_u, save_state, true, tier_for<float>(Matrices(x), k)).run();
  auto vectors = [&](const Tensor& rows) { return rows.view(batched(x, {k, rows.size(-1)})).transpose(-1, -2); };
  return {t.u.numel() > 0 || t.u.size(0) == t.s.size(0) ? vectors(t.u) : at::empty({0}, t.u.options()), t.s.view(batched(x, {k})),
          vectors(t.v), t.state};
}

Tensor truncated_svd_backward_cpu(const std::optional<Tensor>& grad_u, const std::optional<Tensor>& grad_s,
                                  const std::optional<Tensor>& grad_v, const Tensor& x, const Tensor& u, const Tensor& s, const Tensor& v,
                                  const Tensor& state, double gap_eps, int64_t implementation) {
  if (const auto chosen = parse_implementation(implementation); chosen != Implementation::fastest)
    return implementation_op<BackwardSignature>("truncated_svd_backward", chosen).call(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps);
  const BackwardInputs in(grad_u, grad_s, grad_v, x, u, s, v, gap_eps);
  const int64_t k = in.k;
  const at::ScalarType dtype = in.dtype;
  const UpstreamGradients grads{in.grad[0], in.grad[1], in.grad[2]};
  const Triplets t{in.u, in.s, in.v, state};
  const Matrices m(x);
  if (state.numel() > 0) {
    const int64_t lanes = simd::kBytes / static_cast<int64_t>(dtype == at::kDouble ? sizeof(double) : sizeof(float));
    const int64_t state_numbers =
        (m.batch + lanes - 1) / lanes * lanes * (dtype == at::kDouble ? GroupState<double>::size(m.p, k) : GroupState<float>::size(m.p, k));
    TORCH_CHECK_VALUE(state.scalar_type() == dtype && state.device() == x.device() && state.is_contiguous() &&
                          state.numel() == state_numbers && reinterpret_cast<uintptr_t>(state.const_data_ptr()) % simd::kBytes == 0,
                      "state must be the tensor that the forward op returned for x, or empty");
  }
  if (dtype == at::kDouble) {
    const Tensor gradient = Backward<double>(grads, x, t, gap_eps, Tier::direct).run();
    write_rescaled_gradients(matrices_out_of_range<double>(t.s), grads, m, t, gap_eps, gradient);
    zero_unused_gradients(grads, t.s, gradient);
    return gradient;
  }
  // Conjugate gradients do not regularise, and converge only if the gaps are much larger than the
  // regularisation. So they are used only for a small gap_eps.
  const bool use_krylov = gap_eps <= 1e-4 && state.numel() == 0 && tier_for<float>(m, k) == Tier::krylov;
  const Tier tier = use_krylov ? Tier::krylov : Tier::direct;
  const std::vector<int64_t> ill_conditioned = ill_conditioned_matrices(grads, t.s, m.batch);
  if (static_cast<int64_t>(ill_conditioned.size()) == m.batch) {
    const Tensor gradient = recycled_empty_like(x);
    recompute_gradients<double>(ill_conditioned, grads, m, t, gap_eps, gradient);
    return gradient;
  }
  std::vector<int64_t> unsolved;
  const Tensor gradient = Backward<float>(grads, x, t, gap_eps, tier).run(&unsolved);
  const float* sigma = t.s.const_data_ptr<float>();
  unsolved.erase(std::remove_if(unsolved.begin(), unsolved.end(), [&](int64_t b) { return out_of_range(sigma[b * k]); }), unsolved.end());
  recompute_gradients<float>(unsolved, grads, m, t, gap_eps, gradient);
  recompute_gradients<double>(ill_conditioned, grads, m, t, gap_eps, gradient);
  write_rescaled_gradients(matrices_out_of_range<float>(t.s), grads, m, t, gap_eps, gradient);
  zero_unused_gradients(grads, t.s, gradient);
  return gradient;
}

}  // namespace
}  // namespace kdkernels::truncated_svd

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("truncated_svd", kdkernels::truncated_svd::truncated_svd_cpu);
  m.impl("truncated_svd_backward", kdkernels::truncated_svd::truncated_svd_backward_cpu);
}
