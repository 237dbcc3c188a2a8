// For losses whose forward op has all in hand that the gradient of one input needs, and writes it at once where only that input asks for
// one: the backward then hands it on.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

namespace kdkernels {

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// A tensor that a tracer stands behind (torch.compile, export, functorch): its graph must not mutate what it saved.
inline bool is_traced(const at::Tensor& x) {
  return c10::impl::dispatch_mode_enabled() ||
         x.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize,
                                                  c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::FuncTorchBatched}));
}

// Whether a saved gradient may be changed and given away: not where the graph is kept or traced, which needs it again.
inline bool may_give_away(const at::Tensor& grad, const at::Tensor& grad_loss) {
  return !torch::autograd::get_current_graph_task_keep_graph() && !is_traced(grad) && !is_traced(grad_loss);
}

}  // namespace kdkernels
