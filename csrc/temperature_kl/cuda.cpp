// The CUDA kernel of temperature_kl on CUDA tensors.
#include <torch/library.h>

#include "../common/cuda_device.h"
#include "long_rows_call.h"

namespace {

struct Device : kdkernels::OnDevice {
  explicit Device(const at::Tensor& x)
      : OnDevice(x),
        multiprocessors(attribute(x, cudaDevAttrMultiProcessorCount)),
        has_clusters(attribute(x, cudaDevAttrComputeCapabilityMajor) >= 9) {}
  int multiprocessors;
  bool has_clusters;
};

}  // namespace

TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("_temperature_kl_long_rows", kdkernels::temperature_kl::gpu::long_rows<Device>);
}
