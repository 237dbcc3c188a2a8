// rbf_correlation and rbf_correlation_loss: the schemas of their ops, and their derivatives.
//
// The inputs of the loss are small compared with the computation, and the gradients need
// intermediate results of the loss. The forward op therefore writes the gradients of all inputs
// that require one, and the backward pass scales them. See saved_gradient.h.
#include "rbf_correlation.h"

#include <torch/library.h>

#include "../common/saved_gradient.h"

namespace kdkernels::rbf_correlation {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Signature = Tensor(const Tensor&, const Tensor&, double);
using BackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double);
using LossSignature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
                                                                         int64_t, std::array<bool, 4>);
using LossBackwardSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                                         const Tensor&, double, int64_t, std::array<bool, 4>);
using RescaleSignature = void(Tensor&, const Tensor&);

struct Correlation : torch::autograd::Function<Correlation> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, double beta) {
    static const auto op = find_op<Signature>("kdkernels::rbf_correlation");
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    save(ctx, {x, y});
    ctx->saved_data["beta"] = beta;
    return {op.call(x, y, beta)};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find_op<BackwardSignature>("kdkernels::rbf_correlation_backward");
    variable_list result(3);  // one for each argument of forward
    if (!grads[0].defined()) return result;
    check_no_tangent("rbf_correlation_backward", grads[0]);
    const auto saved_tensors = saved(ctx);
    auto [grad_x, grad_y] = op.call(grads[0], saved_tensors[0], saved_tensors[1], ctx->saved_data["beta"].toDouble());
    if (ctx->needs_input_grad(0)) result[0] = grad_x;
    if (ctx->needs_input_grad(1)) result[1] = grad_y;
    return result;
  }
};

Tensor correlation_autograd(const Tensor& x, const Tensor& y, double beta) {
  check_no_tangent("rbf_correlation", x, y);
  if (!at::GradMode::is_enabled() || !(x.requires_grad() || y.requires_grad())) {
    static const auto op = find_op<Signature>("kdkernels::rbf_correlation");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, y, beta);
  }
  return Correlation::apply(x, y, beta)[0];
}

struct Loss : torch::autograd::Function<Loss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& sx, const Tensor& sy, const Tensor& tx, const Tensor& ty, double beta,
                               int64_t reduction) {
    static const auto op = find_op<LossSignature>("kdkernels::rbf_correlation_loss");
    const std::array<bool, 4> needs{sx.requires_grad(), sy.requires_grad(), tx.requires_grad(), ty.requires_grad()};
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, grad_sx, grad_sy, grad_tx, grad_ty] = op.call(sx, sy, tx, ty, beta, reduction, needs);
    ctx->set_materialize_grads(false);
    save(ctx, {sx, sy, tx, ty, grad_sx, grad_sy, grad_tx, grad_ty});
    auto& data = ctx->saved_data;
    data["beta"] = beta;
    data["reduction"] = reduction;
    data["needs"] = std::vector<bool>(needs.begin(), needs.end());
    return {loss};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto rescale = find_op<RescaleSignature>("kdkernels::rbf_correlation_loss_rescale_");
    static const auto recompute = find_op<LossBackwardSignature>("kdkernels::rbf_correlation_loss_backward");
    variable_list result(6);  // one for each argument of forward
    const Tensor& grad_loss = grads[0];
    if (!grad_loss.defined()) return result;
    const auto saved_tensors = saved(ctx);
    auto& data = ctx->saved_data;
    const auto flags = data["needs"].toBoolList();
    const std::array<bool, 4> needs{flags[0], flags[1], flags[2], flags[3]};
    if (at::GradMode::is_enabled() || has_tangent(grad_loss)) {
      check_no_tangent("rbf_correlation_loss_backward", grad_loss);
      auto [grad_sx, grad_sy, grad_tx, grad_ty] =
          recompute.call(grad_loss, saved_tensors[0], saved_tensors[1], saved_tensors[2], saved_tensors[3], data["beta"].toDouble(),
                         data["reduction"].toInt(), needs);
      const Tensor recomputed[] = {grad_sx, grad_sy, grad_tx, grad_ty};
      for (int i = 0; i < 4; ++i)
        if (needs[i]) result[i] = recomputed[i];
      return result;
    }
    for (int i = 0; i < 4; ++i) {
      if (!needs[i]) continue;
      Tensor grad = saved_tensors[4 + i];
      if (can_reuse(grad, grad_loss)) {
        rescale.call(grad, grad_loss);
      } else {
        const Tensor factor = grad_loss.dim() > 0 ? grad_loss.unsqueeze(1).unsqueeze(2) : grad_loss;
        grad = grad * factor;
        if (grad_loss.dim() > 0) grad = grad.masked_fill(factor.eq(0), 0);  // an excluded sample, see rbf_correlation_loss_rescale_cpu
      }
      result[i] = grad.to(saved_tensors[i].scalar_type());
    }
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> loss_autograd(const Tensor& sx, const Tensor& sy, const Tensor& tx, const Tensor& ty,
                                                                 double beta, int64_t reduction, std::array<bool, 4> wanted) {
  check_no_tangent("rbf_correlation_loss", sx, sy, tx, ty);
  if (!at::GradMode::is_enabled() || !(sx.requires_grad() || sy.requires_grad() || tx.requires_grad() || ty.requires_grad())) {
    static const auto op = find_op<LossSignature>("kdkernels::rbf_correlation_loss");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(sx, sy, tx, ty, beta, reduction, wanted);
  }
  const auto out = Loss::apply(sx, sy, tx, ty, beta, reduction);
  // Only the graph holds the saved gradients, so its backward pass may scale them in place.
  const at::ScalarType dtype = out[0].scalar_type();
  return {out[0], empty_result(sx, dtype), empty_result(sx, dtype), empty_result(sx, dtype), empty_result(sx, dtype)};
}

}  // namespace
}  // namespace kdkernels::rbf_correlation

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  m.def("rbf_correlation(Tensor x, Tensor y, float beta) -> Tensor");
  m.def("rbf_correlation_backward(Tensor grad, Tensor x, Tensor y, float beta) -> (Tensor grad_x, Tensor grad_y)");
  // Returns the gradients selected by `wanted`, which the derivative sets, in the dtype of the
  // loss. The other gradients are empty.
  m.def(
      "rbf_correlation_loss(Tensor sx, Tensor sy, Tensor tx, Tensor ty, float beta, int reduction, bool[4] wanted) "
      "-> (Tensor loss, Tensor grad_sx, Tensor grad_sy, Tensor grad_tx, Tensor grad_ty)");
  m.def(
      "rbf_correlation_loss_backward(Tensor grad_loss, Tensor sx, Tensor sy, Tensor tx, Tensor ty, float beta, int reduction, "
      "bool[4] wanted) -> (Tensor grad_sx, Tensor grad_sy, Tensor grad_tx, Tensor grad_ty)");
  m.def("rbf_correlation_loss_rescale_(Tensor(a!) grad, Tensor grad_loss) -> ()");
}

TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) {
  m.impl("rbf_correlation", kdkernels::rbf_correlation::correlation_autograd);
  m.impl("rbf_correlation_loss", kdkernels::rbf_correlation::loss_autograd);
}
