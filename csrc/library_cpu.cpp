// The extension module with the CPU kernels of one instruction set. Importing it registers the
// kernels.
#include "common/module.h"

#include "common/memory.h"

namespace {

PyObject* release_memory(PyObject*, PyObject*) {
  kdkernels::release_memory();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"release_memory", release_memory, METH_NOARGS, "Return the memory that is kept for future gradients to the system"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

KDKERNELS_MODULE(TORCH_EXTENSION_NAME, "CPU kernels of kdkernels for one instruction set", methods)
