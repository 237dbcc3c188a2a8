// attention_pool and attention_transfer_loss: the schemas of their ops, and their derivatives.
//
// attention_transfer_loss reads the features of a sample once to compute their map, and a second
// time, while they may still be in a cache, to write the gradient. It writes the gradient in the
// forward pass if only the student requires one. See saved_gradient.h.
#include "attention_pool.h"

#include <torch/library.h>

#include "../common/saved_gradient.h"

namespace kdkernels::attention_pool {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using PoolSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, double, int64_t, int64_t, double);
using PoolBackwardSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, int64_t, int64_t,
                                     double);
using LossSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, double, int64_t, int64_t, double, bool);
using LossBackwardSignature = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double, int64_t, int64_t, double,
                                                         std::array<bool, 2>);
using RescaleSignature = void(Tensor&, const Tensor&, const Tensor&);

struct Pool : torch::autograd::Function<Pool> {
  // Outputs without a derivative are returned through `side_outputs`, because compiled autograd
  // does not support functions that mark an output as not differentiable.
  static variable_list forward(AutogradContext* ctx, const Tensor& x, double p, int64_t reduce, int64_t normalize, double eps,
                               std::array<Tensor, 2>* side_outputs) {
    static const auto op = find_op<PoolSignature>("kdkernels::attention_pool");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [maps, norm, channel] = op.call(x, p, reduce, normalize, eps);
    *side_outputs = {norm, channel};
    ctx->set_materialize_grads(false);
    save(ctx, {x, maps, norm, channel});
    auto& data = ctx->saved_data;
    data["p"] = p;
    data["reduce"] = reduce;
    data["normalize"] = normalize;
    data["eps"] = eps;
    return {maps};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find_op<PoolBackwardSignature>("kdkernels::attention_pool_backward");
    variable_list result(6);  // one for each argument of forward
    if (!grads[0].defined()) return result;
    check_no_tangent("attention_pool_backward", grads[0]);
    const auto saved_tensors = saved(ctx);
    auto& data = ctx->saved_data;
    result[0] = op.call(grads[0], saved_tensors[0], saved_tensors[1], saved_tensors[2], saved_tensors[3], data["p"].toDouble(),
                        data["reduce"].toInt(), data["normalize"].toInt(), data["eps"].toDouble());
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> pool_autograd(const Tensor& x, double p, int64_t reduce, int64_t normalize, double eps) {
  check_no_tangent("attention_pool", x);
  if (!at::GradMode::is_enabled() || !x.requires_grad()) {
    static const auto op = find_op<PoolSignature>("kdkernels::attention_pool");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(x, p, reduce, normalize, eps);
  }
  std::array<Tensor, 2> side_outputs;
  const auto out = Pool::apply(x, p, reduce, normalize, eps, &side_outputs);
  return {out[0], side_outputs[0], side_outputs[1]};
}

struct Loss : torch::autograd::Function<Loss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& student, const Tensor& teacher, double p, int64_t variant,
                               int64_t reduce, double eps) {
    static const auto op = find_op<LossSignature>("kdkernels::attention_transfer_loss");
    const bool save_grad = student.requires_grad() && !teacher.requires_grad();
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, grad, scale, teacher_map] = op.call(student, teacher, p, variant, reduce, eps, save_grad);
    ctx->set_materialize_grads(false);
    // Higher derivatives depend on the teacher only through its map, so it is enough to save the
    // map: features of one channel with |f|^p = map replace the teacher's. For p < 1 this is not
    // done, because the root of a map can leave the range of its dtype.
    const bool map_only = save_grad && p >= 1;
    save(ctx, {student, map_only ? teacher_map : teacher, grad, scale});
    auto& data = ctx->saved_data;
    data["p"] = p;
    data["variant"] = variant;
    data["reduce"] = reduce;
    data["eps"] = eps;
    data["save_grad"] = save_grad;
    data["map_only"] = map_only;
    data["needs"] = std::vector<bool>{student.requires_grad(), teacher.requires_grad()};
    return {loss};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto rescale = find_op<RescaleSignature>("kdkernels::attention_transfer_loss_rescale_");
    static const auto recompute = find_op<LossBackwardSignature>("kdkernels::attention_transfer_loss_backward");
    variable_list result(6);  // one for each argument of forward
    const Tensor& grad_loss = grads[0];
    if (!grad_loss.defined()) return result;
    const auto saved_tensors = saved(ctx);
    auto& data = ctx->saved_data;
    if (data["save_grad"].toBool() && !at::GradMode::is_enabled()) {
      Tensor grad = saved_tensors[2];
      if (can_reuse(grad, grad_loss)) {
        rescale.call(grad, saved_tensors[3], grad_loss);
        result[0] = grad;
      } else {
        Tensor scale = saved_tensors[3];
        for (int64_t d = 1; has_scale(grad) && d < grad.dim(); ++d) scale = scale.unsqueeze(-1);
        result[0] = scaled(grad, scale, grad_loss);
      }
      return result;
    }
    check_no_tangent("attention_transfer_loss_backward", grad_loss);
    const auto needs = data["needs"].toBoolList();
    const Tensor teacher = data["map_only"].toBool() ? saved_tensors[1].pow(1 / data["p"].toDouble()).unsqueeze(1) : saved_tensors[1];
    auto [grad_student, grad_teacher] =
        recompute.call(grad_loss, saved_tensors[0], teacher, data["p"].toDouble(), data["variant"].toInt(), data["reduce"].toInt(),
                       data["eps"].toDouble(), std::array<bool, 2>{needs[0], needs[1]});
    if (needs[0]) result[0] = grad_student;
    if (needs[1]) result[1] = grad_teacher;
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> loss_autograd(const Tensor& student, const Tensor& teacher, double p, int64_t variant,
                                                         int64_t reduce, double eps, bool save_grad) {
  check_no_tangent("attention_transfer_loss", student, teacher);
  if (!at::GradMode::is_enabled() || !(student.requires_grad() || teacher.requires_grad())) {
    static const auto op = find_op<LossSignature>("kdkernels::attention_transfer_loss");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(student, teacher, p, variant, reduce, eps, save_grad);
  }
  const auto out = Loss::apply(student, teacher, p, variant, reduce, eps);
  // Only the graph holds the saved gradient, so its backward pass may scale it in place.
  return {out[0], empty_result(student), empty_result(student, at::kFloat), empty_result(student, compute_dtype(student, teacher))};
}

}  // namespace
}  // namespace kdkernels::attention_pool

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // maps is [B, *spatial]; norm is [B], float64, for normalize="l2"; channel is [B, *spatial],
  // int32, for reduce="max". norm and channel are empty for other options.
  m.def("attention_pool(Tensor x, float p, int reduce, int normalize, float eps) -> (Tensor maps, Tensor norm, Tensor channel)");
  m.def(
      "attention_pool_backward(Tensor grad, Tensor x, Tensor maps, Tensor norm, Tensor channel, float p, int reduce, int normalize, "
      "float eps) -> Tensor");
  // With save_grad, which the derivative sets, the op also returns grad_student, scale and the
  // teacher's map before normalisation; otherwise these are empty. dLoss/dStudent = grad_student *
  // scale. If the student is float16, whose range the gradient may leave, scale is [B], float32,
  // with one power of two per sample; for other dtypes it is empty and stands for 1.
  m.def(
      "attention_transfer_loss(Tensor student, Tensor teacher, float p, int variant, int reduce, float eps, bool save_grad) "
      "-> (Tensor loss, Tensor grad_student, Tensor scale, Tensor teacher_map)");
  m.def(
      "attention_transfer_loss_backward(Tensor grad_loss, Tensor student, Tensor teacher, float p, int variant, int reduce, float eps, "
      "bool[2] wanted) -> (Tensor grad_student, Tensor grad_teacher)");
  // grad *= scale * grad_loss, rounded once.
  m.def("attention_transfer_loss_rescale_(Tensor(a!) grad, Tensor scale, Tensor grad_loss) -> ()");
}

TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) {
  m.impl("attention_pool", kdkernels::attention_pool::pool_autograd);
  m.impl("attention_transfer_loss", kdkernels::attention_pool::loss_autograd);
}
