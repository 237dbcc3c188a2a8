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
const char* launch_kernel(const LongRows& p, int ranks, int multiprocessors, void* stream) {
  const auto kernel = long_rows_kernel<T, Threads>;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(Threads);
  config.dynamicSmemBytes = shared_bytes(Threads, p.vectors, ranks);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = ranks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = ranks > 1 ? 1 : 0;
  config.gridDim = dim3(multiprocessors / ranks * ranks);
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.dynamicSmemBytes));
  int clusters = 0;
  if (error == cudaSuccess) {
    if (ranks > 1) {
      error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    } else {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, kernel, Threads, config.dynamicSmemBytes);
      clusters *= multiprocessors;
    }
  }
  if (error == cudaSuccess) {
    clusters = clusters < 1 ? 1 : clusters < p.rows ? clusters : p.rows;
    config.gridDim = dim3(clusters * ranks);
    error = cudaLaunchKernelEx(&config, kernel, p);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_long_rows(const LongRows& p, bool is_float, int threads, int ranks, int multiprocessors, void* stream) {
  if (is_float) {
    return threads == 256 ? launch_kernel<float, 256>(p, ranks, multiprocessors, stream)
                          : launch_kernel<float, 512>(p, ranks, multiprocessors, stream);
  }
  return threads == 256 ? launch_kernel<BFloat16, 256>(p, ranks, multiprocessors, stream)
                        : launch_kernel<BFloat16, 512>(p, ranks, multiprocessors, stream);
}

}  // namespace kdkernels::temperature_kl::gpu
