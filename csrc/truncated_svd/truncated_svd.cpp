// truncated_svd: the schemas of its ops, and their derivative.
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
  // The state is no output: compiled autograd cannot take a function that marks one as not differentiable.
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
    const auto kept = saved(ctx);
    auto optional = [](const Tensor& g) { return g.defined() ? std::optional<Tensor>(g) : std::nullopt; };
    result[0] = op.call(optional(grads[0]), optional(grads[1]), optional(grads[2]), kept[0], kept[1], kept[2], kept[3], kept[4],
                        ctx->saved_data["gap_eps"].toDouble(), ctx->saved_data["implementation"].toInt());
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

// Whether the CUDA kernels can take matrices whose smaller side is p where a block may have `limit` bytes of shared memory: the default
// driver of a GPU is chosen by it.
bool fits_cuda(int64_t p, int64_t k, bool wide, int64_t limit) {
  using namespace gpu;
  const int side = static_cast<int>(p), kept = static_cast<int>(k);
  auto has_room = [&](auto type) {
    using T = decltype(type);
    return forward_need<T>(side, kept, limit).shared <= limit && backward_need<T>(side, kept, limit).shared <= limit;
  };
  return p <= kMaxSide && (wide ? has_room(double()) : has_room(float()));
}

}  // namespace
}  // namespace kdkernels::truncated_svd

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // x [..., M, N]; u [..., M, k] if return_u or M < N, else empty; s [..., k]; v [..., N, k]; state: what the backward can use of the
  // forward's work, if save_state, which the derivative sets. An empty state is made again.
  const std::string arguments = "(Tensor x, int k, int sign, bool return_u, float gap_eps, bool save_state";
  const std::string results = ") -> (Tensor u, Tensor s, Tensor v, Tensor state)";
  const std::string of_backward =
      "(Tensor? grad_u, Tensor? grad_s, Tensor? grad_v, Tensor x, Tensor u, Tensor s, Tensor v, Tensor state, float gap_eps";
  // implementation: see csrc/check.h.
  m.def(("truncated_svd" + arguments + ", int implementation=0" + results).c_str());
  m.def(("truncated_svd_backward" + of_backward + ", int implementation=0) -> Tensor").c_str());
  for (const std::string implementation : {"cuda", "triton", "torch"}) {
    m.def(("truncated_svd_" + implementation + arguments + results).c_str());
    m.def(("truncated_svd_backward_" + implementation + of_backward + ") -> Tensor").c_str());
  }
  // Several batches of matrices at once. A gradient that is not there is a tensor of another number of dimensions.
  const std::string group = "(Tensor[] x, int k, int sign, bool return_u, float[] gap_eps, bool save_state";
  const std::string group_results = ") -> (Tensor[] u, Tensor[] s, Tensor[] v, Tensor[] state)";
  const std::string group_backward =
      "(Tensor[] grad_u, Tensor[] grad_s, Tensor[] grad_v, Tensor[] x, Tensor[] u, Tensor[] s, Tensor[] v, Tensor[] state, float[] gap_eps";
  m.def(("truncated_svd_group" + group + ", int implementation" + group_results).c_str());
  m.def(("truncated_svd_group_backward" + group_backward + ", int implementation) -> Tensor[]").c_str());
  m.def(("truncated_svd_group_cuda" + group + group_results).c_str());
  m.def(("truncated_svd_group_backward_cuda" + group_backward + ") -> Tensor[]").c_str());
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
