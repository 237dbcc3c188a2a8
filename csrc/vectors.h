// Vectors as columns of a batch of matrices, brought to rows, and their products.
#pragma once

#include <ATen/core/Tensor.h>

#include "simd.h"

namespace kdkernels {

// [..., n, k] as contiguous [B, k, n]: no copy of what truncated_svd made.
inline at::Tensor vectors_first(const at::Tensor& t, at::ScalarType dtype) {
  const at::Tensor rows = t.transpose(-1, -2);
  return rows.to(dtype).contiguous().view({-1, rows.size(-2), rows.size(-1)});
}

// <x, y> of n numbers, whatever n is.
template <typename T>
double dot_product(const T* x, const T* y, int64_t n) {
  using simd::kLanes;
  simd::Vec<T> sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= n; i += 4 * kLanes<T>)
    for (int c = 0; c < 4; ++c) sum[c] += simd::load<T>(x + i + c * kLanes<T>) * simd::load<T>(y + i + c * kLanes<T>);
  double total = simd::sum<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; i < n; ++i) total += static_cast<double>(x[i]) * y[i];
  return total;
}

}  // namespace kdkernels
