// The problem that the kernel of long_rows.h solves, and how it is launched for rows of a length.
#pragma once

#include <cstdint>

#include "../common/cluster_memory.h"

namespace kdkernels::temperature_kl::gpu {

// Row i of a tensor starts at i / inner_size * outer + i % inner_size * inner, in bytes.
struct RowStrides {
  int64_t outer, inner;
};

struct LongRows {
  const char *teacher, *student;
  char* grad;
  RowStrides teacher_strides, student_strides, grad_strides;
  int inner_size, rows;
  int classes;
  int vectors;        // of 16 bytes, that a block has of a row, at most
  float temperature;  // of all rows, unless row_temperature is given
  float weight;       // of a row in the loss
  bool scale_by_t2;
  const float* row_temperature;  // [rows], or null
  const bool* mask;              // [rows], or null
  const float* weight_factor;    // [], or null
  const float* upstream;         // [rows] or [], or null: the gradient of the loss
  int upstream_stride;           // 1 or 0
  float* loss;                   // [rows], or null
  int32_t* state;                // [rows]: kComputed or kLeft
  int32_t* left;                 // [], zero: the number of rows that are left
};

// As _COMPUTED and LEFT in temperature_kl_fast.py.
constexpr int32_t kComputed = 1, kLeft = 2;

constexpr int kMostRanks = 8;  // blocks of a cluster that every GPU with clusters supports

// Vectors of a row that a block has, if the cluster has `ranks` blocks.
inline int vectors_of_block(int64_t classes, int64_t element_size, int ranks) {
  const int64_t size = 16 / element_size, most = (classes + 2 * size - 2) / size;
  return static_cast<int>((most + ranks - 1) / ranks);
}

// Vectors of each network for which a block has memory.
KDKERNELS_HOST_DEVICE int64_t slots(int vectors, int threads) {
  return (int64_t(vectors) + threads - 1) / threads * threads;
}

inline int64_t shared_bytes(int threads, int vectors, int ranks) {
  return reduction_bytes(threads, ranks) + 2 * slots(vectors, threads) * 16;
}

struct LongRowsPlan {
  int threads, ranks;  // of a block, blocks of a cluster; 0 if no cluster has enough shared memory for a row
};

// The fastest that was measured on an H100 for rows of 64 to 513 KB: two or more blocks share a
// multiprocessor, so that one computes while another waits, unless the row fits in a single block,
// which needs no barrier between multiprocessors.
inline LongRowsPlan plan(int64_t classes, int64_t element_size, int64_t shared_limit) {
  auto fits = [&](int threads, int ranks, int64_t limit) {
    return shared_bytes(threads, vectors_of_block(classes, element_size, ranks), ranks) <= limit;
  };
  if (fits(256, 1, shared_limit / 2)) return {256, 1};
  if (fits(512, 1, shared_limit)) return {512, 1};
  for (int ranks = 2; ranks <= kMostRanks; ranks *= 2)
    if (fits(256, ranks, shared_limit / 2)) return {256, ranks};
  return fits(256, kMostRanks, shared_limit) ? LongRowsPlan{256, kMostRanks} : LongRowsPlan{0, 0};
}

}  // namespace kdkernels::temperature_kl::gpu
