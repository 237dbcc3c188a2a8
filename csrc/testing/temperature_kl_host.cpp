// The CUDA kernel of temperature_kl on CPU tensors, for tests: the Cluster of host_cluster.h runs the
// body of the kernel.
#include <torch/library.h>

#include "../temperature_kl/long_rows.h"
#include "../temperature_kl/long_rows_call.h"

namespace kdkernels::temperature_kl::gpu {
namespace {

template <typename T, int Threads>
void run(const LongRows& p, int ranks, int clusters) {
  for (int i = 0; i < clusters; ++i) {
    Cluster<Threads> cluster(ranks, shared_bytes(Threads, p.vectors, ranks), static_cast<uint64_t>(i));
    LongRowsBody<T, Threads>(cluster, p).run(i, clusters);
    cluster.check();
  }
}

struct HostDevice {
  explicit HostDevice(const at::Tensor&) {}
  int64_t shared_memory = 227 << 10;
  int multiprocessors = 3;  // so that a cluster has several rows
  bool has_clusters = true;
  void* stream = nullptr;
};

}  // namespace

const char* launch_long_rows(const LongRows& p, bool is_float, int threads, int ranks, const LaunchLimits& limits, bool* launched) {
  const int clusters = std::min(p.rows, limits.multiprocessors);
  if (is_float)
    threads == 256 ? run<float, 256>(p, ranks, clusters) : run<float, 512>(p, ranks, clusters);
  else
    threads == 256 ? run<BFloat16, 256>(p, ranks, clusters) : run<BFloat16, 512>(p, ranks, clusters);
  *launched = true;
  return nullptr;
}

}  // namespace kdkernels::temperature_kl::gpu

TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  using namespace kdkernels::temperature_kl::gpu;
  m.impl("_temperature_kl_long_rows", long_rows<HostDevice>);
}
