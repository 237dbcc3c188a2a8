// Drivers: implementations of one op that a caller may ask for by name, each a set of ops of its own.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

namespace kdkernels {

// The op of a driver: an implementation that is asked for by name, for tests and benches.
template <typename Signature>
c10::TypedOperatorHandle<Signature> driver_op(const std::string& op, c10::string_view driver) {
  const std::string name(driver);
  TORCH_CHECK_VALUE(name == "cuda" || name == "triton" || name == "torch", "driver must be cuda, triton or torch, got ", name);
  return c10::Dispatcher::singleton().findSchemaOrThrow(("kdkernels::" + op + "_" + name).c_str(), "").typed<Signature>();
}

// What an op of driver "cuda" does on a device for which no kernel is registered: says what is missing.
inline void say_what_is_missing(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  auto on_gpu = [](const c10::IValue& value) {
    if (value.isTensor()) return value.toTensor().is_cuda();
    return value.isTensorList() && !value.toTensorVector().empty() && value.toTensorVector()[0].is_cuda();
  };
  TORCH_CHECK_NOT_IMPLEMENTED(std::none_of(stack->begin(), stack->end(), on_gpu),
                              "driver=\"cuda\" needs the CUDA kernels, which were not built: kdkernels.show_config() says why");
  TORCH_CHECK_NOT_IMPLEMENTED(false,
                              "driver=\"cuda\" takes CUDA tensors. CPU tensors are for tests of its kernels: build kdkernels with "
                              "KDKERNELS_TESTING=1 and import kdkernels._testing");
}

inline torch::CppFunction without_cuda_kernels() {
  return torch::CppFunction::makeFromBoxedFunction<&say_what_is_missing>();
}

}  // namespace kdkernels
