// The shared memory that the reductions of cluster.h need.
#pragma once

#include <cstdint>

#include "gpu.h"

namespace kdkernels {

// Bytes of each block of a cluster, for values of at most 16 bytes of each warp, in two buffers.
KDKERNELS_HOST_DEVICE int64_t reduction_bytes(int threads, int ranks) {
  return int64_t(2) * ranks * (threads / 32) * 16;
}

}  // namespace kdkernels
