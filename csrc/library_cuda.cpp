// The module that holds the CUDA kernels: importing it registers them.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA kernels of kdkernels";
}
