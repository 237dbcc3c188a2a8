// The kernels of align_singular_vectors on CUDA. Their bodies are in cta.h.
#include "cta.h"

namespace kdkernels::align_singular_vectors::gpu {
namespace {

constexpr int kWarps = 4;

template <typename T, bool Backward, typename Problem>
__global__ void __launch_bounds__(32 * kWarps) align_kernel(const __grid_constant__ Problem problem, int64_t tasks) {
  const int64_t task = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (task >= tasks) return;
  Cta<32> warp(nullptr);
  if constexpr (Backward)
    backward<T>(warp, problem, task);
  else
    forward<T>(warp, problem, task);
}

template <bool Backward, typename Problem>
const char* launch(const Problem& problem, bool is_double, int64_t tasks, void* stream) {
  const unsigned blocks = static_cast<unsigned>((tasks + kWarps - 1) / kWarps);
  if (is_double)
    align_kernel<double, Backward><<<blocks, 32 * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(problem, tasks);
  else
    align_kernel<float, Backward><<<blocks, 32 * kWarps, 0, static_cast<cudaStream_t>(stream)>>>(problem, tasks);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_forward(const ForwardProblem& problem, bool is_double, void* stream) {
  return launch<false>(problem, is_double, problem.batch * problem.k, stream);
}
const char* launch_backward(const BackwardProblem& problem, bool is_double, void* stream) {
  return launch<true>(problem, is_double, problem.batch * (problem.student_k + problem.k), stream);
}

}  // namespace kdkernels::align_singular_vectors::gpu
