// The module that holds the CPU kernels of one instruction set: importing it registers them.
#include <pybind11/pybind11.h>

#include "common/memory.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CPU kernels of kdkernels for one instruction set";
  m.def("release_memory", kdkernels::release_memory, "Gives memory that is kept for the next gradient back to the system");
}
