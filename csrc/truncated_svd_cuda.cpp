// The implementation "cuda" on CUDA tensors: the device, its current stream, its shared memory.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "truncated_svd_cta/torch.h"

namespace kdkernels::truncated_svd::gpu {
namespace {

// Makes x's device current, and knows what a kernel on it is launched with.
struct OnDevice {
  explicit OnDevice(const Tensor& x) : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream(x.device().index()).stream()) {
    int bytes = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.device().index());
    TORCH_CHECK(error == cudaSuccess, "truncated_svd: ", cudaGetErrorString(error));
    limit = bytes;
  }
  Runner runner() const { return {limit, stream}; }
  c10::cuda::CUDAGuard guard;
  void* stream;
  int64_t limit;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& x, int64_t k, int64_t sign, bool return_u, double, bool save_state) {
  const OnDevice on(x);
  return decompose(x, k, sign, return_u, save_state, on.runner());
}

Tensor backward_cuda(const std::optional<Tensor>& grad_u, const std::optional<Tensor>& grad_s, const std::optional<Tensor>& grad_v,
                     const Tensor& x, const Tensor& u, const Tensor& s, const Tensor& v, const Tensor& state, double gap_eps) {
  const OnDevice on(x);
  return decompose_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, on.runner());
}

const Tensor& first_of(at::TensorList x) {
  TORCH_CHECK_VALUE(!x.empty(), "x must name at least one batch of matrices");
  for (const Tensor& other : x) check_device(other, "every x", x[0].device());
  return x[0];
}

Lists group_cuda(at::TensorList x, int64_t k, int64_t sign, bool return_u, at::ArrayRef<double>, bool save_state) {
  const OnDevice on(first_of(x));
  return decompose_group(x, k, sign, return_u, save_state, on.runner());
}

std::vector<Tensor> group_backward_cuda(at::TensorList grad_u, at::TensorList grad_s, at::TensorList grad_v, at::TensorList x,
                                        at::TensorList u, at::TensorList s, at::TensorList v, at::TensorList state,
                                        at::ArrayRef<double> gap_eps) {
  const OnDevice on(first_of(x));
  return decompose_group_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, on.runner());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> align_cuda(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                      bool flip_teacher) {
  const OnDevice on(student);
  return align_singular_vectors::gpu::align(student, teacher, weight, flip_teacher, on.stream);
}

std::tuple<Tensor, Tensor, Tensor> align_backward_cuda(const std::optional<Tensor>& grad_student, const std::optional<Tensor>& grad_teacher,
                                                       const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
                                                       const Tensor& match, const Tensor& flips, bool flip_teacher,
                                                       std::array<bool, 3> wanted) {
  const OnDevice on(student);
  return align_singular_vectors::gpu::align_backward(grad_student, grad_teacher, student, teacher, weight, match, flips, flip_teacher,
                                                     wanted, on.stream);
}

}  // namespace
}  // namespace kdkernels::truncated_svd::gpu

TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("truncated_svd_cuda", kdkernels::truncated_svd::gpu::forward_cuda);
  m.impl("truncated_svd_backward_cuda", kdkernels::truncated_svd::gpu::backward_cuda);
  m.impl("truncated_svd_group_cuda", kdkernels::truncated_svd::gpu::group_cuda);
  m.impl("truncated_svd_group_backward_cuda", kdkernels::truncated_svd::gpu::group_backward_cuda);
  m.impl("align_singular_vectors_cuda", kdkernels::truncated_svd::gpu::align_cuda);
  m.impl("align_singular_vectors_backward_cuda", kdkernels::truncated_svd::gpu::align_backward_cuda);
}
