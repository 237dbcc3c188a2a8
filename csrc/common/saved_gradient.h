// What the derivatives registered in C++ share: how they save tensors, and how a loss hands on a gradient that its forward has written.
//
// A loss whose forward op has all in hand that the gradient of one input needs writes that gradient at once, where only that input asks for
// one. Its backward scales the saved gradient by the upstream gradient and gives it away.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#ifndef AT_PER_OPERATOR_HEADERS
#define AT_PER_OPERATOR_HEADERS  // without it the operators + - * / of tensors bring every op of torch with them
#endif
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

namespace kdkernels {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// A tensor that a tracer or vmap stands behind (torch.compile, export, functorch, batched gradients): its graph must not mutate what it
// saved.
inline bool is_traced(const at::Tensor& x) {
  return c10::impl::dispatch_mode_enabled() ||
         x.key_set().has_any(
             c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchGradWrapper,
                                  c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}

inline bool has_tangent(const at::Tensor& x) {
  return x.defined() && x._fw_grad(/*level=*/0).defined();
}

// A derivative in forward mode exists in the reference only, which the public functions call. An op that is called past them says so: its
// tangent would be lost.
template <typename... Tensors>
void check_no_tangent(const char* op, const Tensors&... inputs) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(inputs) || ...), "torch.ops.kdkernels.", op,
                              " has no derivative in forward mode. Call the public function of kdkernels, which has one.");
}

// The result of an op that its caller did not ask for.
inline at::Tensor nothing(const at::Tensor& like, std::optional<at::ScalarType> dtype = std::nullopt) {
  return at::empty({0}, like.options().dtype(dtype.value_or(like.scalar_type())));
}

// Whether a saved gradient may be changed and given away: not where the graph is kept or traced, which needs it again.
inline bool may_give_away(const at::Tensor& grad, const at::Tensor& grad_loss) {
  return !torch::autograd::get_current_graph_task_keep_graph() && !is_traced(grad) && !is_traced(grad_loss) && !has_tangent(grad_loss);
}

// Whether a saved gradient comes with a scale, by which it was divided: float16 alone has too small a range.
inline bool has_scale(const at::Tensor& grad) {
  return grad.scalar_type() == at::kHalf;
}

// grad * scale * grad_loss, multiplied in float or double and rounded once. The factors must broadcast to grad.
inline at::Tensor scaled(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& grad_loss) {
  const at::ScalarType compute = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor factor = grad_loss.to(compute);
  if (has_scale(grad)) factor = factor * scale;
  return (grad.to(compute) * factor).to(grad.scalar_type());
}

// Saves tensors for the backward. autograd refuses those that were made under torch.inference_mode, whether or not they need a gradient;
// they are kept beside the others.
inline void save(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list tensors) {
  std::vector<int64_t> positions;
  std::vector<at::Tensor> kept;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!tensors[i].defined() || !tensors[i].is_inference()) continue;
    positions.push_back(static_cast<int64_t>(i));
    kept.push_back(std::move(tensors[i]));
    tensors[i] = at::Tensor();
  }
  if (!kept.empty()) {
    ctx->saved_data["positions_made_in_inference_mode"] = std::move(positions);
    ctx->saved_data["made_in_inference_mode"] = std::move(kept);
  }
  ctx->save_for_backward(std::move(tensors));
}

// What save() was given, unpacked once. In a graph of the derivative the backward saves them itself, which takes copies.
inline torch::autograd::variable_list saved(torch::autograd::AutogradContext* ctx) {
  torch::autograd::variable_list tensors = ctx->get_saved_variables();
  const auto found = ctx->saved_data.find("made_in_inference_mode");
  if (found == ctx->saved_data.end()) return tensors;
  const std::vector<at::Tensor> kept = found->second.toTensorVector();
  const std::vector<int64_t> positions = ctx->saved_data["positions_made_in_inference_mode"].toIntVector();
  for (size_t i = 0; i < kept.size(); ++i) tensors[positions[i]] = at::GradMode::is_enabled() ? kept[i].clone() : kept[i];
  return tensors;
}

}  // namespace kdkernels
