// G = M M^T, its lower triangle, from blocks of columns of M.
//
// Along q an entry is a dot product of two rows: tiles of R x C dot products keep their partial sums in registers over the whole block and
// are summed across lanes once. Along p a block is a sum of outer products of its rows: tiles of R entries x C vectors, one row after
// another. Both compute little more than the triangle, and neither transposes.
#pragma once

#include "matrices.h"

namespace kdkernels::truncated_svd {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDotRows = 4, kDotColumns = 6, kOuterRows = 8, kOuterVectors = 3;  // 32 registers
#else
constexpr int kDotRows = 2, kDotColumns = 5, kOuterRows = 6, kOuterVectors = 2;  // 16
#endif

template <typename T, int R, int C>
void dot_tile(const T* a, const T* b, int64_t stride, int64_t length, const T* ahead, const T* further, T* gram, int64_t gram_stride) {
  Vec<T> acc[R * C] = {};
  for (int64_t s = 0; s < length; s += kLanes<T>) {
    __builtin_prefetch(ahead + s, 0, 2);
    __builtin_prefetch(further + s, 0, 2);
    Vec<T> row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = simd::load<T>(a + r * stride + s);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const Vec<T> other = simd::load<T>(b + c * stride + s);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r * C + c] += row[r] * other;
    }
  }
  T total[padded<T>(R * C)];
  sums<T, R * C>(acc, total);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) gram[r * gram_stride + c] += total[r * C + c];
}

// The tiles of a block, which take turns in looking ahead.
template <typename T>
struct Tiles {
  const Block<T>& m;
  const Ahead<T>& ahead;
  T* gram;
  int64_t stride, done = 0;
};

template <typename T, int R, int C>
void dot_columns(Tiles<T>& t, int64_t i, int64_t j, int64_t end) {
  for (; j + C <= end; j += C) {
    const T* row = t.m.data + i * t.m.stride;
    const int64_t first = 2 * t.done++;
    dot_tile<T, R, C>(row, t.m.data + j * t.m.stride, t.m.stride, t.m.length, t.ahead.row(first, row), t.ahead.row(first + 1, row),
                      t.gram + i * t.stride + j, t.stride);
  }
  if constexpr (C > 1)
    if (j < end) dot_columns<T, R, C == 6 || C == 5 ? 3 : C - 1>(t, i, j, end);
}

template <typename T, int R>
void dot_rows(Tiles<T>& t, int64_t i) {
  for (; i + R <= t.m.rows; i += R) dot_columns<T, R, kDotColumns>(t, i, 0, i + R);
  if constexpr (R > 1)
    if (i < t.m.rows) dot_rows<T, R / 2>(t, i);
}

template <typename T, int R, int C>
void outer_tile(const Block<T>& m, int64_t i, int64_t j, const T* ahead, int64_t ahead_stride, T* gram, int64_t stride) {
  // Small tiles take several rows at once: one sum after another waits for the one before.
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
  int64_t s = 0;
  for (; s + Rows <= m.rows; s += Rows)
#pragma GCC unroll 4
    for (int u = 0; u < Rows; ++u, row += m.stride, ahead += ahead_stride) {
      __builtin_prefetch(ahead, 0, 2);
      add(row, acc[u]);
    }
  for (; s < m.rows; ++s, row += m.stride) add(row, acc[0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      Vec<T> total = acc[0][r * C + c];
      for (int u = 1; u < Rows; ++u) total += acc[u][r * C + c];
      T* to = gram + (i + r) * stride + j + c * kLanes<T>;
      simd::store<T>(to, simd::load<T>(to) + total);
    }
}

template <typename T, int R, int C>
void outer_columns(Tiles<T>& t, int64_t i, int64_t j) {
  for (; j + (C - 1) * kLanes<T> < i + R; j += C * kLanes<T>) {
    // Each of the first tiles asks for one vector of every row to come.
    const int64_t vector = t.done++ * kLanes<T>;
    const bool wanted = vector < t.m.length && t.ahead.rows == t.m.rows;
    outer_tile<T, R, C>(t.m, i, j, wanted ? t.ahead.data + vector : t.m.data, wanted ? t.ahead.stride : 0, t.gram, t.stride);
  }
  if constexpr (C > 1)
    if (j < i + R) outer_columns<T, R, C - 1>(t, i, j);
}

template <typename T, int R>
void outer_rows(Tiles<T>& t, int64_t i) {
  for (; i + R <= t.m.length; i += R) outer_columns<T, R, kOuterVectors>(t, i, 0);
  if constexpr (R > 1)
    if (i < t.m.length) outer_rows<T, R / 2>(t, i);
}

// Columns of M that a block holds. Along q a tile goes over its few rows again and again, from the first-level cache, and over all others
// in the second; along p rows are short, and a tile strides over all of them.
template <typename T>
int64_t gram_columns(const Matrices& m) {
  const int64_t bytes = int64_t(m.along_p ? 256 : 256) << 10, most = bytes / static_cast<int64_t>(sizeof(T)) / padded<T>(m.p);
  return std::clamp<int64_t>(most / kLanes<T> * kLanes<T>, 8 * kLanes<T>, m.along_p ? 4096 : 1024);
}

// gram [p, stride], stride >= padded(p): its lower triangle is written, and numbers up to the end of the vector that holds the diagonal.
template <typename T>
void gram(Reader<T>& reader, const Matrices& m, int64_t b, T scale, T* gram, int64_t stride) {
  std::fill(gram, gram + m.p * stride, T(0));
  for (int64_t first = 0; first < m.q; first += reader.columns()) {
    const Block<T> block = reader.read(b, first, scale);
    const Ahead<T> ahead = reader.ahead(b, first);
    Tiles<T> tiles{block, ahead, gram, stride};
    if (m.along_p)
      outer_rows<T, kOuterRows>(tiles, 0);
    else
      dot_rows<T, kDotRows>(tiles, 0);
  }
}

}  // namespace kdkernels::truncated_svd
