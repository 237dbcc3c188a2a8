// CPU kernels of the truncated_svd ops. Compiled once per instruction set.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/implementations.h"
#include "backward.h"

namespace kdkernels::truncated_svd {
namespace {

// The rows of a batch that are named.
Tensor rows(const Tensor& t, const std::vector<int64_t>& which, at::ScalarType dtype) {
  if (!t.defined()) return t;
  return t.index_select(0, index_of(which)).to(dtype);
}

// The signs that were given out, to triplets that were made again.
void take_signs(const Tensor& given, Triplets& again) {
  const Tensor product = again.v.mul(given).sum(-1, true), flip = product.sign().add(product.eq(0));
  again.v = again.v.mul(flip);
  if (again.u.numel() > 0) again.u = again.u.mul(flip);
}

// Writes gradients [n, M, N] of double or float to their places. Double reaches further than float does, and units further than double: a
// gradient past the largest number is held there. Half types say so with an infinity, which is what scalers of gradients look for.
void put(const std::vector<int64_t>& which, const Tensor& result, const Tensor& gradient) {
  if (gradient.scalar_type() == at::kFloat) result.clamp_(-std::numeric_limits<float>::max(), std::numeric_limits<float>::max());
  if (gradient.scalar_type() == at::kDouble) result.clamp_(-std::numeric_limits<double>::max(), std::numeric_limits<double>::max());
  if (gradient.dim() == 3) {
    gradient.index_copy_(0, index_of(which), result.to(gradient.scalar_type()));
    return;
  }
  const Matrices to(gradient);
  for (size_t i = 0; i < which.size(); ++i) to.one(which[i]).copy_(result.select(0, static_cast<int64_t>(i)));
}

// Gradients of matrices whose squares leave the range of their type: those of x = X / c, c a power of two, which has the same vectors and
// sigma / c. What comes of vectors is c times that of X; what comes of values is that of X, whatever c is.
void gradients_in_units(const std::vector<int64_t>& which, const Cotangents& grads, const Matrices& m, const Triplets& t, double gap_eps,
                        const Tensor& gradient) {
  if (which.empty()) return;
  const InUnits units(some_matrices(m, which, at::kDouble));
  const bool wide = t.s.scalar_type() == at::kDouble;
  Triplets exact = Decomposition<double>(units.x, t.s.size(-1), false, !m.tall || t.u.defined(), true, wide, Tier::direct).run();
  take_signs(rows(t.v, which, at::kDouble), exact);
  auto part = [&](const Tensor& u, const Tensor& s, const Tensor& v) {
    const Cotangents given{rows(u, which, at::kDouble), rows(s, which, at::kDouble), rows(v, which, at::kDouble)};
    return Backward<double>(given, units.x, exact, gap_eps, Tier::direct).run();
  };
  Tensor result = part(grads.u, {}, grads.v).mul(units.first).mul(units.second);
  if (grads.s.defined()) result = result.add(part({}, grads.s, {}));
  put(which, result, gradient);
}

template <typename T>
std::vector<int64_t> matrices_out_of_range(const Tensor& s) {
  std::vector<int64_t> which;
  const int64_t k = s.size(-1);
  for (int64_t b = 0; b < s.size(0); ++b)
    if (out_of_range(s.const_data_ptr<T>()[b * k])) which.push_back(b);
  return which;
}

// Gradients of some matrices, made again by the direct tier in T.
template <typename T>
void redo_gradients(const std::vector<int64_t>& which, const Cotangents& grads, const Matrices& m, const Triplets& t, double gap_eps,
                    const Tensor& gradient) {
  if (which.empty()) return;
  const auto type = kType<T>;
  const Tensor x = some_matrices(m, which, type);
  Triplets exact{rows(t.u, which, type), rows(t.s, which, type), rows(t.v, which, type), at::empty({0}, x.options())};
  if (sizeof(T) == 8) {
    exact = Decomposition<T>(x, t.s.size(-1), false, !m.tall || t.u.defined(), true, false, Tier::direct).run();
    take_signs(rows(t.v, which, type), exact);
  }
  const Cotangents given{rows(grads.u, which, type), rows(grads.s, which, type), rows(grads.v, which, type)};
  put(which, Backward<T>(given, x, exact, gap_eps, Tier::direct).run(), gradient);
}

// Whether anything of a triplet has a gradient: [B, k].
Tensor used_triplets(const Cotangents& grads, int64_t batch, int64_t k) {
  Tensor used = at::zeros({batch, k}, at::kBool);
  if (grads.s.defined()) used = used.logical_or(grads.s.ne(0));
  for (const Tensor* g : {&grads.u, &grads.v})
    if (g->defined()) used = used.logical_or(g->ne(0).any(-1));
  return used.contiguous();
}

// A matrix that holds no numbers and of whose triplets nothing was used was left out of a loss: its gradient is 0, not NaN.
void leave_out_the_unused(const Cotangents& grads, const Tensor& s, const Tensor& gradient) {
  const int64_t k = s.size(-1), batch = s.numel() / k;
  Tensor broken = s.view({batch, k}).select(1, 0).isnan();
  if (!broken.any().item().toBool()) return;
  broken = broken.logical_and(used_triplets(grads, batch, k).any(1).logical_not());
  const Matrices to(gradient);
  const Tensor which = broken.nonzero().flatten();
  for (int64_t i = 0; i < which.numel(); ++i) to.one(which[i].item().toLong()).zero_();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> truncated_svd_cpu(const Tensor& x, int64_t k, int64_t sign, bool return_u, double gap_eps,
                                                             bool save_state, int64_t implementation) {
  if (const auto chosen = parse_implementation(implementation); chosen != Implementation::fastest)
    return implementation_op<Signature>("truncated_svd", chosen).call(x, k, sign, return_u, gap_eps, save_state);
  check_matrices(x, k);
  const bool fix = parse_sign(sign), is_double = compute_dtype(x) == at::kDouble;
  Triplets t = is_double ? Decomposition<double>(x, k, fix, return_u, save_state, true, Tier::direct).run()
                         : Decomposition<float>(x, k, fix, return_u, save_state, true, tier_for<float>(Matrices(x), k)).run();
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
  const Cotangents grads{in.grad[0], in.grad[1], in.grad[2]};
  const Triplets t{in.u, in.s, in.v, state};
  const Matrices m(x);
  if (state.numel() > 0) {
    const int64_t lanes = simd::kBytes / static_cast<int64_t>(dtype == at::kDouble ? sizeof(double) : sizeof(float));
    const int64_t numbers =
        (m.batch + lanes - 1) / lanes * lanes * (dtype == at::kDouble ? GroupState<double>::size(m.p, k) : GroupState<float>::size(m.p, k));
    TORCH_CHECK_VALUE(state.scalar_type() == dtype && state.device() == x.device() && state.is_contiguous() && state.numel() == numbers &&
                          reinterpret_cast<uintptr_t>(state.const_data_ptr()) % simd::kBytes == 0,
                      "state must be that of the forward, or empty");
  }
  if (dtype == at::kDouble) {
    const Tensor gradient = Backward<double>(grads, x, t, gap_eps, Tier::direct).run();
    gradients_in_units(matrices_out_of_range<double>(t.s), grads, m, t, gap_eps, gradient);
    leave_out_the_unused(grads, t.s, gradient);
    return gradient;
  }
  // Conjugate gradients know no regularisation: they are for that of rounding, which they never meet.
  const Tier tier = gap_eps <= 1e-4 && state.numel() == 0 ? tier_for<float>(m, k) : Tier::direct;
  std::vector<int64_t> unsolved, ill;
  const Tensor gradient = Backward<float>(grads, x, t, gap_eps, tier).run(&unsolved);
  const float* sigma = t.s.const_data_ptr<float>();
  unsolved.erase(std::remove_if(unsolved.begin(), unsolved.end(), [&](int64_t b) { return out_of_range(sigma[b * k]); }), unsolved.end());
  redo_gradients<float>(unsolved, grads, m, t, gap_eps, gradient);
  // Matrices whose forward was done again in double have their derivative from there too, but where nothing of the triplets that asked for
  // it was used: SVD-KD has a spare vector that it takes only where an order changed.
  Tensor used;
  for (int64_t b = 0; b < m.batch; ++b) {
    if (out_of_range(sigma[b * k]) || !(sigma[b * k + k - 1] < kIllConditioned * sigma[b * k])) continue;
    if (!used.defined()) used = used_triplets(grads, m.batch, k);
    const bool* own = used.const_data_ptr<bool>() + b * k;
    for (int64_t j = k - 1; sigma[b * k + j] < kIllConditioned * sigma[b * k]; --j)
      if (own[j]) {
        ill.push_back(b);
        break;
      }
  }
  redo_gradients<double>(ill, grads, m, t, gap_eps, gradient);
  gradients_in_units(matrices_out_of_range<float>(t.s), grads, m, t, gap_eps, gradient);
  leave_out_the_unused(grads, t.s, gradient);
  return gradient;
}

}  // namespace
}  // namespace kdkernels::truncated_svd

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("truncated_svd", kdkernels::truncated_svd::truncated_svd_cpu);
  m.impl("truncated_svd_backward", kdkernels::truncated_svd::truncated_svd_backward_cpu);
}
