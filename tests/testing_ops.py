"""Importing this module registers ops that only tests call.

They are the stages of the CPU kernels, and the CUDA kernels for CPU tensors. They are in separate
extension modules, kdkernels._testing and kdkernels._testing_<instruction set>, which no wheel
contains.
"""

import importlib

import kdkernels

try:
    for _module in ("kdkernels._testing", f"kdkernels._testing_{kdkernels.CPU_ISA}"):
        importlib.import_module(_module)
except ModuleNotFoundError as error:
    raise RuntimeError(
        f"{error.name} was not built, and this test needs it: build kdkernels with KDKERNELS_TESTING=1 in the environment, as make test does"
    ) from error
