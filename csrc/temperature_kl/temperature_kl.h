// Options of the temperature_kl ops and checks of their arguments, shared by all backends.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/where.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "../common/check.h"

namespace kdkernels::temperature_kl {

using OptionalTensor = std::optional<at::Tensor>;

enum class Direction { forward, reverse, jsd };
enum class Reduction { none, sum, mean, batchmean };

struct Options {
  double temperature;
  int64_t dim;
  Direction direction;
  double beta;
  Reduction reduction;
  bool scale_by_t2;
  bool include_entropy;
  double target_eps;
};

inline Direction parse_direction(int64_t value) {
  return option<Direction>("direction", value, {{Direction::forward, "forward"}, {Direction::reverse, "reverse"}, {Direction::jsd, "jsd"}});
}

inline Reduction parse_reduction(int64_t value) {
  return option<Reduction>(
      "reduction", value,
      {{Reduction::none, "none"}, {Reduction::sum, "sum"}, {Reduction::mean, "mean"}, {Reduction::batchmean, "batchmean"}});
}

inline Options parse_options(const at::Tensor& student, double temperature, int64_t dim, int64_t direction, double beta, int64_t reduction,
                             bool scale_by_t2, bool include_entropy, double target_eps) {
  Options o{temperature,
            dim < 0 ? dim + student.dim() : dim,
            parse_direction(direction),
            beta,
            parse_reduction(reduction),
            scale_by_t2,
            include_entropy,
            target_eps};
  TORCH_CHECK_VALUE(o.dim >= 0 && o.dim < student.dim(), "dim must lie in [", -student.dim(), ", ", student.dim() - 1, "], got ", dim);
  TORCH_CHECK_VALUE(temperature > 0 && std::isfinite(temperature), "temperature must be a finite number > 0, got ", temperature);
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1, "beta must lie in [0, 1], got ", beta);
  TORCH_CHECK_VALUE(target_eps >= 0 && std::isfinite(target_eps), "target_eps must be a finite number >= 0, got ", target_eps);
  return o;
}

// The shape of a tensor with one number per row: all dimensions except the dimension of the
// classes.
inline std::vector<int64_t> row_shape(const at::Tensor& x, int64_t dim) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.erase(shape.begin() + dim);
  return shape;
}

inline at::ScalarType compute_dtype(const at::Tensor& student, const at::Tensor& teacher) {
  const bool is_double = student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble;
  return is_double ? at::kDouble : at::kFloat;
}

inline void check_inputs(const at::Tensor& student, const at::Tensor& teacher, const OptionalTensor& row_temperature,
                         const OptionalTensor& mask, const OptionalTensor& normalizer, const Options& o) {
  check_floating(student, "student");
  check_floating(teacher, "teacher");
  check_same_shape(student, "student", teacher, "teacher");
  check_device(teacher, "teacher", student.device());
  TORCH_CHECK_VALUE(student.size(o.dim) > 0, "student and teacher must have at least one class, got shape ", student.sizes());
  const auto rows = row_shape(student, o.dim);
  if (row_temperature) {
    check_floating(*row_temperature, "temperature");
    check_shape(*row_temperature, "temperature", rows);
    check_device(*row_temperature, "temperature", student.device());
  }
  if (mask) {
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask must be bool, got ", mask->scalar_type());
    check_shape(*mask, "mask", rows);
    check_device(*mask, "mask", student.device());
  }
  if (normalizer) {
    TORCH_CHECK_TYPE(!normalizer->is_complex() && normalizer->scalar_type() != at::kBool && normalizer->element_size() >= 2,
                     "normalizer must be a floating point number or an integer, got ", normalizer->scalar_type());
    TORCH_CHECK_VALUE(normalizer->numel() == 1, "normalizer must have one element, got shape ", normalizer->sizes());
    check_device(*normalizer, "normalizer", student.device());
  }
}

// Checks the arguments of the rescale ops; see their schemas.
inline void check_rescale(const at::Tensor& grad, const at::Tensor& row_scale, const at::Tensor& grad_loss, const OptionalTensor& mask,
                          int64_t dim) {
  check_floating(grad, "grad");
  check_floating(grad_loss, "grad_loss");
  TORCH_CHECK_VALUE(dim >= -grad.dim() && dim < grad.dim(), "dim must lie in [", -grad.dim(), ", ", grad.dim() - 1, "], got ", dim);
  const auto rows = row_shape(grad, dim < 0 ? dim + grad.dim() : dim);
  check_device(grad_loss, "grad_loss", grad.device());
  check_device(row_scale, "row_scale", grad.device());
  if (grad_loss.dim() > 0) check_shape(grad_loss, "grad_loss", rows);
  if (row_scale.sizes() != at::IntArrayRef{0}) {
    TORCH_CHECK_TYPE(row_scale.scalar_type() == at::kFloat, "row_scale must be float32, got ", row_scale.scalar_type());
    check_shape(row_scale, "row_scale", rows);
  }
  if (mask) {
    TORCH_CHECK_TYPE(mask->scalar_type() == at::kBool, "mask must be bool, got ", mask->scalar_type());
    check_shape(*mask, "mask", rows);
    check_device(*mask, "mask", grad.device());
  }
}

}  // namespace kdkernels::temperature_kl
