"""Builds the extension modules.

kdkernels._C contains the schemas and derivatives of the ops. kdkernels._cpu_<isa> contains the CPU
kernels, built once per instruction set. If torch is a CUDA build and a toolkit is found,
kdkernels._cuda with the CUDA kernels is built too (cuda_toolkit.py decides).

Environment variables:

- KDKERNELS_CUDA=0 omits the CUDA kernels. With KDKERNELS_CUDA=1 the build fails if they cannot be
  built.
- TORCH_CUDA_ARCH_LIST lists the GPU architectures of the CUDA kernels.
- KDKERNELS_ISAS="avx2,baseline" builds fewer instruction sets.
- KDKERNELS_UNITE=0 compiles each source separately.
- KDKERNELS_TESTING=1 adds kdkernels._testing, which the tests need.
- KDKERNELS_PIN_TORCH=1 is for wheels that are published: the wheel then requires the minor release
  of torch that it was compiled against, because it does not run with another one.
"""

import copy
import json
import os
import platform
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import setuptools

if int(setuptools.__version__.partition(".")[0]) < 77:  # older releases reject the licence in pyproject.toml with a 90-line error
    raise SystemExit(f"kdkernels is built with setuptools 77 or later, found {setuptools.__version__}: pip install 'setuptools>=77'")

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # pip does not put the folder of this file on the path
import cuda_toolkit

try:
    import torch
except ImportError as error:
    raise SystemExit(
        "kdkernels must be compiled against the torch that it will run with: install torch first, then use pip install --no-build-isolation"
    ) from error

# Explicit flags instead of -march=native: with GCC 12, `native` omits AVX-512 on the newest AMD
# processors, and a wheel must also run on other machines.
ISA_FLAGS = {
    "x86_64": {
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "baseline": [],
    },
}.get(platform.machine(), {"baseline": []})  # aarch64: NEON is the baseline


def plan_cuda() -> cuda_toolkit.Plan:
    """Decide whether and how to build the CUDA kernels, and print the decision.

    They are built if torch is a CUDA build and a toolkit of the same major version is found. No
    GPU is required.
    """

    def visible_gpus() -> list[tuple[int, int]]:
        return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]

    try:
        plan = cuda_toolkit.plan(torch.__version__, torch.version.cuda, os.environ, visible_gpus)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if plan.reason and os.environ.get("KDKERNELS_CUDA") == "1":
        raise SystemExit(f"KDKERNELS_CUDA=1 needs a CUDA build of torch and nvcc: {plan.reason}")
    for line in (*plan.notes, *([f"the CUDA kernels are not built: {plan.reason}"] if plan.reason else [])):
        print(f"kdkernels: {line}")
    return plan


CUDA = plan_cuda()
if CUDA.home:
    os.environ["CUDA_HOME"] = CUDA.home  # must be set before cpp_extension is imported, which looks for a toolkit once
from torch.utils import cpp_extension  # noqa: E402

if CUDA.home:
    cpp_extension.CUDA_HOME = CUDA.home  # in case cpp_extension was imported before


def extensions() -> list:
    isas = (os.environ.get("KDKERNELS_ISAS") or ",".join(ISA_FLAGS)).split(",")
    if not set(isas) <= set(ISA_FLAGS):
        raise SystemExit(f"KDKERNELS_ISAS must be a comma-separated list of instruction sets from {','.join(ISA_FLAGS)}, got {','.join(isas)}")
    build_facts = {"KDKERNELS_ISAS": ",".join(isas), "KDKERNELS_CUDA_ARCHS": ";".join(CUDA.architectures), "KDKERNELS_WITHOUT_CUDA": CUDA.reason}
    defines = [(name, c_string(value)) for name, value in build_facts.items()]
    ops = [path for path in sorted_glob("csrc/*/*.cpp") if Path(path).stem == Path(path).parent.name]
    modules = []
    for isa in isas:
        modules.append(extension(f"_cpu_{isa}", ["csrc/library_cpu.cpp", *sorted_glob("csrc/*/cpu.cpp")], ISA_FLAGS[isa], "-O3"))
    modules.append(extension("_C", ["csrc/library.cpp", *ops], define_macros=defines))
    if os.environ.get("KDKERNELS_TESTING") == "1":
        isa_sources = sorted_glob("csrc/testing/*_cpu.cpp")
        modules.append(extension("_testing", [path for path in sorted_glob("csrc/testing/*.cpp") if path not in isa_sources]))
        modules += [extension(f"_testing_{isa}", ["csrc/testing/library.cpp", *isa_sources], ISA_FLAGS[isa]) for isa in isas]
    if CUDA.architectures:
        cuda = cpp_extension.CUDAExtension(
            "kdkernels._cuda",
            [*sorted_glob("csrc/*/kernels.cu"), *sorted_glob("csrc/*/cuda.cpp"), "csrc/library_cuda.cpp"],
            extra_compile_args={
                "cxx": ["-O3", "-g0", "-fvisibility=hidden"],
                # torch adds its default architectures only if the flags name none.
                "nvcc": ["-O3", "-lineinfo", "--compiler-options=-fvisibility=hidden", *CUDA.nvcc_flags()],
            },
        )
        modules.insert(0, cuda)  # first, so that a build with a broken toolkit fails early
    return modules


def sorted_glob(pattern: str) -> list[str]:
    return sorted(glob(pattern))


def extension(name: str, files: list[str], flags: Sequence[str] = (), optimize: str = "-O2", **options):
    # Without -fopenmp: csrc/common/parallel.h calls the OpenMP runtime that torch has loaded.
    flags = [
        optimize,
        "-g0",  # Python's default flags request debug symbols: nine tenths of a module's size, half of its build time
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-Wno-psabi",
        "-Wno-ignored-attributes",
        "-Wno-unknown-warning-option",  # clang does not know each of these options
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
        *flags,
    ]
    module = cpp_extension.CppExtension(f"kdkernels.{name}", files, extra_compile_args=flags, **options)
    module.unite = os.environ.get("KDKERNELS_UNITE", "1") == "1"
    return module


def c_string(text: str) -> str:
    """Return a C string literal that ninja and the shell pass on unchanged ($ is special)."""
    return json.dumps(text.encode("ascii", "replace").decode()).replace("$", r"\044")


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles the sources of a module as one, because most sources take longer to parse torch's
    headers and to instantiate their templates than for the rest; and several modules at a time.

    KDKERNELS_UNITE=0 compiles each source separately: after a change to one source of a module,
    only this source is compiled again.
    """

    def finalize_options(self):
        super().finalize_options()
        self.parallel = self.parallel or int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

    def build_extension(self, ext):
        # The same source is compiled for several instruction sets, so each module has its own
        # folder of object files. The copy of this object keeps concurrent builds of other modules
        # apart.
        build = copy.copy(self)
        build.build_temp = os.path.abspath(os.path.join(self.build_temp, ext.name))
        if getattr(ext, "unite", False):
            ext.sources = [unite(ext.sources, Path(build.build_temp))]
        cpp_extension.BuildExtension.build_extension(build, ext)


def unite(sources: list[str], folder: Path) -> str:
    """Write a source file that includes the sources, and return its path."""
    path = folder / "sources.cpp"
    text = "".join(f'#include "{os.path.abspath(source)}"\n' for source in sources)
    if not path.exists() or path.read_text() != text:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(path)


class Distribution(setuptools.Distribution):
    def parse_config_files(self, *arguments, **options):
        super().parse_config_files(*arguments, **options)
        if os.environ.get("KDKERNELS_PIN_TORCH") == "1":
            release = ".".join(torch.__version__.split(".")[:2])
            requirements = [f"torch=={release}.*" if name.startswith("torch>=") else name for name in self.install_requires]
            self.install_requires = self.metadata.install_requires = requirements


def packages() -> list[str]:
    """Return every folder of kdkernels/ with an __init__.py, and the two packages outside it.

    package-dir in pyproject.toml maps these two.
    """
    return sorted({*setuptools.find_packages(include=["kdkernels", "kdkernels.*"]), "kdkernels.reference", "kdkernels.benches"})


setuptools.setup(packages=packages(), ext_modules=extensions(), cmdclass={"build_ext": BuildExtension}, distclass=Distribution)
