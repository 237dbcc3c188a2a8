// Singular vectors stored as the columns of a batch of matrices: dtype check, shapes and layout.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <vector>

namespace kdkernels {

// Checks that the kernels of singular vectors support the dtype of x.
inline void check_type(const at::Tensor& x, const char* name) {
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kDouble || type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name,
                   " must be float64, float32, bfloat16 or float16, got ", type);
}

// The batch dimensions of x, followed by `last` in place of its two matrix dimensions.
inline std::vector<int64_t> batched(const at::Tensor& x, std::initializer_list<int64_t> last) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.resize(shape.size() - 2);
  shape.insert(shape.end(), last);
  return shape;
}

// Converts [..., n, k] to contiguous [B, k, n]. For the outputs of truncated_svd this needs no
// copy.
inline at::Tensor vectors_first(const at::Tensor& t, at::ScalarType dtype) {
  const at::Tensor rows = t.transpose(-1, -2);
  return rows.to(dtype).contiguous().view({-1, rows.size(-2), rows.size(-1)});
}

}  // namespace kdkernels
