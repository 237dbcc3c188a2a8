"""Builds the extension modules: kdkernels._C (schemas, derivatives) and the CPU kernels once per instruction set, kdkernels._cpu_<isa>.

KDKERNELS_CUDA=0 leaves the CUDA kernels out, KDKERNELS_CUDA=1 insists on them. KDKERNELS_ISAS="avx2,baseline" builds fewer instruction sets.
"""

import os
import platform
import shutil
from glob import glob

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        "kdkernels is compiled against the torch it will run with: install torch first, then pip install --no-build-isolation"
    ) from error

# Names, not -march=native: GCC 12 leaves AVX-512 out of `native` on the newest AMD processors, and a wheel must run elsewhere too.
ISA_FLAGS = {
    "x86_64": {
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "baseline": [],
    },
}.get(platform.machine(), {"baseline": []})  # aarch64: NEON is the baseline


def wants_cuda() -> bool:
    """CUDA kernels are built exactly when torch is a CUDA build and nvcc is found; a GPU need not be there."""
    choice = os.environ.get("KDKERNELS_CUDA", "")
    able = torch.version.cuda is not None and (cpp_extension.CUDA_HOME is not None or shutil.which("nvcc") is not None)
    if choice == "1" and not able:
        raise SystemExit(
            f"KDKERNELS_CUDA=1 needs a CUDA build of torch and nvcc; torch.version.cuda is {torch.version.cuda}, nvcc is {shutil.which('nvcc')}"
        )
    return able and choice != "0"


def extensions() -> list:
    isas = os.environ.get("KDKERNELS_ISAS", ",".join(ISA_FLAGS)).split(",")
    if not set(isas) <= set(ISA_FLAGS):
        raise SystemExit(f"KDKERNELS_ISAS must name some of {','.join(ISA_FLAGS)}, got {','.join(isas)}")
    cuda_archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0") if wants_cuda() and glob("csrc/*.cu") else ""
    kernels = sorted(glob("csrc/*_cpu.cpp"))
    shared = sorted(set(glob("csrc/*.cpp")) - set(kernels) - set(glob("csrc/*_cuda.cpp")))
    # -fopenmp is given to the compiler and not to the linker: the runtime must be the one torch has loaded, not a second one.
    flags = [
        "-O3",
        "-fopenmp",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-Wno-psabi",
        "-Wno-ignored-attributes",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
    ]
    defines = [("KDKERNELS_ISAS", f'"{",".join(isas)}"'), ("KDKERNELS_CUDA_ARCHS", f'"{cuda_archs}"')]
    modules = [cpp_extension.CppExtension("kdkernels._C", shared, define_macros=defines, extra_compile_args=flags)]
    for isa in isas:
        modules.append(cpp_extension.CppExtension(f"kdkernels._cpu_{isa}", kernels, extra_compile_args=flags + ISA_FLAGS[isa]))
    if cuda_archs:
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs
        modules.append(
            cpp_extension.CUDAExtension(
                "kdkernels._cuda",
                sorted(glob("csrc/*.cu") + glob("csrc/*_cuda.cpp")),
                extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden"], "nvcc": ["-O3", "-lineinfo", "--compiler-options=-fvisibility=hidden"]},
            )
        )
    return modules


class BuildExtension(cpp_extension.BuildExtension):
    def build_extension(self, ext):
        # The same source is compiled for several instruction sets: each module keeps its objects in a folder of its own.
        parent, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = parent


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
