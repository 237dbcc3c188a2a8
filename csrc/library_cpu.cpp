// The extension module with the CPU kernels of one instruction set. Importing it registers the
// kernels.
#include <pybind11/pybind11.h>

#include "common/memory.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CPU kernels of kdkernels for one instruction set";
  m.def("release_memory", kdkernels::release_memory, "Return the memory that is kept for future gradients to the system");
}
