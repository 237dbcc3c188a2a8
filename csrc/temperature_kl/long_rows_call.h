// The call of the kernel of long_rows.h: which rows it supports, and its arguments.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>

#include "launch.h"
#include "long_rows_plan.h"

namespace kdkernels::temperature_kl::gpu {

using OptionalTensor = std::optional<at::Tensor>;

// The strides of Rows in kdkernels/triton/temperature_kl_rows.py, in bytes.
inline RowStrides row_strides(at::IntArrayRef strides, int64_t element_size) {
  return {strides[0] * element_size, strides[1] * element_size};
}

// Whether the rows of b start at the same position relative to multiples of 16 bytes as those of a.
inline bool same_alignment(const void* a, const RowStrides& a_strides, const void* b, const RowStrides& b_strides) {
  const auto difference = reinterpret_cast<intptr_t>(a) - reinterpret_cast<intptr_t>(b);
  return difference % 16 == 0 && (a_strides.outer - b_strides.outer) % 16 == 0 && (a_strides.inner - b_strides.inner) % 16 == 0;
}

inline bool is_supported(const LongRows& p, const at::Tensor& teacher, const at::Tensor& student, const at::Tensor& grad, int64_t rows,
                         int64_t classes) {
  const auto dtype = teacher.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16) && student.scalar_type() == dtype && grad.scalar_type() == dtype &&
         rows < std::numeric_limits<int>::max() / 2 && classes < std::numeric_limits<int>::max() / 8 &&
         same_alignment(p.teacher, p.teacher_strides, p.student, p.student_strides) &&
         same_alignment(p.teacher, p.teacher_strides, p.grad, p.grad_strides);
}

// The op. Device has the members of OnDevice, and multiprocessors and has_clusters.
template <typename Device>
bool long_rows(const at::Tensor& teacher, const at::Tensor& student, const at::Tensor& grad, at::IntArrayRef strides, int64_t inner_size,
               int64_t rows, int64_t classes, double temperature, const OptionalTensor& row_temperature, const OptionalTensor& mask,
               double weight, const OptionalTensor& weight_factor, const OptionalTensor& upstream, int64_t upstream_stride,
               bool scale_by_t2, const OptionalTensor& loss, const at::Tensor& state, const at::Tensor& left, int64_t threads,
               int64_t ranks) {
  TORCH_CHECK_VALUE(
      (threads == 0 && ranks == 0) || ((threads == 256 || threads == 512) && (ranks == 1 || ranks == 2 || ranks == 4 || ranks == 8)),
      "threads and ranks must be 256 or 512 and 1, 2, 4 or 8, or both 0, got ", threads, " and ", ranks);
  TORCH_CHECK_VALUE(rows > 0 && classes > 0 && strides.size() == 6, "rows, classes and the length of strides must be > 0, > 0 and 6, got ",
                    rows, ", ", classes, " and ", strides.size());
  const Device device(teacher);
  if (!device.has_clusters) return false;
  auto as_float = [](const OptionalTensor& x) { return x ? x->to(at::kFloat).contiguous() : at::Tensor(); };
  const at::Tensor row_t = as_float(row_temperature), factor = as_float(weight_factor), up = as_float(upstream);
  auto data = [](const at::Tensor& x) { return x.defined() ? static_cast<const float*>(x.const_data_ptr()) : nullptr; };
  const int64_t size = teacher.element_size();
  LongRows p{};
  p.teacher = static_cast<const char*>(teacher.const_data_ptr());
  p.student = static_cast<const char*>(student.const_data_ptr());
  p.grad = static_cast<char*>(grad.mutable_data_ptr());
  p.teacher_strides = row_strides(strides.slice(0, 2), size);
  p.student_strides = row_strides(strides.slice(2, 2), size);
  p.grad_strides = row_strides(strides.slice(4, 2), size);
  if (!is_supported(p, teacher, student, grad, rows, classes)) return false;
  p.inner_size = static_cast<int>(std::min(inner_size, rows));
  p.rows = static_cast<int>(rows);
  p.classes = static_cast<int>(classes);
  p.temperature = static_cast<float>(temperature);
  p.weight = static_cast<float>(weight);
  p.scale_by_t2 = scale_by_t2;
  p.row_temperature = data(row_t);
  p.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  p.weight_factor = data(factor);
  p.upstream = data(up);
  p.upstream_stride = static_cast<int>(upstream_stride);
  p.loss = loss ? static_cast<float*>(loss->mutable_data_ptr()) : nullptr;
  p.state = static_cast<int32_t*>(state.mutable_data_ptr());
  p.left = static_cast<int32_t*>(left.mutable_data_ptr());
  LongRowsPlan launch{static_cast<int>(threads), static_cast<int>(ranks)};
  if (launch.ranks == 0) launch = plan(classes, size, device.shared_memory);
  if (launch.ranks == 0) return false;
  p.vectors = vectors_of_block(classes, size, launch.ranks);
  bool launched = false;
  const char* error = launch_long_rows(p, teacher.scalar_type() == at::kFloat, launch.threads, launch.ranks,
                                       {device.shared_memory, device.multiprocessors, device.stream}, &launched);
  TORCH_CHECK(!error, "the kernel of temperature_kl for long rows: ", error);
  return launched;
}

}  // namespace kdkernels::temperature_kl::gpu
