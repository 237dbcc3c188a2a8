// The kernels of truncated_svd on CUDA. Their bodies are in cta/.
#include "cta/blocks.h"

namespace kdkernels::truncated_svd::gpu {
namespace {

constexpr int block_size(int threads) {
  return threads * matrices_together(threads);
}

template <typename T, int Threads>
__global__ void __launch_bounds__(block_size(Threads), 1)
    forward_kernel(const __grid_constant__ Group<ForwardProblem> group, int64_t limit) {
  extern __shared__ __align__(16) char shared[];
  const int part = threadIdx.x / Threads;
  Cta<Threads> cta(shared + part * limit);
  forward_block<T>(cta, group, blockIdx.x, part, shared, limit);
}

template <typename T, int Threads>
__global__ void __launch_bounds__(block_size(Threads), 1)
    solve_kernel(const __grid_constant__ Group<BackwardProblem> group, int64_t limit) {
  extern __shared__ __align__(16) char shared[];
  const int part = threadIdx.x / Threads;
  Cta<Threads> cta(shared + part * limit);
  solve_block<T>(cta, group, blockIdx.x, part, shared, limit);
}

template <typename T>
__global__ void __launch_bounds__(kUpdateThreads, 2) update_kernel(const __grid_constant__ Group<BackwardProblem> group) {
  extern __shared__ __align__(16) char shared[];
  Cta<kUpdateThreads> cta(shared);
  update_block<T>(cta, group, blockIdx.x, shared);
}

template <typename Kernel, typename... Arguments>
const char* launch(Kernel kernel, int64_t blocks, int threads, int64_t shared, void* stream, Arguments... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_forward(const ForwardProblem* problems, int count, int64_t limit, void* stream) {
  return in_forward_groups(problems, count, limit,
                           [&](const Group<ForwardProblem>& group, auto t, auto threads, int64_t blocks, int64_t own) {
                             return launch(forward_kernel<decltype(t), decltype(threads)::value>, blocks, block_size(threads),
                                           own * matrices_together(threads), stream, group, own);
                           });
}

const char* launch_backward(const BackwardProblem* problems, int count, int64_t limit, void* stream) {
  const char* error =
      in_solve_groups(problems, count, limit, [&](const Group<BackwardProblem>& group, auto t, auto threads, int64_t blocks, int64_t own) {
        return launch(solve_kernel<decltype(t), decltype(threads)::value>, blocks, block_size(threads), own * matrices_together(threads),
                      stream, group, own);
      });
  if (error) return error;
  return in_update_groups(problems, count, [&](const Group<BackwardProblem>& group, auto t, int64_t blocks, int64_t shared) {
    return launch(update_kernel<decltype(t)>, blocks, kUpdateThreads, shared, stream, group);
  });
}

}  // namespace kdkernels::truncated_svd::gpu
