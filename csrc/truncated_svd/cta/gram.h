// G = M M^T: each thread keeps a block of 8 x 8 of the lower triangle in registers (4 x 4 in double); where there are fewer blocks than
// threads, columns are dealt out to groups of threads, whose sums are added in order.
#pragma once

#include "tiles.h"

namespace kdkernels::truncated_svd::gpu {

template <typename Cta, typename T>
KDKERNELS_STAGE void gram(Cta& cta, const Source<T>& m, T* tiles, T* matrix) {
  constexpr int kBlock = sizeof(T) == 4 ? 8 : 4;
  const int p = m.p, ld = matrix_stride(p), stride = tile_stride(p), columns = tile_columns(p);
  const int side = (p + kBlock - 1) / kBlock, blocks = side * (side + 1) / 2;
  struct Own {
    T sum[kBlock][kBlock];
    int row, column, group;  // group < 0: none
  };
  PerThread<Own> own;
  for (int begin = 0; begin < blocks; begin += Cta::kThreads) {
    const int together = fewer(blocks - begin, Cta::kThreads), groups = fewer(Cta::kThreads / together, columns);
    cta.threads([&](int t) {
      Own& o = own[t];
      o.group = t / together < groups ? t / together : -1;
      int block = begin + t % together, row = 0;
      while (block > row) block -= ++row;  // row r begins after r (r + 1) / 2 blocks
      o.row = row * kBlock, o.column = block * kBlock;
#pragma unroll
      for (int i = 0; i < kBlock; ++i)
#pragma unroll
        for (int j = 0; j < kBlock; ++j) o.sum[i][j] = T(0);
    });
    stream(cta, m, 0, m.q, tiles, [&](const T* tile, int, int) {
      cta.start([&](int t) {
        Own& o = own[t];
        if (o.group < 0) return;
        KDKERNELS_SHARED(tile);
        for (int c = o.group; c < columns; c += groups) {
          const T* column = tile + c * stride;
          T x[kBlock], y[kBlock];
#pragma unroll
          for (int i = 0; i < kBlock; i += 4) {
            const Four<T> left = four(column + o.row + i), right = four(column + o.column + i);
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
        Own& o = own[t];
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
