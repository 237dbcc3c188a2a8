// The extension module with the CUDA kernels. Importing it registers the kernels.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA kernels of kdkernels";
}
