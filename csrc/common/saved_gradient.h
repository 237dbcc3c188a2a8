// Helpers for the derivatives that are registered in C++: saving tensors for the backward pass, and
// returning a gradient that the forward pass has already computed.
//
// If only one input of a loss requires a gradient, and the forward op has everything that this
// gradient needs, the forward op writes the gradient at once. The backward pass then scales the
// saved gradient by the upstream gradient and returns it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#ifndef AT_PER_OPERATOR_HEADERS
#define AT_PER_OPERATOR_HEADERS  // otherwise the operators + - * / of tensors include the headers of all ops of torch
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

// Whether a tracer or vmap is behind a tensor (torch.compile, export, functorch, batched
// gradients). The graph of such a tensor must not change the tensors that it saved.
inline bool is_traced(const at::Tensor& x) {
  return c10::impl::dispatch_mode_enabled() ||
         x.key_set().has_any(
             c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize, c10::DispatchKey::FuncTorchGradWrapper,
                                  c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched}));
}

inline bool has_tangent(const at::Tensor& x) {
  return x.defined() && x._fw_grad(/*level=*/0).defined();
}

// Raises NotImplementedError if an input has a forward-mode tangent. Only the reference implements
// forward-mode derivatives, and the public functions call it when they need one. An op called
// directly would silently lose the tangent.
template <typename... Tensors>
void check_no_tangent(const char* op, const Tensors&... inputs) {
  TORCH_CHECK_NOT_IMPLEMENTED(!(has_tangent(inputs) || ...), "torch.ops.kdkernels.", op,
                              " has no derivative in forward mode. Call the public function of kdkernels, which has one.");
}

// An empty tensor in place of a result that the caller did not request.
inline at::Tensor empty_result(const at::Tensor& like, std::optional<at::ScalarType> dtype = std::nullopt) {
  return at::empty({0}, like.options().dtype(dtype.value_or(like.scalar_type())));
}

// Whether the backward pass may scale a saved gradient in place and return it. It may not if the
// graph is retained or traced, because the saved gradient is then needed again.
inline bool can_reuse(const at::Tensor& grad, const at::Tensor& grad_loss) {
  return !torch::autograd::get_current_graph_task_keep_graph() && !is_traced(grad) && !is_traced(grad_loss) && !has_tangent(grad_loss);
}

// Whether a saved gradient is stored divided by a scale. Only float16 needs this, because of its
// small range.
inline bool has_scale(const at::Tensor& grad) {
  return grad.scalar_type() == at::kHalf;
}

// grad * scale * grad_loss, multiplied in float32 or float64 and rounded once. The factors must
// broadcast to grad.
inline at::Tensor scaled(const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& grad_loss) {
  const at::ScalarType compute = grad.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor factor = grad_loss.to(compute);
  if (has_scale(grad)) factor = factor * scale;
  return (grad.to(compute) * factor).to(grad.scalar_type());
}

// Saves tensors for the backward pass. autograd's save_for_backward rejects tensors created under
// torch.inference_mode, even if they need no gradient; those are kept in saved_data instead.
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

// Returns the tensors that were passed to save(). While gradients are recorded (double backward),
// inference tensors are returned as copies, because autograd may save them again.
inline torch::autograd::variable_list saved(torch::autograd::AutogradContext* ctx) {
  torch::autograd::variable_list tensors = ctx->get_saved_variables();
  const auto entry = ctx->saved_data.find("made_in_inference_mode");
  if (entry == ctx->saved_data.end()) return tensors;
  const std::vector<at::Tensor> kept = entry->second.toTensorVector();
  const std::vector<int64_t> positions = ctx->saved_data["positions_made_in_inference_mode"].toIntVector();
  for (size_t i = 0; i < kept.size(); ++i) tensors[positions[i]] = at::GradMode::is_enabled() ? kept[i].clone() : kept[i];
  return tensors;
}

}  // namespace kdkernels
