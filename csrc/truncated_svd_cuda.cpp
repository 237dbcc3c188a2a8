// driver="cuda" on CUDA tensors: the device, its current stream, its shared memory.
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
  c10::cuda::CUDAGuard guard;
  void* stream;
  int64_t limit;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& x, int64_t k, c10::string_view sign, bool return_u, double,
                                                        bool save_state) {
  const OnDevice on(x);
  return decompose(x, k, sign, return_u, save_state, on.limit, on.stream);
}

Tensor backward_cuda(const std::optional<Tensor>& grad_u, const std::optional<Tensor>& grad_s, const std::optional<Tensor>& grad_v,
                     const Tensor& x, const Tensor& u, const Tensor& s, const Tensor& v, const Tensor& state, double gap_eps) {
  const OnDevice on(x);
  return decompose_backward(grad_u, grad_s, grad_v, x, u, s, v, state, gap_eps, on.limit, on.stream);
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
  m.impl("align_singular_vectors_cuda", kdkernels::truncated_svd::gpu::align_cuda);
  m.impl("align_singular_vectors_backward_cuda", kdkernels::truncated_svd::gpu::align_backward_cuda);
}
