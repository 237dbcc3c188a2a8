// truncated_svd: options and checks that all implementations share.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>

#include "../common/check.h"
#include "../common/vectors.h"
#include "thresholds.h"

namespace kdkernels::truncated_svd {

// Signatures of the ops truncated_svd_<implementation>, which take the arguments of truncated_svd
// except the last one, and of their backward ops.
using Signature = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, int64_t, int64_t, bool, double, bool);
using BackwardSignature = at::Tensor(const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                                     const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, double);

inline void check_matrices(const at::Tensor& x, int64_t k) {
  check_type(x, "x");
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.size(-1) > 0 && x.size(-2) > 0, "x must be matrices [..., M, N] with M, N >= 1, got shape ",
                    x.sizes());
  TORCH_CHECK_VALUE(k >= 1 && k <= std::min(x.size(-1), x.size(-2)), "k must lie in [1, min(M, N)], got ", k, " for x of shape ",
                    x.sizes());
}

enum class Sign { none, max_abs };

// Returns whether signs are to be fixed.
inline bool parse_sign(int64_t value) {
  return option<Sign>("sign", value, {{Sign::none, "none"}, {Sign::max_abs, "max_abs"}}) == Sign::max_abs;
}

inline at::ScalarType compute_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Checks the arguments of backward ops and brings vectors into rows in the dtype of the
// computation: [B, k, n], and [B, k] for s. A tensor that was not given is undefined.
struct BackwardInputs {
  BackwardInputs(const std::optional<at::Tensor>& grad_u, const std::optional<at::Tensor>& grad_s, const std::optional<at::Tensor>& grad_v,
                 const at::Tensor& x, const at::Tensor& u_, const at::Tensor& s_, const at::Tensor& v_, double gap_eps)
      : k(s_.dim() > 0 ? s_.size(-1) : 0), dtype(compute_dtype(x)) {
    check_matrices(x, k);
    const int64_t rows = x.size(-2), columns = x.size(-1);
    const bool has_u = u_.dim() == x.dim();
    check_shape(s_, "s", batched(x, {k}));
    check_shape(v_, "v", batched(x, {columns, k}));
    if (has_u) check_shape(u_, "u", batched(x, {rows, k}));
    TORCH_CHECK_VALUE(has_u || rows >= columns, "u is needed if M < N, got an empty u for x of shape ", x.sizes());
    TORCH_CHECK_VALUE(gap_eps > 0 && gap_eps <= std::numeric_limits<double>::max(), "gap_eps must be finite and > 0, got ", gap_eps);
    auto check_forward_result = [&](const at::Tensor& t, const char* name) {
      check_device(t, name, x.device());
      TORCH_CHECK_TYPE(t.scalar_type() == dtype, name, " must be ", dtype, ", the dtype that the forward op returned, got ",
                       t.scalar_type());
    };
    check_forward_result(s_, "s");
    check_forward_result(v_, "v");
    if (has_u) check_forward_result(u_, "u");
    auto checked = [&](const std::optional<at::Tensor>& g, const char* name, at::IntArrayRef sizes) {
      if (!g || !g->defined()) return at::Tensor();
      check_type(*g, name);
      check_device(*g, name, x.device());
      check_shape(*g, name, sizes);
      return *g;
    };
    const at::Tensor gu = checked(grad_u, "grad_u", has_u ? at::IntArrayRef(batched(x, {rows, k})) : at::IntArrayRef{0});
    const at::Tensor gs = checked(grad_s, "grad_s", batched(x, {k})), gv = checked(grad_v, "grad_v", batched(x, {columns, k}));
    auto as_rows = [&](const at::Tensor& g) { return g.to(dtype).transpose(-1, -2).reshape({-1, k, g.size(-2)}); };
    if (gu.defined() && has_u) grad[0] = as_rows(gu);
    if (gs.defined()) grad[1] = gs.to(dtype).contiguous().view({-1, k});
    if (gv.defined()) grad[2] = as_rows(gv);
    if (has_u) u = vectors_first(u_, dtype);
    s = s_.to(dtype).contiguous().view({-1, k});
    v = vectors_first(v_, dtype);
  }

  int64_t k;
  at::ScalarType dtype;
  at::Tensor grad[3];  // of u, s, v
  at::Tensor u, s, v;
};

}  // namespace kdkernels::truncated_svd
