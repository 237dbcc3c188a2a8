// The implementation "cuda" of align_singular_vectors on CUDA tensors.
#include <torch/library.h>

#include "../common/cuda_device.h"
#include "cuda_problems.h"

namespace kdkernels::align_singular_vectors::gpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> align_cuda(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                      bool flip_teacher) {
  const OnDevice device(student);
  return align(student, teacher, weight, flip_teacher, device.stream);
}

std::tuple<Tensor, Tensor, Tensor> align_backward_cuda(const std::optional<Tensor>& grad_student, const std::optional<Tensor>& grad_teacher,
                                                       const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                       const Tensor& match, const Tensor& flips, bool flip_teacher,
                                                       std::array<bool, 3> wanted) {
  const OnDevice device(student);
  return align_backward(grad_student, grad_teacher, student, teacher, weight, match, flips, flip_teacher, wanted, device.stream);
}

}  // namespace
}  // namespace kdkernels::align_singular_vectors::gpu

TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("align_singular_vectors_cuda", kdkernels::align_singular_vectors::gpu::align_cuda);
  m.impl("align_singular_vectors_backward_cuda", kdkernels::align_singular_vectors::gpu::align_backward_cuda);
}
