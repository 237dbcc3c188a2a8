// The kernels of truncated_svd on CUDA. Their bodies are in cta/.
#include "cta/blocks.h"

namespace kdkernels::truncated_svd::gpu {
namespace {

constexpr int block_size(int threads) {
  return threads * matrices_per_block(threads);
}

template <typename T, int Threads>
__global__ void __launch_bounds__(block_size(Threads), 1)
    forward_kernel(const __grid_constant__ Group<ForwardProblem> group, int64_t limit) {
  extern __shared__ __align__(16) char shared[];
  const int slot = threadIdx.x / Threads;
  Cta<Threads> cta(shared + slot * limit);
  forward_block<T>(cta, group, blockIdx.x, slot, shared, limit);
}

template <typename T, int Threads>
__global__ void __launch_bounds__(block_size(Threads), 1)
    solve_kernel(const __grid_constant__ Group<BackwardProblem> group, int64_t limit) {
  extern __shared__ __align__(16) char shared[];
  const int slot = threadIdx.x / Threads;
  Cta<Threads> cta(shared + slot * limit);
  solve_block<T>(cta, group, blockIdx.x, slot, shared, limit);
}

template <typename T>
__global__ void __launch_bounds__(kUpdateThreads, 2) update_kernel(const __grid_constant__ Group<BackwardProblem> group) {
  extern __shared__ __align__(16) char shared[];
  Cta<kUpdateThreads> cta(shared);
  update_block<T>(cta, group, blockIdx.x, shared);
}

// `limit` is the shared memory that a block can use. It is the same in every call, because other
// threads may launch the kernel with other sizes.
template <typename Kernel, typename... Arguments>
const char* launch(Kernel kernel, int64_t blocks, int threads, int64_t shared, int64_t limit, void* stream, Arguments... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit));
  if (error == cudaSuccess) kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t last = cudaGetLastError();
  if (error == cudaSuccess) error = last;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_forward(const ForwardProblem* problems, int count, int64_t limit, void* stream) {
  return for_each_forward_group(problems, count, limit,
                                [&](const Group<ForwardProblem>& group, auto t, auto threads, int64_t blocks, int64_t matrix_limit) {
                                  return launch(forward_kernel<decltype(t), decltype(threads)::value>, blocks, block_size(threads),
                                                matrix_limit * matrices_per_block(threads), limit, stream, group, matrix_limit);
                                });
}

const char* launch_backward(const BackwardProblem* problems, int count, int64_t limit, void* stream) {
  const char* error = for_each_solve_group(
      problems, count, limit, [&](const Group<BackwardProblem>& group, auto t, auto threads, int64_t blocks, int64_t matrix_limit) {
        return launch(solve_kernel<decltype(t), decltype(threads)::value>, blocks, block_size(threads),
                      matrix_limit * matrices_per_block(threads), limit, stream, group, matrix_limit);
      });
  if (error) return error;
  return for_each_update_group(problems, count, [&](const Group<BackwardProblem>& group, auto t, int64_t blocks, int64_t shared) {
    return launch(update_kernel<decltype(t)>, blocks, kUpdateThreads, shared, limit, stream, group);
  });
}

}  // namespace kdkernels::truncated_svd::gpu
