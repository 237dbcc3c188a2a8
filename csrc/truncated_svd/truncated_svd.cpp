// truncated_svd: the schemas of its ops, and the autograd function.
#include "truncated_svd.h"

#include <torch/library.h>

#include "../common/implementations.h"
#include "../common/saved_gradient.h"
#include "cta/plan.h"

namespace kdkernels::truncated_svd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using WithImplementation = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, int64_t, int64_t, bool, double, bool, int64_t);
using BackwardWithImplementation = Tensor(const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&,
                                          const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, int64_t);

struct TruncatedSVD : torch::autograd::Function<TruncatedSVD> {
  // The state is returned through a pointer and not as an output, because compiled autograd does
  // not support functions that mark an output as not differentiable.
  static variable_list forward(AutogradContext* ctx, const Tensor& x, int64_t k, int64_t sign, bool return_u, double gap_eps,
                               int64_t implementation, Tensor* state_out) {
    static const auto op = find_op<WithImplementation>("kdkernels::truncated_svd");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [u, s, v, state] = op.call(x, k, sign, return_u, gap_eps, true, implementation);
    ctx->set_materialize_grads(false);
    save(ctx, {x, u, s, v, state});
    *state_out = state;
    ctx->saved_data["gap_eps"] = gap_eps;
    ctx->saved_data["implementation"] = implementation;
    return {u, s, v};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find_op<BackwardWithImplementation>("kdkernels::truncated_svd_backward");
    variable_list result(7);  // one for each argument of forward
    if (!grads[0].defined() && !grads[1].defined() && !grads[2].defined()) return result;
    for (const Tensor& grad : grads) check_no_tangent("truncated_svd_backward", grad);
    const auto tensors = saved(ctx);
    auto optional = [](const Tensor& g) { return g.defined() ? std::optional<Tensor>(g) : std::nullopt; };
    result[0] = op.call(optional(grads[0]), optional(grads[1]), optional(grads[2]), tensors[0], tensors[1], tensors[2], tensors[3],
                        tensors[4], ctx->saved_data["gap_eps"].toDouble(), ctx->saved_data["implementation"].toInt());
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> autograd(const Tensor& x, int64_t k, int64_t sign, bool return_u, double gap_eps,
                                                    bool save_state, int64_t implementation) {
  check_no_tangent("truncated_svd", x);
  if (!at::GradMode::is_enabled() || !x.requires_grad()) {
    static const auto op = find_op<WithImplementation>("kdkernels::truncated_svd");
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(x, k, sign, return_u, gap_eps, save_state, implementation);
  }
  Tensor state;
  const auto out = TruncatedSVD::apply(x, k, sign, return_u, gap_eps, implementation, &state);
  return {out[0], out[1], out[2], state};
}

// Whether the CUDA kernels can process matrices whose smaller side is p on a GPU where a block may
// have `limit` bytes of shared memory. This decides whether "cuda" is the default implementation on
// a GPU.
bool fits_cuda(int64_t p, int64_t k, bool is_double, int64_t limit) {
  using namespace gpu;
  const int side = static_cast<int>(p), vectors = static_cast<int>(k);
  auto fits = [&](auto type) {
    using T = decltype(type);
    return forward_memory<T>(side, vectors, limit).shared <= limit && backward_memory<T>(side, vectors, limit).shared <= limit;
  };
  return p <= kMaxSide && (is_double ? fits(double()) : fits(float()));
}

}  // namespace
}  // namespace kdkernels::truncated_svd

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // x [..., M, N]; u [..., M, k] if return_u or M < N, else empty; s [..., k]; v [..., N, k];
  // state: results of the forward pass that the backward pass can use, if save_state, which the
  // derivative sets. The backward pass recomputes an empty state.
  const std::string arguments = "(Tensor x, int k, int sign, bool return_u, float gap_eps, bool save_state";
  const std::string results = ") -> (Tensor u, Tensor s, Tensor v, Tensor state)";
  const std::string backward_arguments =
      "(Tensor? grad_u, Tensor? grad_s, Tensor? grad_v, Tensor x, Tensor u, Tensor s, Tensor v, Tensor state, float gap_eps";
  // implementation: see csrc/common/implementations.h.
  m.def(("truncated_svd" + arguments + ", int implementation=0" + results).c_str());
  m.def(("truncated_svd_backward" + backward_arguments + ", int implementation=0) -> Tensor").c_str());
  for (const std::string implementation : {"cuda", "triton", "torch"}) {
    m.def(("truncated_svd_" + implementation + arguments + results).c_str());
    m.def(("truncated_svd_backward_" + implementation + backward_arguments + ") -> Tensor").c_str());
  }
  // Several batches of matrices in one call. An upstream gradient that is missing is passed as a
  // tensor with a different number of dimensions.
  const std::string group_arguments = "(Tensor[] x, int k, int sign, bool return_u, float[] gap_eps, bool save_state";
  const std::string group_results = ") -> (Tensor[] u, Tensor[] s, Tensor[] v, Tensor[] state)";
  const std::string group_backward_arguments =
      "(Tensor[] grad_u, Tensor[] grad_s, Tensor[] grad_v, Tensor[] x, Tensor[] u, Tensor[] s, Tensor[] v, Tensor[] state, float[] gap_eps";
  m.def(("truncated_svd_group" + group_arguments + ", int implementation" + group_results).c_str());
  m.def(("truncated_svd_group_backward" + group_backward_arguments + ", int implementation) -> Tensor[]").c_str());
  m.def(("truncated_svd_group_cuda" + group_arguments + group_results).c_str());
  m.def(("truncated_svd_group_backward_cuda" + group_backward_arguments + ") -> Tensor[]").c_str());
  m.def("_truncated_svd_fits_cuda(int p, int k, bool wide, int shared_memory) -> bool", kdkernels::truncated_svd::fits_cuda);
}

TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  for (const char* op :
       {"truncated_svd_cuda", "truncated_svd_backward_cuda", "truncated_svd_group_cuda", "truncated_svd_group_backward_cuda"})
    m.impl(op, kdkernels::without_cuda_kernels());
}

TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) {
  m.impl("truncated_svd", kdkernels::truncated_svd::autograd);
}
