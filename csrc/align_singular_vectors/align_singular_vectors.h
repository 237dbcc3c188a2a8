// align_singular_vectors: the signatures and checks that all implementations share.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "../common/check.h"
#include "../common/vectors.h"
#include "problem.h"

namespace kdkernels::align_singular_vectors {

// Signatures of the ops align_singular_vectors_<implementation> and of their backward ops, see
// common/implementations.h.
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
      "student and teacher must have shapes [..., N, K] and [..., N, k], got ", student.sizes(), " and ", teacher.sizes());
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
  TORCH_CHECK_VALUE(weight || !wanted[2], "wanted[2] asks for the gradient of weight, but weight is None");
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
  const bool is_double = in_double(student, teacher);
  TORCH_CHECK_TYPE(match.scalar_type() == at::kLong && flips.scalar_type() == (is_double ? at::kDouble : at::kFloat),
                   "match must be int64 and flips ", is_double ? at::kDouble : at::kFloat, ", got ", match.scalar_type(), " and ",
                   flips.scalar_type());
}

// For CPU tensors. On a GPU this check would have to wait for the device; there the kernels read no
// vector whose index is out of range.
inline void check_match(const at::Tensor& match, int64_t student_k) {
  const at::Tensor index = match.contiguous();
  for (int64_t i = 0; i < index.numel(); ++i) {
    const int64_t j = index.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(j >= 0 && j < student_k, "match must lie in [0, ", student_k, "), got ", j);
  }
}

}  // namespace kdkernels::align_singular_vectors
