// The modules that contain the ops for tests; importing one registers its ops. kdkernels._testing
// has the CUDA kernels on the host, kdkernels._testing_<isa> has the stages of the CPU kernels for
// one instruction set.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "ops of kdkernels for its tests";
}
