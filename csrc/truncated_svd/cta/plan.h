// How the work on a matrix is laid out: threads, shared memory and workspace. The host, which
// launches the kernels, and the kernels themselves use the same functions.
#pragma once

#include "problem.h"

namespace kdkernels::truncated_svd::gpu {

// Tiles of M in shared memory: one is used while the others are loaded. `update` depends on the
// bandwidth of the memory more than the other kernels, and loads more tiles at the same time.
constexpr int kTilesInFlight = 3, kUpdateTilesInFlight = 4;
constexpr int kScratch = 512;     // bytes for reductions
constexpr int kMaxParts = 8;      // the most threads that share a row of a matrix-vector product
constexpr int kResolventRow = 7;  // doubles per row of a complex elimination
constexpr int kInverseRow = 5;    // doubles per row of a real elimination
constexpr int kMaxThreads = 512;  // per block

KDKERNELS_HOST_DEVICE int64_t aligned(int64_t bytes) {
  return (bytes + 15) / 16 * 16;
}
// The number of columns of M in a tile, and the distance between them in shared memory. Four
// numbers are read at once, and neighbouring columns start in different banks.
KDKERNELS_HOST_DEVICE int tile_columns(int p) {
  return p <= 32 ? 16 : p <= 64 ? 32 : p <= 128 ? 16 : p <= 256 ? 8 : 4;
}
KDKERNELS_HOST_DEVICE int tile_stride(int p) {
  return (p + 31) / 32 * 32 + 4;
}
KDKERNELS_HOST_DEVICE int matrix_stride(int p) {
  return p | 1;
}

// Sizes in bytes. `tiles` and `eigen` are never needed at the same time and share memory, unless
// eigen is in the workspace.
struct Plan {
  int64_t fixed, vectors, tiles, eigen, matrix;
  bool vectors_shared, matrix_shared;

  KDKERNELS_HOST_DEVICE int64_t shared() const {
    const int64_t phase = vectors_shared && eigen > tiles ? eigen : tiles;
    return kScratch + fixed + phase + (vectors_shared ? vectors : 0) + (matrix_shared ? matrix : 0);
  }
  KDKERNELS_HOST_DEVICE int64_t workspace() const { return (vectors_shared ? 0 : vectors + eigen) + (matrix_shared ? 0 : matrix); }
};

// limit: bytes of shared memory. If a matrix does not fit at all, the plan has shared() > limit.
KDKERNELS_HOST_DEVICE Plan plan_for(int p, int k, int size, int rows, int vectors, int64_t limit) {
  const int at_once = k < kVectorsAtOnce ? k : kVectorsAtOnce;
  Plan plan{};
  plan.fixed =
      aligned(int64_t(size) * (4 * p + tile_columns(p) * k)) + aligned(8 * 6 * int64_t(k)) + aligned(4 * int64_t(kMaxThreads + 2 * k));
  plan.vectors = aligned(int64_t(size) * vectors * k * tile_stride(p)) + aligned(8 * 3 * int64_t(k) * k * (vectors > 1));
  plan.tiles = aligned(int64_t(size) * kTilesInFlight * tile_columns(p) * tile_stride(p));
  const int64_t parts = aligned(int64_t(size) * kMaxParts * matrix_stride(p));
  const int64_t elimination = aligned(8 * (int64_t(k) * p + int64_t(rows) * p * at_once));
  plan.eigen = parts > elimination ? parts : elimination;
  plan.matrix = aligned(int64_t(size) * p * matrix_stride(p));
  plan.vectors_shared = plan.matrix_shared = true;
  if (plan.shared() > limit) plan.matrix_shared = false;
  if (plan.shared() > limit) plan.vectors_shared = false;
  return plan;
}

// `vectors` is 1 in the forward pass, which stores a, and 3 in the backward pass, which stores a, z
// and M gb.
template <typename T>
KDKERNELS_HOST_DEVICE Plan forward_plan(int p, int k, int64_t limit) {
  return plan_for(p, k, sizeof(T), kInverseRow, 1, limit);
}
template <typename T>
KDKERNELS_HOST_DEVICE Plan backward_plan(int p, int k, int64_t limit) {
  return plan_for(p, k, sizeof(T), kResolventRow, 3, limit);
}

// Matrices that share a block, if each of them has one warp.
constexpr int kWarpMatricesPerBlock = 4;

// The number of threads per matrix: one warp for the smallest matrices, and more threads for
// matrices with more rows. All float64 matrices have the same number, because they are rare.
KDKERNELS_HOST_DEVICE int threads_for(int p, int size) {
  return size == 8 ? 256 : p <= 32 ? 32 : p <= 128 ? 256 : 512;
}
KDKERNELS_HOST_DEVICE int matrices_per_block(int threads) {
  return threads == 32 ? kWarpMatricesPerBlock : 1;
}
// The shared memory that a matrix may have, in bytes.
KDKERNELS_HOST_DEVICE int64_t limit_per_matrix(int p, int size, int64_t block_limit) {
  return block_limit / matrices_per_block(threads_for(p, size)) / 16 * 16;
}

constexpr int kUpdateThreads = 256, kUpdateVectors = 4;
// The distance between w and y of neighbouring columns, of which 16 bytes are read at once, without
// conflicts between banks.
KDKERNELS_HOST_DEVICE int update_row(int size) {
  return 2 * kUpdateVectors + 16 / size;
}
// The most coefficients of y that are kept in shared memory.
constexpr int kUpdateFactors = 2 * kUpdateVectors + kUpdateVectors * kUpdateVectors;
constexpr int kUpdateTiles = 8, kUpdateColumns = 512;  // the most tiles and columns of a block of `update`

// The number of columns in a tile of `update`, and the distance between them. A tile has about
// 8 KiB, so that the tiles in flight of two blocks fill the memory system of a GPU, and two blocks
// share a multiprocessor. Neighbouring columns start in different banks.
KDKERNELS_HOST_DEVICE int update_tile_columns(int p, int size) {
  const int columns = p <= 16 ? 128 : p <= 32 ? 64 : p <= 64 ? 32 : p <= 128 ? 16 : p <= 256 ? 8 : 4;
  return size == 8 ? columns / 2 : columns;
}
KDKERNELS_HOST_DEVICE int update_tile_stride(int p) {
  return (p + 15) / 16 * 16 + 4;
}
// The number of columns that a block of `update` processes, and the shared memory of the block:
// tiles, vectors, partial products, w and y; sums if the k vectors need several passes, and otherwise
// gb, b and the coefficients.
KDKERNELS_HOST_DEVICE int update_columns(int p, int size) {
  const int columns = kUpdateTiles * update_tile_columns(p, size);
  return columns < kUpdateColumns ? columns : kUpdateColumns;
}
template <typename T>
KDKERNELS_HOST_DEVICE int64_t update_shared(int p, int k, bool has_gb = true) {
  const int columns = update_tile_columns(p, sizeof(T));
  const int64_t tile = int64_t(columns) * update_tile_stride(p);
  return kScratch + aligned(int64_t(sizeof(T)) * kUpdateTilesInFlight * tile) +
         aligned(int64_t(sizeof(T)) * 2 * kUpdateVectors * update_tile_stride(p)) +
         aligned(int64_t(sizeof(T)) * (2 * kUpdateVectors * kUpdateThreads + update_row(sizeof(T)) * columns)) +
         (k > kUpdateVectors ? aligned(int64_t(sizeof(T)) * tile)
                             : aligned(int64_t(sizeof(T)) * kUpdateTilesInFlight * 2 * kUpdateVectors * columns * has_gb) +
                                   aligned(int64_t(sizeof(T)) * kUpdateFactors));
}

KDKERNELS_HOST_DEVICE int64_t update_blocks(const BackwardProblem& problem) {
  const int columns = update_columns(problem.p, problem.x.storage == Storage::float64 ? 8 : 4);
  return problem.batch * ((problem.q + columns - 1) / columns);
}
// The memory that a matrix needs, in bytes: shared memory of its block, and workspace.
struct MemoryNeed {
  int64_t shared, workspace;
};
template <typename T>
MemoryNeed forward_memory(int p, int k, int64_t limit) {
  const Plan plan = forward_plan<T>(p, k, limit_per_matrix(p, sizeof(T), limit));
  return {plan.shared() * matrices_per_block(threads_for(p, sizeof(T))), plan.workspace()};
}
template <typename T>
MemoryNeed backward_memory(int p, int k, int64_t limit) {
  const Plan plan = backward_plan<T>(p, k, limit_per_matrix(p, sizeof(T), limit));
  const int64_t solve = plan.shared() * matrices_per_block(threads_for(p, sizeof(T))), update = update_shared<T>(p, k);
  return {solve > update ? solve : update, plan.workspace()};
}

}  // namespace kdkernels::truncated_svd::gpu
