// align_singular_vectors: the signatures and checks that every backend shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "check.h"
#include "vectors.h"

namespace kdkernels::align_singular_vectors {

// The drivers' ops, see driver_op.
using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                                             const std::optional<at::Tensor>&, bool);
using BackwardSignature = std::tuple<at::Tensor, at::Tensor, at::Tensor>(const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                                                                         const at::Tensor&, const at::Tensor&,
                                                                         const std::optional<at::Tensor>&, const at::Tensor&,
                                                                         const at::Tensor&, bool, std::array<bool, 3>);

inline bool in_double(const at::Tensor& student, const at::Tensor& teacher) {
  return student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble;
}

inline void check(const at::Tensor& student, const at::Tensor& teacher, const std::optional<at::Tensor>& weight) {
  check_floating(student, "student");
  check_floating(teacher, "teacher");
  check_device(teacher, "teacher", student.device());
  TORCH_CHECK_VALUE(
      teacher.dim() >= 2 && teacher.size(-1) > 0 && teacher.size(-2) > 0 && student.dim() == teacher.dim() && student.size(-1) > 0,
      "student and teacher must be [..., N, K] and [..., N, k], got ", student.sizes(), " and ", teacher.sizes());
  check_shape(student, "student", batched(teacher, {teacher.size(-2), student.size(-1)}));
  if (weight) check_shape(*weight, "weight", batched(teacher, {teacher.size(-1)}));
}

inline void check_backward(const std::optional<at::Tensor>& grad_student, const std::optional<at::Tensor>& grad_teacher,
                           const at::Tensor& student, const at::Tensor& teacher, const std::optional<at::Tensor>& weight,
                           const at::Tensor& match, const at::Tensor& flips, std::array<bool, 3> wanted) {
  check(student, teacher, weight);
  TORCH_CHECK_VALUE(weight || !wanted[2], "weight is not there to have a gradient");
  for (const auto* grad : {&grad_student, &grad_teacher})
    if (*grad && (*grad)->defined()) check_shape(**grad, "grad", teacher.sizes());
  check_shape(match, "match", batched(teacher, {teacher.size(-1)}));
  check_shape(flips, "flips", batched(teacher, {teacher.size(-1)}));
  const bool wide = in_double(student, teacher);
  TORCH_CHECK_TYPE(match.scalar_type() == at::kLong && flips.scalar_type() == (wide ? at::kDouble : at::kFloat),
                   "match must be int64 and flips of the computing type");
}

}  // namespace kdkernels::align_singular_vectors
