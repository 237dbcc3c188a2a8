// The lower triangle of G = M M^T, computed from blocks of columns of M.
//
// If the rows of M are contiguous, an entry of G is a dot product of two rows: a tile of R x C dot
// products keeps its partial sums in registers for the whole block, and sums them across lanes
// once. If the columns of M are contiguous (p_contiguous), a block adds the outer products of its
// rows to G: a tile of R entries x C vectors adds one row after another. Both compute little more
// than the triangle, and neither makes a transposed copy.
#pragma once

#include "matrices.h"

namespace kdkernels::truncated_svd {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDotRows = 4, kDotColumns = 6, kOuterRows = 8, kOuterVectors = 3;  // for 32 registers
#else
constexpr int kDotRows = 2, kDotColumns = 5, kOuterRows = 6, kOuterVectors = 2;  // for 16 registers
#endif

template <typename T, int R, int C>
void dot_tile(const T* a, const T* b, int64_t stride, int64_t length, const T* prefetch_1, const T* prefetch_2, T* gram,
              int64_t gram_stride) {
  Vec<T> acc[R * C] = {};
  for (int64_t s = 0; s < length; s += kLanes<T>) {
    __builtin_prefetch(prefetch_1 + s, 0, 2);
    __builtin_prefetch(prefetch_2 + s, 0, 2);
    Vec<T> row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = simd::load<T>(a + r * stride + s);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec<T> column = simd::load<T>(b + c * stride + s);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r * C + c] += row[r] * column;
    }
  }
  T total[padded<T>(R * C)];
  sums<T, R * C>(acc, total);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) gram[r * gram_stride + c] += total[r * C + c];
}

// The tiles of a block of M. While they compute, they prefetch the next block, evenly: a memory
// system that is asked for all of it at once holds up the first tiles and has nothing to do during
// the others. (A matrix of 32 x 256 takes 1.65 us instead of 1.93, one of 64 x 64 2.3 instead of 2.45;
// for matrices from 64 x 1024 on it makes no difference. Zen 5.)
template <typename T>
struct Tiles {
  const Block<T>& m;
  const NextBlock<T>& next;
  T* gram;
  int64_t stride;
  // Of dot products: the next row to prefetch, and the columns of all tiles. Each column of a tile adds
  // next.rows to `credit`, and a row is prefetched for `columns` of it.
  int64_t next_row = 0, credit = 0, columns = 0;
  // Of outer products: the next address to prefetch, and the bytes for each row and vector of a tile.
  uintptr_t prefetch = 0, prefetch_step = 0;

  // The row that a tile prefetches, or `fallback`, which is in the cache already.
  const T* row_to_prefetch(const T* fallback) {
    if (credit < columns) return fallback;
    credit -= columns;
    return next.row(next_row++, fallback);
  }
};

template <typename T, int R, int C>
void dot_columns(Tiles<T>& t, int64_t i, int64_t j, int64_t end) {
  for (; j + C <= end; j += C) {
    const T* row = t.m.data + i * t.m.stride;
    t.credit += C * t.next.rows;
    const T *prefetch_1 = t.row_to_prefetch(row), *prefetch_2 = t.row_to_prefetch(row);
    dot_tile<T, R, C>(row, t.m.data + j * t.m.stride, t.m.stride, t.m.length, prefetch_1, prefetch_2, t.gram + i * t.stride + j, t.stride);
  }
  if constexpr (C > 1)
    if (j < end) dot_columns<T, R, C == 6 || C == 5 ? 3 : C - 1>(t, i, j, end);
}

template <typename T>
void plan_prefetches_of_dot_products(Tiles<T>& t) {
  for (int64_t rows = kDotRows, i = 0; rows > 0; rows /= 2)
    for (; i + rows <= t.m.rows; i += rows) t.columns += i + rows;
}

template <typename T, int R>
void dot_rows(Tiles<T>& t, int64_t i) {
  for (; i + R <= t.m.rows; i += R) dot_columns<T, R, kDotColumns>(t, i, 0, i + R);
  if constexpr (R > 1)
    if (i < t.m.rows) dot_rows<T, R / 2>(t, i);
}

template <typename T, int R, int C>
void outer_tile(Tiles<T>& t, int64_t i, int64_t j) {
  const Block<T>& m = t.m;
  // Small tiles add several rows at once, to separate sums: an addition has to wait for the
  // previous addition to the same sum.
  constexpr int Rows = R * C <= 3 ? 4 : R * C <= 6 ? 2 : 1;
  Vec<T> acc[Rows][R * C] = {};
  auto add = [&](const T* row, Vec<T>* to) {
    Vec<T> right[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) right[c] = simd::load<T>(row + j + c * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> left = simd::splat<T>(row[i + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) to[r * C + c] += left * right[c];
    }
  };
  const T* row = m.data;
  uintptr_t prefetch = t.prefetch;
  int64_t s = 0;
  for (; s + Rows <= m.rows; s += Rows)
#pragma GCC unroll 4
    for (int u = 0; u < Rows; ++u, row += m.stride, prefetch += C * t.prefetch_step) {
      __builtin_prefetch(reinterpret_cast<const void*>(prefetch), 0, 2);
      add(row, acc[u]);
    }
  t.prefetch = prefetch;
  for (; s < m.rows; ++s, row += m.stride) add(row, acc[0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      Vec<T> total = acc[0][r * C + c];
      for (int u = 1; u < Rows; ++u) total += acc[u][r * C + c];
      T* to = t.gram + (i + r) * t.stride + j + c * kLanes<T>;
      simd::store<T>(to, simd::load<T>(to) + total);
    }
}

template <typename T, int R, int C>
void outer_columns(Tiles<T>& t, int64_t i, int64_t j) {
  for (; j + (C - 1) * kLanes<T> < i + R; j += C * kLanes<T>) outer_tile<T, R, C>(t, i, j);
  if constexpr (C > 1)
    if (j < i + R) outer_columns<T, R, C - 1>(t, i, j);
}

// A block whose rows are far apart is not prefetched.
template <typename T>
void plan_prefetches_of_outer_products(Tiles<T>& t) {
  t.prefetch = reinterpret_cast<uintptr_t>(t.m.data);
  if (t.next.rows == 0 || t.next.stride > 2 * t.m.length) return;
  int64_t vectors = 0;  // of all tiles
  for (int64_t rows = kOuterRows, i = 0; rows > 0; rows /= 2)
    for (; i + rows <= t.m.length; i += rows) vectors += padded<T>(i + rows) / kLanes<T>;
  t.prefetch = reinterpret_cast<uintptr_t>(t.next.data);
  t.prefetch_step = static_cast<uintptr_t>(t.next.rows * t.next.stride * static_cast<int64_t>(sizeof(T)) / (vectors * t.m.rows) + 1);
}

template <typename T, int R>
void outer_rows(Tiles<T>& t, int64_t i) {
  for (; i + R <= t.m.length; i += R) outer_columns<T, R, kOuterVectors>(t, i, 0);
  if constexpr (R > 1)
    if (i < t.m.length) outer_rows<T, R / 2>(t, i);
}

// The number of columns of M in a block. If p_contiguous, the rows of a block are short, and a tile
// reads a part of each of them. Otherwise, a tile reads its few rows repeatedly from the L1 cache,
// and all other rows from the L2 cache: a whole matrix if that is small, else blocks for which the
// processor needs few pages of memory at a time. Microseconds for the Gram matrix, Zen 5:
//
//      p x q       256 columns    512    1024
//    16 x 3136          8.6      11.4    13.1
//    64 x 3136         86        92     103
//    64 x 1024         36        35      33
//   128 x  784         88        81      78
//   256 x 3136       1196      1161    1273
template <typename T>
int64_t gram_columns(const Matrices& m) {
  if (m.p_contiguous) return product_columns<T>(m);
  const int64_t bytes = m.q * padded<T>(m.p) * static_cast<int64_t>(sizeof(T)), blocks = std::max<int64_t>(1, m.q / 256);
  return m.q <= 1024 && bytes <= int64_t(512) << 10 ? padded<T>(m.q) : padded<T>((m.q + blocks - 1) / blocks);
}

// Computes the Gram matrix of scale * M for matrix b. gram [p, stride], stride >= padded(p): the
// lower triangle is written, and the numbers up to the end of the vector that contains the diagonal
// element.
template <typename T>
void gram(Reader<T>& reader, const Matrices& m, int64_t b, T scale, T* gram, int64_t stride) {
  std::fill(gram, gram + m.p * stride, T(0));
  for (int64_t first = 0; first < m.q; first += reader.columns()) {
    const Block<T> block = reader.read(b, first, scale);
    const NextBlock<T> next = reader.next_block(b, first);
    Tiles<T> tiles{block, next, gram, stride};
    if (m.p_contiguous) {
      plan_prefetches_of_outer_products(tiles);
      outer_rows<T, kOuterRows>(tiles, 0);
    } else {
      plan_prefetches_of_dot_products(tiles);
      dot_rows<T, kDotRows>(tiles, 0);
    }
  }
}

}  // namespace kdkernels::truncated_svd
