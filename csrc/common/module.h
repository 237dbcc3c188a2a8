// Defines a Python extension module that exists to register ops. It uses Python's C API: the
// headers of pybind11 would take ten seconds to compile in each of the seven modules.
#pragma once

#include <Python.h>

#define KDKERNELS_MODULE(name, doc, methods) KDKERNELS_MODULE_(name, doc, methods)  // expands `name`, which is a macro
#define KDKERNELS_MODULE_(name, doc, methods)                                     \
  PyMODINIT_FUNC PyInit_##name() {                                                \
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, #name, doc, -1, methods}; \
    return PyModule_Create(&module);                                              \
  }
