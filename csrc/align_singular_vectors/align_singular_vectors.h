// align_singular_vectors: the signatures and checks that every backend shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "../common/check.h"
#include "../common/vectors.h"
#include "problem.h"

namespace kdkernels::align_singular_vectors {

// The ops of implementations, see common/implementations.h.
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
  check_type(student, "student");
  check_type(teacher, "teacher");
  check_device(teacher, "teacher", student.device());
  TORCH_CHECK_VALUE(
      teacher.dim() >= 2 && teacher.size(-1) > 0 && teacher.size(-2) > 0 && student.dim() == teacher.dim() && student.size(-1) > 0,
      "student and teacher must be [..., N, K] and [..., N, k], got ", student.sizes(), " and ", teacher.sizes());
  check_shape(student, "student", batched(teacher, {teacher.size(-2), student.size(-1)}));
  if (!weight) return;
  check_type(*weight, "weight");
  check_device(*weight, "weight", student.device());
  check_shape(*weight, "weight", batched(teacher, {teacher.size(-1)}));
}

inline void check_backward(const std::optional<at::Tensor>& grad_student, const std::optional<at::Tensor>& grad_teacher,
                           const at::Tensor& student, const at::Tensor& teacher, const std::optional<at::Tensor>& weight,
                           const at::Tensor& match, const at::Tensor& flips, std::array<bool, 3> wanted) {
  check(student, teacher, weight);
  TORCH_CHECK_VALUE(weight || !wanted[2], "weight is not there to have a gradient");
  for (const auto* grad : {&grad_student, &grad_teacher}) {
    if (!*grad || !(*grad)->defined()) continue;
    check_type(**grad, "grad");
    check_device(**grad, "grad", student.device());
    check_shape(**grad, "grad", teacher.sizes());
  }
  check_device(match, "match", student.device());
  check_device(flips, "flips", student.device());
  check_shape(match, "match", batched(teacher, {teacher.size(-1)}));
  check_shape(flips, "flips", batched(teacher, {teacher.size(-1)}));
  const bool wide = in_double(student, teacher);
  TORCH_CHECK_TYPE(match.scalar_type() == at::kLong && flips.scalar_type() == (wide ? at::kDouble : at::kFloat),
                   "match must be int64 and flips of the computing type");
}

// Of tensors on the CPU; on a GPU nothing waits for the device, and kernels take nothing of a vector that is not there.
inline void check_match(const at::Tensor& match, int64_t many) {
  const at::Tensor index = match.contiguous();
  for (int64_t i = 0; i < index.numel(); ++i) {
    const int64_t j = index.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(j >= 0 && j < many, "match must lie in [0, ", many, "), got ", j);
  }
}

}  // namespace kdkernels::align_singular_vectors
