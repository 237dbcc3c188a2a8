// The implementation "cuda" of truncated_svd on CUDA tensors.
#include <torch/library.h>

#include "../common/cuda_device.h"
#include "cuda_problems.h"

namespace kdkernels::truncated_svd::gpu {
namespace {

LaunchOptions launch_options(const OnDevice& device) {
  return {device.shared_memory, device.stream};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& x, int64_t k, int64_t sign, bool return_u, double, bool save_state) {
  const OnDevice device(x);
  return decompose(x, k, sign, return_u, save_state, launch_options(device));
}

Tensor backward_cuda(const std::optional<Tensor>& grad_u, const std::optional<Tensor>& grad_s, const std::optional<Tensor>& grad_v,
                     const Tensor& x, const Tensor& u, const Tensor& s, const Tensor& v, const Tensor& state, double gap_eps) {
  const OnDevice device(x);
  return decompose_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, launch_options(device));
}

const Tensor& first_of(at::TensorList x) {
  TORCH_CHECK_VALUE(!x.empty(), "x must contain at least one batch of matrices, got an empty list");
  for (const Tensor& other : x) check_device(other, "every x", x[0].device());
  return x[0];
}

Lists group_cuda(at::TensorList x, int64_t k, int64_t sign, bool return_u, at::ArrayRef<double>, bool save_state) {
  const OnDevice device(first_of(x));
  return decompose_group(x, k, sign, return_u, save_state, launch_options(device));
}

std::vector<Tensor> group_backward_cuda(at::TensorList grad_u, at::TensorList grad_s, at::TensorList grad_v, at::TensorList x,
                                        at::TensorList u, at::TensorList s, at::TensorList v, at::TensorList state,
                                        at::ArrayRef<double> gap_eps) {
  const OnDevice device(first_of(x));
  return decompose_group_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, launch_options(device));
}

}  // namespace
}  // namespace kdkernels::truncated_svd::gpu

TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("truncated_svd_cuda", kdkernels::truncated_svd::gpu::forward_cuda);
  m.impl("truncated_svd_backward_cuda", kdkernels::truncated_svd::gpu::backward_cuda);
  m.impl("truncated_svd_group_cuda", kdkernels::truncated_svd::gpu::group_cuda);
  m.impl("truncated_svd_group_backward_cuda", kdkernels::truncated_svd::gpu::group_backward_cuda);
}
