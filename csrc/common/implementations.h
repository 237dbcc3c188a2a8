// Ops with several implementations, from which the caller can choose one by name. Each
// implementation is registered as a separate set of ops.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "check.h"

namespace kdkernels {

// The implementations that kdkernels.testing.implementation can select.
enum class Implementation { fastest, cuda, triton, torch };

inline Implementation parse_implementation(int64_t value) {
  return option<Implementation>("implementation", value,
                                {{Implementation::fastest, "fastest"},
                                 {Implementation::cuda, "cuda"},
                                 {Implementation::triton, "triton"},
                                 {Implementation::torch, "torch"}});
}

// The op `kdkernels::<op>_<implementation>`.
template <typename Signature>
c10::TypedOperatorHandle<Signature> implementation_op(const std::string& op, Implementation implementation) {
  const char* name = implementation == Implementation::cuda ? "_cuda" : implementation == Implementation::triton ? "_triton" : "_torch";
  return c10::Dispatcher::singleton().findSchemaOrThrow(("kdkernels::" + op + name).c_str(), "").typed<Signature>();
}

// The fallback kernel of an op of implementation "cuda", for devices without a registered kernel.
// Its error message says what is missing.
inline void raise_not_implemented(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  auto is_on_gpu = [](const c10::IValue& value) {
    if (value.isTensor()) return value.toTensor().is_cuda();
    return value.isTensorList() && !value.toTensorVector().empty() && value.toTensorVector()[0].is_cuda();
  };
  TORCH_CHECK_NOT_IMPLEMENTED(
      std::none_of(stack->begin(), stack->end(), is_on_gpu),
      "implementation \"cuda\" needs the CUDA kernels, which were not built: kdkernels.show_config() shows the reason");
  TORCH_CHECK_NOT_IMPLEMENTED(false,
                              "implementation \"cuda\" takes CUDA tensors. CPU tensors are for tests of its kernels: build kdkernels with "
                              "KDKERNELS_TESTING=1 and import kdkernels._testing");
}

inline torch::CppFunction without_cuda_kernels() {
  return torch::CppFunction::makeFromBoxedFunction<&raise_not_implemented>();
}

}  // namespace kdkernels
