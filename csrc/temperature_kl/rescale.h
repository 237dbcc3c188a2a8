// Multiplies a saved gradient by what is known only in the backward pass.
#pragma once

#include <ATen/TensorIterator.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "../common/convert.h"
#include "temperature_kl.h"

namespace kdkernels::temperature_kl {

// out = grad * scale * upstream, multiplied in T and rounded once. All tensors have the shape of
// grad. The gradient is multiplied by the two factors one after the other, because their product
// may leave the range of T even if the result does not.
template <typename Number, typename T>
void multiply(const at::Tensor& out, const at::Tensor& grad, const at::Tensor& scale, const at::Tensor& upstream) {
  auto iterator = at::TensorIteratorConfig()
                      .add_output(out)
                      .add_const_input(grad)
                      .add_const_input(scale)
                      .add_const_input(upstream)
                      .check_all_same_dtype(false)
                      .resize_outputs(false)
                      .build();
  iterator.for_each([](char** data, const int64_t* strides, int64_t count) {
    constexpr int64_t block = 256;
    T numbers[block];
    const bool dense = strides[0] == sizeof(Number) && strides[1] == sizeof(Number);
    for (int64_t begin = 0; begin < count; begin += block) {
      const int64_t length = std::min(block, count - begin);
      char* to = data[0] + begin * strides[0];
      const char *from = data[1] + begin * strides[1], *scales = data[2] + begin * strides[2], *factors = data[3] + begin * strides[3];
      auto read = [](const char* p) { return *reinterpret_cast<const T*>(p); };
      if (dense)
        convert(reinterpret_cast<const Number*>(from), numbers, length);
      else
        for (int64_t i = 0; i < length; ++i) numbers[i] = static_cast<T>(*reinterpret_cast<const Number*>(from + i * strides[1]));
      if (strides[2] == 0 && strides[3] == 0) {
        const T first = read(scales), second = read(factors);
        for (int64_t i = 0; i < length; ++i) numbers[i] = numbers[i] * first * second;
      } else {
        for (int64_t i = 0; i < length; ++i) numbers[i] = numbers[i] * read(scales + i * strides[2]) * read(factors + i * strides[3]);
      }
      if (dense)
        convert(numbers, reinterpret_cast<Number*>(to), length);
      else
        for (int64_t i = 0; i < length; ++i) *reinterpret_cast<Number*>(to + i * strides[0]) = static_cast<Number>(numbers[i]);
    }
  });
}

inline void rescale(const at::Tensor& out, const at::Tensor& grad, const at::Tensor& row_scale, const at::Tensor& grad_loss,
                    const OptionalTensor& mask, int64_t dim) {
  if (grad.numel() == 0) return;
  const at::ScalarType dtype = grad.scalar_type();
  const at::ScalarType compute = dtype == at::kDouble || grad_loss.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto rows = row_shape(grad, dim);
  auto expand_rows = [&](const at::Tensor& x) { return (x.dim() == 0 ? x : x.unsqueeze(dim)).expand_as(grad); };
  at::Tensor upstream = grad_loss.to(compute);
  if (mask && !at::isfinite(upstream).all().item().toBool())  // 0 * inf is NaN, not 0
    upstream = at::where(*mask, upstream, at::zeros({}, upstream.options()));
  const at::Tensor scale = row_scale.sizes() == at::IntArrayRef(rows) ? row_scale.to(compute) : at::ones({}, upstream.options());
  auto dispatch = [&](auto example) {
    using Number = decltype(example);
    if (compute == at::kDouble)
      multiply<Number, double>(out, grad, expand_rows(scale), expand_rows(upstream));
    else if constexpr (!std::is_same_v<Number, double>)
      multiply<Number, float>(out, grad, expand_rows(scale), expand_rows(upstream));
  };
  if (dtype == at::kDouble) return dispatch(double());
  if (dtype == at::kFloat) return dispatch(float());
  if (dtype == at::kBFloat16) return dispatch(c10::BFloat16());
  return dispatch(c10::Half());
}

// Whether rescaling changes nothing: rows without a scale, and an upstream gradient that is the
// number 1, as it nearly always is for a mean or a sum.
inline bool is_identity(const at::Tensor& row_scale, const at::Tensor& grad_loss) {
  return row_scale.numel() == 0 && grad_loss.dim() == 0 && grad_loss.item().toDouble() == 1;
}

}  // namespace kdkernels::temperature_kl
