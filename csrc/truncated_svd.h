// truncated_svd and align_singular_vectors: options and checks that every backend shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "check.h"

namespace kdkernels::truncated_svd {

// Gram matrices square the condition: below this share of the largest singular value a result is taken from a more exact method.
constexpr double kIllConditioned = 0.15;

// Singular values below this share of the largest are zero to the derivative: 1 / sigma is left out.
template <typename T>
constexpr double kNull = sizeof(T) == 4 ? 1e-6 : 1e-13;

inline void check_matrices(const at::Tensor& x, int64_t k) {
  check_floating(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(-1) > 0 && x.size(-2) > 0, "x must be matrices [..., M, N] with M, N >= 1, got ", x.sizes());
  TORCH_CHECK_VALUE(k >= 1 && k <= std::min(x.size(-1), x.size(-2)), "k must lie in [1, min(M, N)], got ", k, " for ", x.sizes());
}

inline bool parse_sign(std::string_view sign) {
  TORCH_CHECK_VALUE(sign == "max_abs" || sign.empty(), "sign must be max_abs or None, got ", std::string(sign));
  return !sign.empty();
}

inline at::ScalarType compute_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace kdkernels::truncated_svd
