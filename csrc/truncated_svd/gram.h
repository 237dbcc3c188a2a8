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
void dot_tile(const T* a, const T* b, int64_t stride, int64_t length, T* gram, int64_t gram_stride) {
  Vec<T> acc[R * C] = {};
  for (int64_t s = 0; s < length; s += kLanes<T>) {
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

template <typename T, int R, int C>
void dot_columns(const Block<T>& m, int64_t i, int64_t j, int64_t end, T* gram, int64_t stride) {
  for (; j + C <= end; j += C)
    dot_tile<T, R, C>(m.data + i * m.stride, m.data + j * m.stride, m.stride, m.length, gram + i * stride + j, stride);
  if constexpr (C > 1)
    if (j < end) dot_columns<T, R, C == 6 || C == 5 ? 3 : C - 1>(m, i, j, end, gram, stride);
}

template <typename T, int R>
void dot_rows(const Block<T>& m, int64_t i, T* gram, int64_t stride) {
  for (; i + R <= m.rows; i += R) dot_columns<T, R, kDotColumns>(m, i, 0, i + R, gram, stride);
  if constexpr (R > 1)
    if (i < m.rows) dot_rows<T, R / 2>(m, i, gram, stride);
}

template <typename T, int R, int C>
void outer_tile(const Block<T>& m, int64_t i, int64_t j, T* gram, int64_t stride) {
  Vec<T> acc[R * C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r * C + c] = simd::load<T>(gram + (i + r) * stride + j + c * kLanes<T>);
  const T* row = m.data;
  for (int64_t s = 0; s < m.rows; ++s, row += m.stride) {
    Vec<T> right[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) right[c] = simd::load<T>(row + j + c * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> left = simd::splat<T>(row[i + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r * C + c] += left * right[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) simd::store<T>(gram + (i + r) * stride + j + c * kLanes<T>, acc[r * C + c]);
}

template <typename T, int R, int C>
void outer_columns(const Block<T>& m, int64_t i, int64_t j, T* gram, int64_t stride) {
  for (; j + (C - 1) * kLanes<T> < i + R; j += C * kLanes<T>) outer_tile<T, R, C>(m, i, j, gram, stride);
  if constexpr (C > 1)
    if (j < i + R) outer_columns<T, R, C - 1>(m, i, j, gram, stride);
}

template <typename T, int R>
void outer_rows(const Block<T>& m, int64_t i, T* gram, int64_t stride) {
  for (; i + R <= m.length; i += R) outer_columns<T, R, kOuterVectors>(m, i, 0, gram, stride);
  if constexpr (R > 1)
    if (i < m.length) outer_rows<T, R / 2>(m, i, gram, stride);
}

// Columns of M that a block holds: what fits into half of a second-level cache of 1 MB.
template <typename T>
int64_t gram_columns(const Matrices& m) {
  const int64_t most = (int64_t(1) << 19) / static_cast<int64_t>(sizeof(T)) / padded<T>(m.p);
  return std::clamp<int64_t>(most / kLanes<T> * kLanes<T>, 8 * kLanes<T>, 2048);
}

// gram [p, stride], stride >= padded(p): its lower triangle is written, and numbers up to the end of the vector that holds the diagonal.
template <typename T>
void gram(Reader<T>& reader, const Matrices& m, int64_t b, T scale, T* gram, int64_t stride) {
  std::fill(gram, gram + m.p * stride, T(0));
  for (int64_t first = 0; first < m.q; first += reader.columns()) {
    const Block<T> block = reader.read(b, first, scale);
    if (m.along_p)
      outer_rows<T, kOuterRows>(block, 0, gram, stride);
    else
      dot_rows<T, kDotRows>(block, 0, gram, stride);
  }
}

}  // namespace kdkernels::truncated_svd
