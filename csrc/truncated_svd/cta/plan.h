// How the kernels' work is laid out: threads, shared memory and workspace of a matrix, the same for who launches and who runs.
#pragma once

#include "problem.h"

namespace kdkernels::truncated_svd::gpu {

constexpr int kStages = 3;         // of tiles that are under way
constexpr int kScratch = 512;      // bytes for reductions
constexpr int kParts = 8;          // threads that share a row of a matrix-vector product
constexpr int kResolventRow = 7;   // doubles of a row's elimination, complex
constexpr int kInverseRow = 5;     // the same, real
constexpr int kMostThreads = 512;  // of a block

KDKERNELS_BOTH int64_t aligned(int64_t bytes) {
  return (bytes + 15) / 16 * 16;
}
// Columns of M in a tile, and how far they are apart: four numbers are read at once, and neighbours lie in other banks.
KDKERNELS_BOTH int tile_columns(int p) {
  return p <= 32 ? 16 : p <= 64 ? 32 : p <= 128 ? 16 : p <= 256 ? 8 : 4;
}
KDKERNELS_BOTH int tile_stride(int p) {
  return (p + 31) / 32 * 32 + 4;
}
KDKERNELS_BOTH int matrix_stride(int p) {
  return p | 1;
}

// Sizes in bytes. `tiles` and `eigen` are never needed together and share their place, unless eigen goes to the workspace.
struct Plan {
  int64_t fixed, vectors, tiles, eigen, matrix;
  bool vectors_shared, matrix_shared;

  KDKERNELS_BOTH int64_t shared() const {
    const int64_t phase = vectors_shared && eigen > tiles ? eigen : tiles;
    return kScratch + fixed + phase + (vectors_shared ? vectors : 0) + (matrix_shared ? matrix : 0);
  }
  KDKERNELS_BOTH int64_t workspace() const { return (vectors_shared ? 0 : vectors + eigen) + (matrix_shared ? 0 : matrix); }
};

// limit: bytes of shared memory. The plan of a matrix that has no room at all has shared() > limit.
KDKERNELS_BOTH Plan plan_for(int p, int k, int size, int rows, int vectors, int64_t limit) {
  const int together = k < kTogether ? k : kTogether;
  Plan plan{};
  plan.fixed =
      aligned(int64_t(size) * (4 * p + tile_columns(p) * k)) + aligned(8 * 6 * int64_t(k)) + aligned(4 * int64_t(kMostThreads + 2 * k));
  plan.vectors = aligned(int64_t(size) * vectors * k * tile_stride(p)) + aligned(8 * 3 * int64_t(k) * k * (vectors > 1));
  plan.tiles = aligned(int64_t(size) * kStages * tile_columns(p) * tile_stride(p));
  const int64_t parts = aligned(int64_t(size) * kParts * matrix_stride(p));
  const int64_t rest = aligned(8 * (int64_t(k) * p + int64_t(rows) * p * together));
  plan.eigen = parts > rest ? parts : rest;
  plan.matrix = aligned(int64_t(size) * p * matrix_stride(p));
  plan.vectors_shared = plan.matrix_shared = true;
  if (plan.shared() > limit) plan.matrix_shared = false;
  if (plan.shared() > limit) plan.vectors_shared = false;
  return plan;
}

// The forward keeps a; the backward a, z and M gb.
template <typename T>
KDKERNELS_BOTH Plan forward_plan(int p, int k, int64_t limit) {
  return plan_for(p, k, sizeof(T), kInverseRow, 1, limit);
}
template <typename T>
KDKERNELS_BOTH Plan backward_plan(int p, int k, int64_t limit) {
  return plan_for(p, k, sizeof(T), kResolventRow, 3, limit);
}

constexpr int kWarpsTogether = 4;  // matrices of one warp each that share a block

// One warp for the smallest matrices, more threads where more rows are there for them; one width for double, which is rare.
KDKERNELS_BOTH int threads_for(int p, int size) {
  return size == 8 ? 256 : p <= 32 ? 32 : p <= 128 ? 256 : 512;
}
KDKERNELS_BOTH int matrices_together(int threads) {
  return threads == 32 ? kWarpsTogether : 1;
}
// Bytes of shared memory that a matrix may have.
KDKERNELS_BOTH int64_t limit_for(int p, int size, int64_t of_block) {
  return of_block / matrices_together(threads_for(p, size)) / 16 * 16;
}

constexpr int kUpdateThreads = 256, kUpdateTiles = 8, kUpdateVectors = 4;

// Columns that a block of `update` takes, and its shared memory: tiles, vectors, partial products, w and y, and sums if k needs several
// goes.
KDKERNELS_BOTH int update_columns(int p) {
  return kUpdateTiles * tile_columns(p);
}
template <typename T>
KDKERNELS_BOTH int64_t update_shared(int p, int k) {
  const int columns = tile_columns(p);
  const int64_t tile = int64_t(columns) * tile_stride(p);
  return kScratch + aligned(int64_t(sizeof(T)) * kStages * tile) + aligned(int64_t(sizeof(T)) * 2 * kUpdateVectors * tile_stride(p)) +
         aligned(int64_t(sizeof(T)) * 2 * kUpdateVectors * (kUpdateThreads + columns)) +
         (k > kUpdateVectors ? aligned(int64_t(sizeof(T)) * tile) : 0);
}

KDKERNELS_BOTH int64_t update_blocks(const BackwardProblem& problem) {
  return problem.batch * ((problem.q + update_columns(problem.p) - 1) / update_columns(problem.p));
}
// What a matrix needs: shared memory of its block, and of a workspace, in bytes.
struct Need {
  int64_t shared, workspace;
};
template <typename T>
Need forward_need(int p, int k, int64_t limit) {
  const Plan plan = forward_plan<T>(p, k, limit_for(p, sizeof(T), limit));
  return {plan.shared() * matrices_together(threads_for(p, sizeof(T))), plan.workspace()};
}
template <typename T>
Need backward_need(int p, int k, int64_t limit) {
  const Plan plan = backward_plan<T>(p, k, limit_for(p, sizeof(T), limit));
  const int64_t solve = plan.shared() * matrices_together(threads_for(p, sizeof(T))), update = update_shared<T>(p, k);
  return {solve > update ? solve : update, plan.workspace()};
}

}  // namespace kdkernels::truncated_svd::gpu
