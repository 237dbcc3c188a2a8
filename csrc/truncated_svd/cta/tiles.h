// The shared memory and workspace of one matrix, and the tiles through which kernels read its
// columns.
#pragma once

#include "arithmetic.h"
#include "plan.h"

namespace kdkernels::truncated_svd::gpu {

// Hands out consecutive pieces of a memory block.
class BumpAllocator {
 public:
  KDKERNELS_GPU explicit BumpAllocator(void* from) : at_(static_cast<char*>(from)) {}
  template <typename V>
  KDKERNELS_GPU V* take(int64_t count) {
    V* result = reinterpret_cast<V*>(at_);
    at_ += aligned(count * static_cast<int64_t>(sizeof(V)));
    return result;
  }

 private:
  char* at_;
};

// The working memory of one matrix: in shared memory as far as it fits, the rest in a workspace.
template <typename T>
struct WorkingMemory {
  KDKERNELS_GPU WorkingMemory(const Plan& plan, int p, int k, bool backward, char* shared, char* workspace) {
    BumpAllocator in_shared(shared + kScratch);
    T* small = in_shared.take<T>(4 * p + tile_columns(p) * k);
    d = small, e = d + p, tau = e + p, w = tau + p, projections = w + p;
    double* numbers = in_shared.take<double>(6 * k);
    lambda = numbers, dots = lambda + k, low = dots + k, high = low + k, sigma = high + k, squares = sigma + k;
    int* integers = in_shared.take<int>(kMaxThreads + 2 * k);
    is_above = integers, order = is_above + kMaxThreads + k;
    char* phase = in_shared.take<char>(plan.vectors_shared && plan.eigen > plan.tiles ? plan.eigen : plan.tiles);
    BumpAllocator in_workspace(workspace);
    BumpAllocator& for_vectors = plan.vectors_shared ? in_shared : in_workspace;
    vectors = for_vectors.take<T>(int64_t(backward ? 3 : 1) * k * tile_stride(p));
    products = backward ? for_vectors.take<double>(3 * int64_t(k) * k) : nullptr;
    tiles = reinterpret_cast<T*>(phase);
    char* eigen = plan.vectors_shared ? phase : in_workspace.take<char>(plan.eigen);
    parts = reinterpret_cast<T*>(eigen);
    x = reinterpret_cast<double*>(eigen), rows = x + int64_t(k) * p;
    matrix = reinterpret_cast<T*>((plan.matrix_shared ? in_shared : in_workspace).take<char>(plan.matrix));
  }

  T *d, *e;                                              // [p]: the diagonals of T
  T *tau, *w;                                            // [p]: the factors of the reflections of Q, and a vector
  T* projections;                                        // [columns of a tile][k]
  double *lambda, *dots, *low, *high, *sigma, *squares;  // [k]
  double* products;                                      // [3][k][k], in the backward pass
  int *is_above, *order;                                 // [threads or k], [k]
  T *tiles, *parts;                                      // [kTilesInFlight][columns][tile_stride]; [kMaxParts][p]
  double *x, *rows;                                      // [k][p]; rows of eliminations
  T* vectors;                                            // [k or 3 k][tile_stride]
  T* matrix;                                             // [p][matrix_stride]
};

// The columns of M, which are read tile by tile through shared memory: scaled, and without their
// projections onto known vectors.
template <typename T>
struct MatrixSource {
  View view;
  int64_t offset;  // of the matrix in memory
  int p, q;
  T scale;
  // [count][tile_stride(p)], orthonormal: a column m becomes m - sum_j known_j <known_j, m>.
  const T* known;
  int count;
  T* projections;  // memory for [tile_columns(p)][count]

  KDKERNELS_GPU int64_t index(int i, int c) const { return offset + i * view.stride_p + c * view.stride_q; }
  KDKERNELS_GPU T at(int i, int c) const { return load<T>(view.data, view.storage, index(i, c)); }
};

// Calls f(i, c) for each row i and each column c of a tile, in an order that reads whole sectors of
// memory.
template <typename Cta, typename F>
KDKERNELS_GPU void for_each_number(Cta& cta, int p, int columns, bool p_contiguous, F f) {
  cta.start([&](int t) {
    const int warp = t / 32, lane = t % 32, warps = Cta::kThreads / 32;
    if (p_contiguous) {
      for (int c = warp; c < columns; c += warps)
        for (int i = lane; i < p; i += 32) f(i, c);
    } else {
      // 8 columns of 4 rows at a time: each number goes to another bank.
      const int across = columns < 8 ? columns : 8, down = 32 / across;
      for (int i = warp * down + lane / across; i < p; i += warps * down)
        for (int c = lane % across; c < columns; c += across) f(i, c);
    }
  });
}

// Starts to copy columns [first, first + columns) to a tile; columns past the last one are zero.
template <typename Cta, typename T>
KDKERNELS_GPU void load_tile(Cta& cta, const MatrixSource<T>& m, int first, T* tile) {
  const int columns = tile_columns(m.p), stride = tile_stride(m.p), p = m.p;
  const bool same_dtype = is_stored_as<T>(m.view.storage);
  auto put = [&](int i, int c) {
    const bool valid = first + c < m.q;
    if (same_dtype)
      cta.copy_async(tile + c * stride + i, static_cast<const T*>(m.view.data) + m.index(i, valid ? first + c : 0), valid);
    else
      tile[c * stride + i] = valid ? m.at(i, first + c) : T(0);
  };
  for_each_number(cta, p, columns, m.view.stride_p <= m.view.stride_q, put);
}

// Like load_tile, for any number of columns and any distance between them. It needs fewer
// instructions, because it copies 16 bytes at once where M is aligned, but more registers.
template <typename Cta, typename T>
KDKERNELS_GPU void load_wide_tile(Cta& cta, const MatrixSource<T>& m, int columns, int stride, int first, T* tile) {
  const int p = m.p, present = m.q - first;
  if (!is_stored_as<T>(m.view.storage)) {
    for_each_number(cta, p, columns, m.view.stride_p <= m.view.stride_q,
                    [&](int i, int c) { tile[c * stride + i] = c < present ? m.at(i, first + c) : T(0); });
    return;
  }
  const int64_t stride_p = m.view.stride_p, stride_q = m.view.stride_q;
  const T* from = static_cast<const T*>(m.view.data) + m.index(0, first);
  constexpr int kWide = 16 / sizeof(T);
  if (stride_p == 1 && p % kWide == 0 && stride_q % kWide == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    int shift = 0;  // 2^shift threads share a column
    while (shift < 5 && kWide << shift < p) ++shift;
    cta.start([&](int t) {
      const int lane = t & ((1 << shift) - 1);
      for (int c = t >> shift; c < columns; c += Cta::kThreads >> shift)
        for (int i = kWide * lane; i < p; i += kWide << shift)
          cta.copy_16_bytes_async(tile + c * stride + i, from + (c < present ? c * stride_q : 0) + i, c < present);
    });
    return;
  }
  for_each_number(cta, p, columns, stride_p <= stride_q, [&](int i, int c) {
    cta.copy_async(tile + c * stride + i, from + i * stride_p + (c < present ? c * stride_q : 0), c < present);
  });
}

// Scales the columns of a tile and subtracts their projections onto the known vectors.
template <typename Cta, typename T>
KDKERNELS_STAGE void prepare_tile(Cta& cta, const MatrixSource<T>& m, T* tile) {
  KDKERNELS_SHARED(tile);
  const int columns = tile_columns(m.p), stride = tile_stride(m.p), p = m.p, count = m.count;
  if (m.scale != T(1)) cta.warps(columns, [&](const Warp& warp, int c) { warp.each(p, [&](int i) { tile[c * stride + i] *= m.scale; }); });
  if (count == 0) return;
  cta.warps(columns * count, [&](const Warp& warp, int task) {
    const int c = task / count, j = task % count;
    const T dot = warp.sum<T>(p, [&](int i) { return tile[c * stride + i] * m.known[j * stride + i]; });
    warp.each(1, [&](int) { m.projections[c * count + j] = dot; });
  });
  cta.warps(columns, [&](const Warp& warp, int c) {
    warp.each(p, [&](int i) {
      T value = tile[c * stride + i];
      for (int j = 0; j < count; ++j) value -= m.projections[c * count + j] * m.known[j * stride + i];
      tile[c * stride + i] = value;
    });
  });
}

// Calls body(tile, first, count) for each tile of columns [begin, end), which load(first, tile)
// starts to copy. body may end without a barrier if it does not write to the memory of the tile.
// `tiles` is memory for kTiles tiles, of columns with the given stride. If M is scaled or has known
// vectors, these must be tile_columns and tile_stride.
template <int kTiles, typename Cta, typename T, typename Load, typename F>
KDKERNELS_GPU void stream_tiles(Cta& cta, const MatrixSource<T>& m, int columns, int stride, int begin, int end, T* tiles, Load load,
                                F body) {
  const int steps = (end - begin + columns - 1) / columns;
  cta.each(kTiles * columns, [&](int c) {
    for (int i = m.p; i < stride; ++i) tiles[c * stride + i] = T(0);
  });
  auto tile = [&](int step) { return tiles + step % kTiles * columns * stride; };
  for (int step = 0; step < kTiles - 1; ++step) {
    if (step < steps) load(begin + step * columns, tile(step));
    cta.commit();
  }
  for (int step = 0; step < steps; ++step) {
    cta.template wait<kTiles - 2>();
    if (step + kTiles - 1 < steps) load(begin + (step + kTiles - 1) * columns, tile(step + kTiles - 1));
    cta.commit();
    if (m.scale != T(1) || m.count > 0) prepare_tile(cta, m, tile(step));
    const int first = begin + step * columns;
    body(tile(step), first, smaller(columns, end - first));
  }
  cta.template wait<0>();
}
template <typename Cta, typename T, typename F>
KDKERNELS_GPU void stream(Cta& cta, const MatrixSource<T>& m, int begin, int end, T* tiles, F body) {
  auto load = [&](int first, T* tile) { load_tile(cta, m, first, tile); };
  stream_tiles<kTilesInFlight>(cta, m, tile_columns(m.p), tile_stride(m.p), begin, end, tiles, load, body);
}

}  // namespace kdkernels::truncated_svd::gpu
