// G = M M^T. Each thread keeps a block of 8 x 8 numbers of the lower triangle in registers (4 x 4
// in double). If there are fewer blocks than threads, the columns of M are divided among groups of
// threads, and the sums of the groups are added in order.
#pragma once

#include "tiles.h"

namespace kdkernels::truncated_svd::gpu {

template <typename Cta, typename T>
KDKERNELS_STAGE void gram(Cta& cta, const MatrixSource<T>& m, T* tiles, T* matrix) {
  constexpr int kBlock = sizeof(T) == 4 ? 8 : 4;
  const int p = m.p, ld = matrix_stride(p), stride = tile_stride(p), columns = tile_columns(p);
  const int side = (p + kBlock - 1) / kBlock, blocks = side * (side + 1) / 2;
  struct ThreadSums {
    T sum[kBlock][kBlock];
    int row, column, group;  // group < 0: this thread has no block
  };
  PerThread<ThreadSums> thread_sums;
  for (int begin = 0; begin < blocks; begin += Cta::kThreads) {
    const int at_once = smaller(blocks - begin, Cta::kThreads), groups = smaller(Cta::kThreads / at_once, columns);
    cta.threads([&](int t) {
      ThreadSums& o = thread_sums[t];
      o.group = t / at_once < groups ? t / at_once : -1;
      int block = begin + t % at_once, row = 0;
      while (block > row) block -= ++row;  // row r begins after r (r + 1) / 2 blocks
      o.row = row * kBlock, o.column = block * kBlock;
#pragma unroll
      for (int i = 0; i < kBlock; ++i)
#pragma unroll
        for (int j = 0; j < kBlock; ++j) o.sum[i][j] = T(0);
    });
    stream(cta, m, 0, m.q, tiles, [&](const T* tile, int, int) {
      cta.start([&](int t) {
        ThreadSums& o = thread_sums[t];
        if (o.group < 0) return;
        KDKERNELS_SHARED(tile);
        for (int c = o.group; c < columns; c += groups) {
          const T* column = tile + c * stride;
          T x[kBlock], y[kBlock];
#pragma unroll
          for (int i = 0; i < kBlock; i += 4) {
            const Four<T> left = load_four(column + o.row + i), right = load_four(column + o.column + i);
#pragma unroll
            for (int l = 0; l < 4; ++l) x[i + l] = left.x[l], y[i + l] = right.x[l];
          }
#pragma unroll
          for (int i = 0; i < kBlock; ++i)
#pragma unroll
            for (int j = 0; j < kBlock; ++j) o.sum[i][j] += x[i] * y[j];
        }
      });
    });
    for (int group = 0; group < groups; ++group)
      cta.threads([&](int t) {
        ThreadSums& o = thread_sums[t];
        if (o.group != group) return;
#pragma unroll
        for (int i = 0; i < kBlock; ++i)
#pragma unroll
          for (int j = 0; j < kBlock; ++j) {
            const int r = o.row + i, c = o.column + j;
            if (r >= p || c > r) continue;
            const T value = group == 0 ? o.sum[i][j] : matrix[r * ld + c] + o.sum[i][j];
            matrix[r * ld + c] = value;
            matrix[c * ld + r] = value;
          }
      });
  }
}

template <typename Cta, typename T>
KDKERNELS_GPU double trace(Cta& cta, int p, const T* matrix) {
  const int ld = matrix_stride(p);
  return cta.template sum<double>(p, [&](int i) { return static_cast<double>(matrix[i * ld + i]); });
}

}  // namespace kdkernels::truncated_svd::gpu
