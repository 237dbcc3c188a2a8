// Argument checks that prevent invalid memory accesses. The public Python functions check their
// arguments themselves; these checks protect callers that use torch.ops.kdkernels directly.
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

// The kernels support exactly these four dtypes. at::isFloatingType() also accepts dtypes that they
// do not support, for example float8.
inline void check_floating(const at::Tensor& x, const char* name) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, name,
                   " must be floating point (float64, float32, bfloat16 or float16), got ", dtype);
}

// The address of a tensor's data, without a copy. data_ptr() copies a copy-on-write tensor, which
// is not allowed on a thread of parallel_for. The kernels only read their inputs, and their outputs
// are never copy-on-write.
inline void* address(const at::Tensor& x) {
  return const_cast<void*>(x.const_data_ptr());
}

inline void check_shape(const at::Tensor& x, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(x.sizes() == shape, name, " must have shape ", shape, ", got ", x.sizes());
}

inline void check_device(const at::Tensor& x, const char* name, at::Device device) {
  TORCH_CHECK_VALUE(x.device() == device, name, " must be on ", device, ", got ", x.device());
}

// Converts an option of an op to its C++ enum. The schema passes the integer value of an enum of
// kdkernels/options.py. The C++ enums have the same values; tests/test_options.py compares the two
// by the message of this check.
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
