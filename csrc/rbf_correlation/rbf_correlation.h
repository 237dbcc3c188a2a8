// rbf_correlation and rbf_correlation_loss: options and argument checks, shared by all backends.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cmath>
#include <vector>

#include "../common/check.h"

namespace kdkernels::rbf_correlation {

// The values are those of temperature_kl.h, which also has `mean`.
enum class Reduction { none = 0, sum = 1, batchmean = 3 };

inline Reduction parse_reduction(int64_t value) {
  return option<Reduction>("reduction", value, {{Reduction::none, "none"}, {Reduction::sum, "sum"}, {Reduction::batchmean, "batchmean"}});
}

inline void check_beta(double beta) {
  TORCH_CHECK_VALUE(beta > 0 && std::isfinite(beta), "beta must be a finite number > 0, got ", beta);
}

// Checks a pair x [B, M, K] and y [B, N, K].
inline void check_columns(const at::Tensor& x, const char* x_name, const at::Tensor& y, const char* y_name) {
  for (const auto& [t, name] : {std::pair(&x, x_name), std::pair(&y, y_name)}) {
    check_floating(*t, name);
    TORCH_CHECK_VALUE(t->dim() == 3 && t->size(1) > 0 && t->size(2) > 0, name,
                      " must have the shape [B, numbers, K] with at least one number and one column, got ", t->sizes());
  }
  check_device(y, y_name, x.device());
  TORCH_CHECK_VALUE(x.size(0) == y.size(0) && x.size(2) == y.size(2), x_name, " [B, M, K] and ", y_name,
                    " [B, N, K] must agree in B and K, got ", x.sizes(), " and ", y.sizes());
}

inline void check_pairs(const at::Tensor& sx, const at::Tensor& sy, const at::Tensor& tx, const at::Tensor& ty) {
  check_columns(sx, "sx", sy, "sy");
  check_columns(tx, "tx", ty, "ty");
  check_device(tx, "tx", sx.device());
  check_same_shape(sx, "sx", tx, "tx");
  check_same_shape(sy, "sy", ty, "ty");
}

// The dtype of the op's arithmetic and of its results; half-precision inputs are computed in
// float32.
template <typename... Tensors>
at::ScalarType compute_dtype(const Tensors&... tensors) {
  return ((tensors.scalar_type() == at::kDouble) || ...) ? at::kDouble : at::kFloat;
}

inline std::vector<int64_t> loss_shape(const at::Tensor& x, Reduction reduction) {
  return reduction == Reduction::none ? std::vector<int64_t>{x.size(0)} : std::vector<int64_t>{};
}

}  // namespace kdkernels::rbf_correlation
