// temperature_kl: the schemas of its ops, and its derivative.
//
// The forward op has everything that the gradient of the student needs. If only the student
// requires a gradient, the forward op therefore writes the gradient at once and the backward pass
// returns it: three passes over the logits in total (two reads, one write). The derivative is
// registered in C++ because for 128 x 100 logits a derivative in Python takes longer than the
// kernel and the forward and backward passes of eager PyTorch together.
#include "temperature_kl.h"

#include <torch/library.h>

#include "../common/saved_gradient.h"

namespace kdkernels::temperature_kl {
namespace {

using at::Tensor;

using ForwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, double, const OptionalTensor&,
                                                            const OptionalTensor&, const OptionalTensor&, int64_t, int64_t, double, int64_t,
                                                            bool, bool, double, bool);
using BackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double, const OptionalTensor&,
                                                             const OptionalTensor&, const OptionalTensor&, int64_t, int64_t, double,
                                                             int64_t, bool, bool, double, std::array<bool, 3>);
using RescaleSignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t);
using RescaleInPlaceSignature = void(Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, int64_t);

struct TemperatureKl : torch::autograd::Function<TemperatureKl> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& student, const Tensor& teacher,
                                                double temperature, const OptionalTensor& row_temperature, const OptionalTensor& mask,
                                                const OptionalTensor& normalizer, int64_t dim, int64_t direction, double beta,
                                                int64_t reduction, bool scale_by_t2, bool include_entropy, double target_eps) {
    static const auto op = find_op<ForwardSignature>("kdkernels::temperature_kl");
    const bool save_grad = student.requires_grad() && !teacher.requires_grad() && !(row_temperature && row_temperature->requires_grad());
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, grad, row_scale] = op.call(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta,
                                           reduction, scale_by_t2, include_entropy, target_eps, save_grad);
    ctx->set_materialize_grads(false);
    // The teacher enters the student's gradient of KL(p_t || p_s) only through the terms of first
    // order in log p_s, which the saved gradient contains. The teacher's logits therefore need not
    // be saved.
    const bool without_teacher = save_grad && direction == static_cast<int64_t>(Direction::forward) && target_eps == 0;
    save(ctx, {student, without_teacher ? Tensor() : teacher, row_temperature.value_or(Tensor()), mask.value_or(Tensor()),
               normalizer.value_or(Tensor()), grad, row_scale});
    auto& data = ctx->saved_data;
    data["without_teacher"] = without_teacher;
    data["temperature"] = temperature;
    data["dim"] = dim;
    data["direction"] = direction;
    data["beta"] = beta;
    data["reduction"] = reduction;
    data["scale_by_t2"] = scale_by_t2;
    data["include_entropy"] = include_entropy;
    data["target_eps"] = target_eps;
    data["save_grad"] = save_grad;
    data["needs"] =
        std::vector<bool>{student.requires_grad(), teacher.requires_grad(), row_temperature && row_temperature->requires_grad()};
    return {loss};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    static const auto rescale = find_op<RescaleSignature>("kdkernels::temperature_kl_rescale");
    static const auto rescale_in_place = find_op<RescaleInPlaceSignature>("kdkernels::temperature_kl_rescale_");
    static const auto recompute = find_op<BackwardSignature>("kdkernels::temperature_kl_backward");
    torch::autograd::variable_list result(13);  // one for each argument of forward
    const Tensor& grad_loss = grads[0];
    if (!grad_loss.defined()) return result;
    check_no_tangent("temperature_kl_backward", grad_loss);
    const auto saved_tensors = saved(ctx);
    auto& data = ctx->saved_data;
    const int64_t dim = data["dim"].toInt();
    auto optional = [](const Tensor& x) { return x.defined() ? OptionalTensor(x) : std::nullopt; };
    if (data["save_grad"].toBool() && !at::GradMode::is_enabled()) {
      Tensor grad = saved_tensors[5];
      if (can_reuse(grad, grad_loss)) {
        rescale_in_place.call(grad, saved_tensors[6], grad_loss, optional(saved_tensors[3]), dim);
        result[0] = grad;
      } else {
        result[0] = rescale.call(grad, saved_tensors[6], grad_loss, optional(saved_tensors[3]), dim);
      }
      return result;
    }
    const auto needs = data["needs"].toBoolList();
    auto compute_gradients = [&](const Tensor& upstream, const Tensor& teacher) {
      return recompute.call(upstream, saved_tensors[0], teacher, data["temperature"].toDouble(), optional(saved_tensors[2]),
                            optional(saved_tensors[3]), optional(saved_tensors[4]), dim, data["direction"].toInt(), data["beta"].toDouble(),
                            data["reduction"].toInt(), data["scale_by_t2"].toBool(), data["include_entropy"].toBool(),
                            data["target_eps"].toDouble(), std::array<bool, 3>{needs[0], needs[1], needs[2]});
    };
    if (data["without_teacher"].toBool()) {
      // For the derivative of the gradient: with the student itself as the teacher, the gradient is
      // 0 and has the same derivative as with any other teacher. The saved gradient supplies the
      // value.
      const Tensor self_gradient = std::get<0>(compute_gradients(grad_loss, saved_tensors[0].detach()));
      const Tensor factor = grad_loss.dim() > 0 ? grad_loss.unsqueeze(dim) : grad_loss;
      const Tensor scale = has_scale(saved_tensors[5]) ? saved_tensors[6].unsqueeze(dim) : saved_tensors[6];
      const Tensor value = scaled(saved_tensors[5], scale, factor);
      result[0] =
          self_gradient + (saved_tensors[3].defined() ? value.masked_fill(saved_tensors[3].logical_not().unsqueeze(dim), 0) : value);
      return result;
    }
    auto [grad_student, grad_teacher, grad_temperature] = compute_gradients(grad_loss, saved_tensors[1]);
    if (needs[0]) result[0] = grad_student;
    if (needs[1]) result[1] = grad_teacher;
    if (needs[2]) result[3] = grad_temperature;
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> temperature_kl_autograd(const Tensor& student, const Tensor& teacher, double temperature,
                                                           const OptionalTensor& row_temperature, const OptionalTensor& mask,
                                                           const OptionalTensor& normalizer, int64_t dim, int64_t direction, double beta,
                                                           int64_t reduction, bool scale_by_t2, bool include_entropy, double target_eps,
                                                           bool save_grad) {
  check_no_tangent("temperature_kl", student, teacher, row_temperature.value_or(Tensor()));
  const bool needs_grad = student.requires_grad() || teacher.requires_grad() || (row_temperature && row_temperature->requires_grad());
  if (!at::GradMode::is_enabled() || !needs_grad) {
    static const auto op = find_op<ForwardSignature>("kdkernels::temperature_kl");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2,
                   include_entropy, target_eps, save_grad);
  }
  const auto out = TemperatureKl::apply(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction,
                                        scale_by_t2, include_entropy, target_eps);
  // Only the graph holds the saved gradient, so its backward pass may scale it in place.
  return {out[0], empty_result(student), empty_result(student, at::kFloat)};
}

}  // namespace
}  // namespace kdkernels::temperature_kl

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // Tensors with one number per row (row_temperature, mask and the loss of reduction="none") have
  // the shape of the logits without `dim`. With save_grad, which the derivative sets, the second
  // result is dLoss/dStudent; otherwise it is empty. The gradient of float16 logits is grad_student
  // * row_scale, with one power of two per row, because gradients of a mean over a batch are below
  // the range of float16 until a loss scaler multiplies them. For other dtypes row_scale is empty.
  m.def(
      "temperature_kl(Tensor student, Tensor teacher, float temperature, Tensor? row_temperature, Tensor? mask, Tensor? normalizer, int "
      "dim, "
      "int direction, float beta, int reduction, bool scale_by_t2, bool include_entropy, float target_eps, bool save_grad) "
      "-> (Tensor loss, Tensor grad_student, Tensor row_scale)");
  m.def(
      "temperature_kl_backward(Tensor grad_loss, Tensor student, Tensor teacher, float temperature, Tensor? row_temperature, Tensor? mask, "
      "Tensor? normalizer, int dim, int direction, float beta, int reduction, bool scale_by_t2, bool include_entropy, float target_eps, "
      "bool[3] wanted) -> (Tensor grad_student, Tensor grad_teacher, Tensor grad_row_temperature)");
  // grad * row_scale * grad_loss, multiplied in float32 or float64 and rounded once. grad_loss is
  // one number or one number per row; row_scale may be empty. Rows excluded by the mask are 0
  // whatever grad_loss is.
  m.def("temperature_kl_rescale(Tensor grad, Tensor row_scale, Tensor grad_loss, Tensor? mask, int dim) -> Tensor");
  m.def("temperature_kl_rescale_(Tensor(a!) grad, Tensor row_scale, Tensor grad_loss, Tensor? mask, int dim) -> ()");
  // The kernel of long_rows.h, for a part of kdkernels/triton/temperature_kl_fast.py: returns whether
  // it supports the rows; if not, nothing is computed. `strides` are the outer and the inner strides
  // of the rows of teacher, student and grad. `threads` (256 or 512) and `ranks` (1, 2, 4 or 8) choose
  // the launch for tests and measurements.
  m.def(
      "_temperature_kl_long_rows(Tensor teacher, Tensor student, Tensor(a!) grad, int[] strides, int inner_size, int rows, int classes, "
      "float temperature, Tensor? row_temperature, Tensor? mask, float weight, Tensor? weight_factor, Tensor? upstream, int "
      "upstream_stride, bool scale_by_t2, Tensor(b!)? loss, Tensor(c!) state, Tensor(d!) left, int threads=0, int ranks=0) -> bool");
}

TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) {
  m.impl("temperature_kl", kdkernels::temperature_kl::temperature_kl_autograd);
}
