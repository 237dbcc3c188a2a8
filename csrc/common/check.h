// Checks that guard memory, for ops that are called past their public Python function.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <string>
#include <utility>

namespace kdkernels {

inline void check_same_shape(const at::Tensor& a, const char* a_name, const at::Tensor& b, const char* b_name) {
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), a_name, " and ", b_name, " must have the same shape, got ", a.sizes(), " and ", b.sizes());
}

// The kernels know these four; torch has more floating point types (float8), at::isFloatingType() holds for them too.
inline void check_floating(const at::Tensor& x, const char* name) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   " must be floating point (float64, float32, bfloat16 or float16), got ", dtype);
}

// Where a tensor lies. data_ptr() would copy one that is copy-on-write, and must not do so in a thread of parallel_for: inputs are read
// where they are, outputs are this package's own.
inline void* address(const at::Tensor& x) {
  return const_cast<void*>(x.const_data_ptr());
}

inline void check_shape(const at::Tensor& x, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(x.sizes() == shape, name, " must have shape ", shape, ", got ", x.sizes());
}

inline void check_device(const at::Tensor& x, const char* name, at::Device device) {
  TORCH_CHECK_VALUE(x.device() == device, name, " must be on ", device, ", got ", x.device());
}

// An option of an op: the schema passes the value of an enum of kdkernels/options.py. The C++ enums have the same values, and
// tests/test_options.py compares them by the message of this check.
template <typename Enum>
Enum option(const char* name, int64_t value, std::initializer_list<std::pair<Enum, const char*>> members) {
  std::string expected;
  for (const auto& [member, member_name] : members) {
    if (static_cast<int64_t>(member) == value) return member;
    expected += (expected.empty() ? "" : ", ") + std::to_string(static_cast<int64_t>(member)) + " (" + member_name + ")";
  }
  TORCH_CHECK_VALUE(false, name, " must be one of ", expected, ", got ", value);
}

}  // namespace kdkernels
