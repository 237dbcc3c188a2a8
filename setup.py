"""Builds the extension modules.

kdkernels._C contains the schemas and derivatives of the ops. kdkernels._cpu_<isa> contains the CPU
kernels, built once per instruction set. If torch is a CUDA build and a toolkit is found,
kdkernels._cuda with the CUDA kernels is built too (cuda_toolkit.py decides).

Environment variables:

- KDKERNELS_CUDA=0 omits the CUDA kernels. With KDKERNELS_CUDA=1 the build fails if they cannot be
  built.
- TORCH_CUDA_ARCH_LIST lists the GPU architectures of the CUDA kernels.
- KDKERNELS_ISAS="avx2,baseline" builds fewer instruction sets.
- KDKERNELS_TESTING=1 adds kdkernels._testing, which the tests need.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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

    They are built if torch is a CUDA build and a toolkit of the same major version is found. No GPU is
    required.
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
    isas = os.environ.get("KDKERNELS_ISAS", ",".join(ISA_FLAGS)).split(",")
    if not set(isas) <= set(ISA_FLAGS):
        raise SystemExit(f"KDKERNELS_ISAS must be a comma-separated list of instruction sets from {','.join(ISA_FLAGS)}, got {','.join(isas)}")
    build_facts = {"KDKERNELS_ISAS": ",".join(isas), "KDKERNELS_CUDA_ARCHS": ";".join(CUDA.architectures), "KDKERNELS_WITHOUT_CUDA": CUDA.reason}
    defines = [(name, c_string(value)) for name, value in build_facts.items()]
    ops = [path for path in sorted_glob("csrc/*/*.cpp") if Path(path).stem == Path(path).parent.name]
    modules = [extension("_C", ["csrc/library.cpp", *ops], precompile="derivatives.h", define_macros=defines)]
    for isa in isas:
        kernels = ["csrc/library_cpu.cpp", *sorted_glob("csrc/*/cpu.cpp")]
        modules.append(extension(f"_cpu_{isa}", kernels, ISA_FLAGS[isa], precompile="kernels.h"))
    if os.environ.get("KDKERNELS_TESTING") == "1":
        isa_sources = sorted_glob("csrc/testing/*_cpu.cpp")
        modules.append(extension("_testing", [path for path in sorted_glob("csrc/testing/*.cpp") if path not in isa_sources], precompile="kernels.h"))
        modules += [extension(f"_testing_{isa}", ["csrc/testing/library.cpp", *isa_sources], ISA_FLAGS[isa], precompile="kernels.h") for isa in isas]
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


def extension(name: str, files: list[str], flags: Sequence[str] = (), precompile: str = "", **options):
    # -fopenmp is passed only to the compiler, not to the linker: the extension must use the OpenMP
    # runtime that torch has loaded, and not load a second one.
    flags = [
        "-O3",
        "-g0",  # Python's default flags request debug symbols: nine tenths of a module's size, half of its build time
        "-fopenmp",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-Wno-psabi",
        "-Wno-ignored-attributes",
        "-Wno-uninitialized",
        "-Wno-maybe-uninitialized",
        *flags,
    ]
    module = cpp_extension.CppExtension(f"kdkernels.{name}", files, extra_compile_args=flags, **options)
    module.precompile = precompile  # the name of a header in csrc/precompiled
    return module


def c_string(text: str) -> str:
    """Return a C string literal that ninja (for which $ is special) and the shell pass on unchanged."""
    return json.dumps(text.encode("ascii", "replace").decode()).replace("$", r"\044")


class BuildExtension(cpp_extension.BuildExtension):
    def build_extensions(self):
        self.precompile_headers()
        super().build_extensions()

    def build_extension(self, ext):
        # The same source is compiled for several instruction sets, so each module has its own folder of object files.
        parent, self.build_temp = self.build_temp, os.path.abspath(os.path.join(self.build_temp, ext.name))
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = parent

    def precompile_headers(self):
        """Compile torch's headers once for all sources with the same flags: parsing them takes longer than compiling most sources.

        GCC uses a precompiled header if its flags are those of the source, and parses the header itself otherwise.
        """
        compiler = cpp_extension.get_cxx_compiler()
        if "Free Software Foundation" not in subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout:
            return
        commands = {}
        for ext in self.extensions:
            header = getattr(ext, "precompile", "")
            if header:
                includes = [f"-I{folder}" for folder in (*self.compiler.include_dirs, *ext.include_dirs)]
                flags = [*self.compiler.compiler_so[1:], *includes, *ext.extra_compile_args, "-std=c++20"]
                key = hashlib.sha256(f"{compiler} {torch.version.git_version} {flags} {Path('csrc/precompiled', header).read_text()}".encode())
                copy = Path(os.path.abspath(self.build_temp), "precompiled", key.hexdigest()[:16], header)
                commands[copy] = [compiler, *flags, "-x", "c++-header", str(copy)]
                ext.extra_compile_args += ["-include", str(copy)]

        def precompile(copy: Path):
            compiled = copy.with_suffix(".h.gch")
            if not compiled.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(Path("csrc/precompiled", copy.name), copy)
                subprocess.run([*commands[copy], "-o", f"{compiled}.part"], check=True)
                os.replace(f"{compiled}.part", compiled)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(precompile, commands))


def packages() -> list[str]:
    """Return every folder of kdkernels/ with an __init__.py, and the two packages that are outside it.

    package-dir in pyproject.toml maps these two.
    """
    return sorted({*setuptools.find_packages(include=["kdkernels", "kdkernels.*"]), "kdkernels.reference", "kdkernels.benches"})


setuptools.setup(packages=packages(), ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
