// attention_pool and attention_transfer_loss: options and argument checks, shared by all backends.
#pragma once

#include <ATen/core/Tensor.h>

#include <limits>
#include <vector>

#include "../common/check.h"

namespace kdkernels::attention_pool {

enum class Reduce { mean, sum, max };
enum class Normalize { none, l2, softmax };
enum class Variant { authors, paper };

struct Options {
  double p;
  Reduce reduce;
  double eps;
};

inline Reduce parse_reduce(int64_t value) {
  return option<Reduce>("reduce", value, {{Reduce::mean, "mean"}, {Reduce::sum, "sum"}, {Reduce::max, "max"}});
}

inline Normalize parse_normalize(int64_t value) {
  return option<Normalize>("normalize", value, {{Normalize::none, "none"}, {Normalize::l2, "l2"}, {Normalize::softmax, "softmax"}});
}

inline Variant parse_variant(int64_t value) {
  return option<Variant>("variant", value, {{Variant::authors, "authors"}, {Variant::paper, "paper"}});
}

inline Options parse_options(double p, int64_t reduce, double eps) {
  TORCH_CHECK_VALUE(p > 0 && p < std::numeric_limits<double>::infinity(), "p must be a finite number > 0, got ", p);
  TORCH_CHECK_VALUE(eps > 0, "eps must be > 0, got ", eps);
  return {p, parse_reduce(reduce), eps};
}

inline void check_features(const at::Tensor& x, const char* name) {
  check_floating(x, name);
  TORCH_CHECK_VALUE(x.dim() >= 3, name, " must have the shape [B, C, *spatial], got ", x.sizes());
  for (int64_t d = 1; d < x.dim(); ++d)
    TORCH_CHECK_VALUE(x.size(d) > 0, name, " must have at least one channel and one spatial position, got ", x.sizes());
}

// The shape of the maps of features x: [B, *spatial].
inline std::vector<int64_t> map_shape(const at::Tensor& x) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.erase(shape.begin() + 1);
  return shape;
}

inline void check_pair(const at::Tensor& student, const at::Tensor& teacher) {
  check_features(student, "student");
  check_features(teacher, "teacher");
  check_device(teacher, "teacher", student.device());
  TORCH_CHECK_VALUE(map_shape(student) == map_shape(teacher), "student and teacher must have the same batch size and spatial shape, got ",
                    student.sizes(), " and ", teacher.sizes());
}

inline at::ScalarType compute_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
inline at::ScalarType compute_dtype(const at::Tensor& a, const at::Tensor& b) {
  return compute_dtype(a) == at::kDouble || compute_dtype(b) == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace kdkernels::attention_pool
