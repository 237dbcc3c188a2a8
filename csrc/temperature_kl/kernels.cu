// The kernel of temperature_kl on CUDA. Its body is in long_rows.h.
#include "launch.h"
#include "long_rows.h"

namespace kdkernels::temperature_kl::gpu {
namespace {

template <typename T, int Threads>
__global__ void __launch_bounds__(Threads) long_rows_kernel(const __grid_constant__ LongRows p) {
  extern __shared__ __align__(16) char shared[];
  Cluster<Threads> cluster(shared);
  LongRowsBody<T, Threads>(cluster, p).run(blockIdx.x / cluster.ranks(), gridDim.x / cluster.ranks());
}

template <typename T, int Threads>
const char* launch_kernel(const LongRows& p, int ranks, const LaunchLimits& limits, bool* launched) {
  const auto kernel = long_rows_kernel<T, Threads>;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(Threads);
  config.dynamicSmemBytes = shared_bytes(Threads, p.vectors, ranks);
  config.stream = static_cast<cudaStream_t>(limits.stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = ranks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = ranks > 1 ? 1 : 0;
  config.gridDim = dim3(ranks);
  // The same limit in every call, because other threads may launch the kernel with other sizes.
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limits.shared_memory));
  int clusters = 0;
  if (error == cudaSuccess) {
    if (ranks > 1) {
      error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    } else {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, kernel, Threads, config.dynamicSmemBytes);
      clusters *= limits.multiprocessors;
    }
  }
  if (error == cudaSuccess && clusters > 0) {
    config.gridDim = dim3((clusters < p.rows ? clusters : p.rows) * ranks);
    error = cudaLaunchKernelEx(&config, kernel, p);
    *launched = error == cudaSuccess;
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // so that no other call reports this error
  return cudaGetErrorString(error);
}

}  // namespace

const char* launch_long_rows(const LongRows& p, bool is_float, int threads, int ranks, const LaunchLimits& limits, bool* launched) {
  *launched = false;
  if (is_float)
    return threads == 256 ? launch_kernel<float, 256>(p, ranks, limits, launched) : launch_kernel<float, 512>(p, ranks, limits, launched);
  return threads == 256 ? launch_kernel<BFloat16, 256>(p, ranks, limits, launched)
                        : launch_kernel<BFloat16, 512>(p, ranks, limits, launched);
}

}  // namespace kdkernels::temperature_kl::gpu
