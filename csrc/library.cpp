// The extension module kdkernels._C: build information, and the best instruction set that the CPU
// supports. The source file of each op registers that op.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

// The best instruction set that this CPU supports, among those for which there are CPU kernels.
std::string best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);  // clang's __builtin_cpu_supports does not know f16c
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? "avx512" : avx2 ? "avx2" : "baseline";
#else
  return "baseline";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
  info["torch"] = TORCH_VERSION;
  info["isas"] = KDKERNELS_ISAS;
  info["best_isa"] = best_isa();
  info["cuda_archs"] = KDKERNELS_CUDA_ARCHS;
  info["without_cuda"] = KDKERNELS_WITHOUT_CUDA;  // why the CUDA kernels were not built
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", build_info);
}
