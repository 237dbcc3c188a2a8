// align_singular_vectors: the schemas of its ops, and the autograd function.
#include <torch/library.h>

#include "../common/check.h"
#include "../common/implementations.h"
#include "../common/saved_gradient.h"

namespace kdkernels::align_singular_vectors {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using WithImplementation = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const std::optional<Tensor>&, bool,
                                                                      int64_t);
using BackwardWithImplementation = std::tuple<Tensor, Tensor, Tensor>(const std::optional<Tensor>&, const std::optional<Tensor>&,
                                                                      const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                                                      const Tensor&, const Tensor&, bool, std::array<bool, 3>, int64_t);

std::optional<Tensor> optional(const Tensor& t) {
  return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
}
bool needs_grad(const std::optional<Tensor>& t) {
  return t && t->defined() && t->requires_grad();
}

// The outputs are the results that have a derivative. The other results are returned through a
// pointer, because compiled autograd does not support functions that mark an output as not
// differentiable.
struct Align : torch::autograd::Function<Align> {
  static variable_list forward(AutogradContext* ctx, const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                               bool flip_teacher, int64_t implementation, std::array<Tensor, 4>* all) {
    static const auto op = find_op<WithImplementation>("kdkernels::align_singular_vectors");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [s, t, match, flips] = op.call(student, teacher, weight, flip_teacher, implementation);
    *all = {s, t, match, flips};
    variable_list outputs;
    if (student.requires_grad() || needs_grad(weight)) outputs.push_back(s);
    if (teacher.requires_grad() || needs_grad(weight)) outputs.push_back(t);
    ctx->set_materialize_grads(false);
    // Tensors that were created in inference mode cannot be saved, so they are copied.
    auto savable = [](const Tensor& x) { return x.defined() && x.is_inference() ? x.clone() : x; };
    ctx->save_for_backward({savable(student), savable(teacher), savable(weight.value_or(Tensor())), match, flips});
    ctx->saved_data["flip_teacher"] = flip_teacher;
    ctx->saved_data["implementation"] = implementation;
    ctx->saved_data["needs"] = std::vector<bool>{student.requires_grad(), teacher.requires_grad(), needs_grad(weight)};
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto op = find_op<BackwardWithImplementation>("kdkernels::align_singular_vectors_backward");
    variable_list result(6);  // one for each argument of forward
    const auto needs = ctx->saved_data["needs"].toBoolList();
    const Tensor grad_s = needs[0] || needs[2] ? grads.front() : Tensor(), grad_t = needs[1] || needs[2] ? grads.back() : Tensor();
    if (!grad_s.defined() && !grad_t.defined()) return result;
    for (const Tensor& grad : grads) check_no_tangent("align_singular_vectors_backward", grad);
    const auto tensors = saved(ctx);
    auto [s, t, w] = op.call(optional(grad_s), optional(grad_t), tensors[0], tensors[1], optional(tensors[2]), tensors[3], tensors[4],
                             ctx->saved_data["flip_teacher"].toBool(), std::array<bool, 3>{needs[0], needs[1], needs[2]},
                             ctx->saved_data["implementation"].toInt());
    if (needs[0]) result[0] = s;
    if (needs[1]) result[1] = t;
    if (needs[2]) result[2] = w;
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> autograd(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                    bool flip_teacher, int64_t implementation) {
  check_no_tangent("align_singular_vectors", student, teacher, weight.value_or(Tensor()));
  const bool any_needs_grad = student.requires_grad() || teacher.requires_grad() || needs_grad(weight);
  if (!at::GradMode::is_enabled() || !any_needs_grad) {
    static const auto op = find_op<WithImplementation>("kdkernels::align_singular_vectors");
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(student, teacher, weight, flip_teacher, implementation);
  }
  std::array<Tensor, 4> all;
  const auto out = Align::apply(student, teacher, weight, flip_teacher, implementation, &all);
  if (student.requires_grad() || needs_grad(weight)) all[0] = out.front();
  if (teacher.requires_grad() || needs_grad(weight)) all[1] = out.back();
  return {all[0], all[1], all[2], all[3]};
}

}  // namespace
}  // namespace kdkernels::align_singular_vectors

TORCH_LIBRARY_FRAGMENT(kdkernels, m) {
  // match [..., k], int64: the index of the student's vector for each of the teacher's vectors;
  // flips [..., k]: 1 or -1.
  const std::string arguments = "(Tensor student, Tensor teacher, Tensor? weight, bool flip_teacher";
  const std::string results = ") -> (Tensor aligned_student, Tensor aligned_teacher, Tensor match, Tensor flips)";
  const std::string backward_arguments =
      "(Tensor? grad_student, Tensor? grad_teacher, Tensor student, Tensor teacher, Tensor? weight, Tensor match, Tensor flips, "
      "bool flip_teacher, bool[3] wanted";
  // implementation: see csrc/common/implementations.h.
  m.def(("align_singular_vectors" + arguments + ", int implementation=0" + results).c_str());
  m.def(("align_singular_vectors_backward" + backward_arguments + ", int implementation=0) -> (Tensor, Tensor, Tensor)").c_str());
  for (const std::string implementation : {"cuda", "triton", "torch"}) {
    m.def(("align_singular_vectors_" + implementation + arguments + results).c_str());
    m.def(("align_singular_vectors_backward_" + implementation + backward_arguments + ") -> (Tensor, Tensor, Tensor)").c_str());
  }
}

TORCH_LIBRARY_IMPL(kdkernels, CompositeExplicitAutograd, m) {
  for (const char* op : {"align_singular_vectors_cuda", "align_singular_vectors_backward_cuda"})
    m.impl(op, kdkernels::without_cuda_kernels());
}

TORCH_LIBRARY_IMPL(kdkernels, Autograd, m) {
  m.impl("align_singular_vectors", kdkernels::align_singular_vectors::autograd);
}
