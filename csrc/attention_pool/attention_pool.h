// attention_pool and attention_transfer_loss: options and checks that every backend shares.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>

#include "../common/check.h"

namespace kdkernels::attention_pool {

enum class Reduce { mean, sum, max };
enum class Normalize { none, l2, softmax };
enum class Variant { code, paper };

struct Options {
  double p;
  Reduce reduce;
  double eps;
};

inline Options parse_options(double p, std::string_view reduce, double eps) {
  TORCH_CHECK_VALUE(p > 0 && p < std::numeric_limits<double>::infinity(), "p must be a finite number > 0, got ", p);
  TORCH_CHECK_VALUE(eps > 0, "eps must be > 0, got ", eps);
  TORCH_CHECK_VALUE(reduce == "mean" || reduce == "sum" || reduce == "max", "reduce must be mean, sum or max, got ", std::string(reduce));
  return {p, reduce == "mean" ? Reduce::mean : reduce == "sum" ? Reduce::sum : Reduce::max, eps};
}

inline Normalize parse_normalize(std::string_view normalize) {
  TORCH_CHECK_VALUE(normalize.empty() || normalize == "l2" || normalize == "softmax", "normalize must be l2 or softmax, got ",
                    std::string(normalize));
  return normalize.empty() ? Normalize::none : normalize == "l2" ? Normalize::l2 : Normalize::softmax;
}

inline Variant parse_variant(std::string_view variant) {
  TORCH_CHECK_VALUE(variant == "code" || variant == "paper", "variant must be code or paper, got ", std::string(variant));
  return variant == "code" ? Variant::code : Variant::paper;
}

inline void check_features(const at::Tensor& x, const char* name) {
  check_floating(x, name);
  TORCH_CHECK_VALUE(x.dim() >= 3, name, " must have the shape [B, C, *spatial], got ", x.sizes());
  for (int64_t d = 1; d < x.dim(); ++d)
    TORCH_CHECK_VALUE(x.size(d) > 0, name, " must have at least one channel and one place, got ", x.sizes());
}

// [B, *spatial]
inline std::vector<int64_t> map_shape(const at::Tensor& x) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.erase(shape.begin() + 1);
  return shape;
}

inline void check_pair(const at::Tensor& student, const at::Tensor& teacher) {
  check_features(student, "student");
  check_features(teacher, "teacher");
  check_device(teacher, "teacher", student.device());
  TORCH_CHECK_VALUE(map_shape(student) == map_shape(teacher), "student and teacher must have the same batch and places, got ",
                    student.sizes(), " and ", teacher.sizes());
}

inline at::ScalarType compute_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
inline at::ScalarType compute_dtype(const at::Tensor& a, const at::Tensor& b) {
  return compute_dtype(a) == at::kDouble || compute_dtype(b) == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace kdkernels::attention_pool
