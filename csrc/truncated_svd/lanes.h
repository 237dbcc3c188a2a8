// Functions for matrices in lanes: lane l of every vector belongs to matrix l of a group. Code that
// is written as if for one scalar matrix then processes as many matrices as a vector has lanes. It
// needs no padded matrices and no sums across lanes. This file converts data to that layout and
// back.
#pragma once

#include <algorithm>

#include "../common/scratch.h"
#include "../common/transpose.h"

namespace kdkernels::truncated_svd {

using simd::first_lanes;
using simd::kLanes;
using simd::Mask;
using simd::sum_groups;
using simd::sums;
using simd::transpose;
using simd::transpose_groups;
using simd::Vec;

// `count`, rounded up to whole vectors.
template <typename T>
constexpr int64_t padded(int64_t count) {
  return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
KDKERNELS_INLINE Vec<T> abs(Vec<T> v) {
  using Int = typename simd::IntOf<T>::type;
  return (Vec<T>)((Mask<T>)v & std::numeric_limits<Int>::max());
}

// Converts the lower triangles of a group of matrices, [lanes][p][stride], to packed triangles in
// lanes: element (i, j <= i) is at i (i + 1) / 2 + j.
template <typename T>
void interleave_triangle(const T* matrices, int64_t p, int64_t stride, Vec<T>* packed) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < p; ++i) {
    for (int64_t j = 0; j <= i; j += lanes) {
      Vec<T> block[lanes];
      for (int l = 0; l < lanes; ++l) block[l] = simd::load<T>(matrices + (l * p + i) * stride + j);
      transpose<T>(block);
      const int64_t count = std::min<int64_t>(lanes, i + 1 - j);
      for (int64_t c = 0; c < count; ++c) packed[j + c] = block[c];
    }
    packed += i + 1;
  }
}

// Converts vectors of `count` numbers from lanes, [count], to rows, [lanes][stride].
template <typename T>
void deinterleave(const Vec<T>* in, int64_t count, T* out, int64_t stride) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < count; i += lanes) {
    Vec<T> block[lanes];
    for (int l = 0; l < lanes; ++l) block[l] = i + l < count ? in[i + l] : Vec<T>{};
    transpose<T>(block);
    for (int l = 0; l < lanes; ++l) simd::store<T>(out + l * stride + i, block[l]);
  }
}

// Converts vectors of `count` numbers from rows, [lanes][stride], to lanes, [count].
template <typename T>
void interleave(const T* in, int64_t stride, int64_t count, Vec<T>* out) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i = 0; i < count; i += lanes) {
    Vec<T> block[lanes];
    for (int l = 0; l < lanes; ++l) block[l] = simd::load<T>(in + l * stride + i);
    transpose<T>(block);
    for (int l = 0; l < lanes && i + l < count; ++l) out[i + l] = block[l];
  }
}

}  // namespace kdkernels::truncated_svd
