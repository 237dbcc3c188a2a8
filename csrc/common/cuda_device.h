// The GPU that a tensor is on, and what a kernel launch on it needs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace kdkernels {

// Makes the device of x current while it exists. Holds the device's current stream and the largest
// amount of shared memory that a block can use, in bytes.
struct OnDevice {
  explicit OnDevice(const at::Tensor& x) : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream(x.device().index()).stream()) {
    shared_memory = attribute(x, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  }
  static int attribute(const at::Tensor& x, cudaDeviceAttr which) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, which, x.device().index());
    TORCH_CHECK(error == cudaSuccess, "cannot query an attribute of ", x.device(), ": ", cudaGetErrorString(error));
    return value;
  }
  c10::cuda::CUDAGuard guard;
  void* stream;
  int64_t shared_memory;
};

}  // namespace kdkernels
