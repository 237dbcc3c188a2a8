// Converts tensors to the arguments of the CUDA kernels. Used by cuda.cpp, which runs the kernels
// on a GPU, and by csrc/testing/truncated_svd_host.cpp, which runs them on the CPU.
#pragma once

#include "../truncated_svd/cuda_problems.h"
#include "align_singular_vectors.h"

namespace kdkernels::align_singular_vectors::gpu {

using at::Tensor;
using truncated_svd::gpu::check_launched;
using truncated_svd::gpu::pointer;

inline std::tuple<Tensor, Tensor, Tensor, Tensor> align(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                        bool flip_teacher, void* stream) {
  check(student, teacher, weight);
  const at::ScalarType dtype = in_double(student, teacher) ? at::kDouble : at::kFloat;
  const Tensor s = vectors_first(student, dtype), t = vectors_first(teacher, dtype), w = weight ? weight->to(dtype).contiguous() : Tensor();
  const int64_t student_k = s.size(1), k = t.size(1), n = t.size(2);
  const auto options = student.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  const Tensor out_s = at::empty(batched(teacher, {k, n}), options), out_t = at::empty(batched(teacher, {k, n}), options);
  const Tensor match = at::empty(batched(teacher, {k}), options.dtype(at::kLong)), flips = at::empty(batched(teacher, {k}), options);
  const ForwardProblem problem{t.size(0),
                               static_cast<int>(student_k),
                               static_cast<int>(k),
                               static_cast<int>(n),
                               flip_teacher,
                               pointer(s),
                               pointer(t),
                               pointer(w),
                               out_s.mutable_data_ptr(),
                               out_t.mutable_data_ptr(),
                               flips.mutable_data_ptr(),
                               match.mutable_data_ptr<int64_t>()};
  if (match.numel() > 0) check_launched(launch_forward(problem, dtype == at::kDouble, stream));
  return {out_s.transpose(-1, -2), out_t.transpose(-1, -2), match, flips};
}

inline std::tuple<Tensor, Tensor, Tensor> align_backward(const std::optional<Tensor>& grad_student,
                                                         const std::optional<Tensor>& grad_teacher, const Tensor& student,
                                                         const Tensor& teacher, const std::optional<Tensor>& weight, const Tensor& match,
                                                         const Tensor& flips, bool flip_teacher, std::array<bool, 3> wanted, void* stream) {
  check_backward(grad_student, grad_teacher, student, teacher, weight, match, flips, wanted);
  const at::ScalarType dtype = in_double(student, teacher) ? at::kDouble : at::kFloat;
  const int64_t student_k = student.size(-1), k = teacher.size(-1), n = teacher.size(-2), batch = match.numel() / k;
  auto rows_of = [&](const std::optional<Tensor>& g) { return g && g->defined() ? vectors_first(*g, dtype) : Tensor(); };
  const Tensor gs = rows_of(grad_student), gt = rows_of(grad_teacher), w = weight ? weight->to(dtype).contiguous() : Tensor();
  const Tensor s = wanted[2] ? vectors_first(student, dtype) : Tensor(), t = wanted[2] ? vectors_first(teacher, dtype) : Tensor();
  const auto options = student.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous);
  auto empty_if = [&](bool want, at::IntArrayRef shape) { return want ? at::empty(shape, options) : Tensor(); };
  const Tensor result_s = empty_if(wanted[0], {batch, student_k, n}), result_t = empty_if(wanted[1], {batch, k, n}),
               result_w = empty_if(wanted[2], {batch, k});
  auto writable = [](const Tensor& r) { return r.defined() ? r.mutable_data_ptr() : nullptr; };
  const Tensor index = match.contiguous(), signs = flips.contiguous();
  const BackwardProblem problem{batch,
                                static_cast<int>(student_k),
                                static_cast<int>(k),
                                static_cast<int>(n),
                                flip_teacher,
                                pointer(gs),
                                pointer(gt),
                                pointer(s),
                                pointer(t),
                                pointer(w),
                                pointer(signs),
                                index.const_data_ptr<int64_t>(),
                                writable(result_s),
                                writable(result_t),
                                writable(result_w)};
  if (batch > 0) check_launched(launch_backward(problem, dtype == at::kDouble, stream));
  const Tensor none = at::empty({0}, student.options().memory_format(at::MemoryFormat::Contiguous));
  auto with_layout_of = [&](const Tensor& rows, const Tensor& x) {
    return at::empty_like(x).copy_(rows.view(batched(x, {x.size(-1), x.size(-2)})).transpose(-1, -2));
  };
  return {wanted[0] ? with_layout_of(result_s, student) : none, wanted[1] ? with_layout_of(result_t, teacher) : none,
          wanted[2] ? at::empty_like(*weight).copy_(result_w.view(weight->sizes())) : none};
}

}  // namespace kdkernels::align_singular_vectors::gpu
