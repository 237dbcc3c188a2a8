"""Checks a build of the CUDA kernels. No GPU is needed.

Usage: python check_cuda_build.py. kdkernels must be installed, built with KDKERNELS_CUDA=1 against
a CUDA build of torch. `make cuda-check` makes such a build and calls this script. It checks that

- the extension module kdkernels._cuda has no undefined symbols: it is loaded with RTLD_NOW, after
  torch, so that the dynamic linker resolves every symbol at once;
- importing it registers the ops of csrc/*/cuda.cpp for the dispatch key CUDA;
- it contains every kernel of csrc/*/kernels.cu, compiled for each architecture of the build, and
  PTX for the architectures that were requested with "+PTX";
- kdkernels.show_config() says that the CUDA kernels are built.

The script prints what it checked. It fails with a list of everything that is wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cuda_sources import BUDGET, SOURCES, binary_tool, kernel_name


def registered_ops(sources: Path = SOURCES) -> list[str]:
    """Return the names of the ops that csrc/*/cuda.cpp registers."""
    return sorted(name for path in sources.glob("*/cuda.cpp") for name in re.findall(r'm\.impl\("(\w+)"', path.read_text()))


def kernel_templates(sources: Path = SOURCES) -> set[str]:
    """Return the names of the kernels in csrc/*/kernels.cu, without template arguments."""
    text = "".join(path.read_text() for path in sources.glob("*/kernels.cu"))
    return set(re.findall(r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\(", text))


def kernels_by_architecture(dump: str) -> dict[str, set[str]]:
    """Return the kernels, with template arguments, in each architecture's images of a library.

    The dump is the output of `cuobjdump -symbols` for machine code, or `cuobjdump -ptx` for PTX.
    """
    found: dict[str, set[str]] = {}
    for image in re.split(r"^arch = ", dump, flags=re.M)[1:]:
        mangled = re.findall(r"STO_ENTRY\s+(_Z\w+)", image) + re.findall(r"^\s*(?:\.\w+ )*\.entry (_Z\w+)", image, flags=re.M)
        if mangled:
            found.setdefault(image.split(maxsplit=1)[0], set()).update(kernel_name(name) for name in mangled)
    return found


def image_problems(architectures: Iterable[str], found: Mapping[str, set[str]], ptx: Mapping[str, set[str]], expected: set[str]) -> list[str]:
    """Return what is missing, for architectures of the build such as "9.0" or "10.0+PTX".

    `found` and `ptx` are the kernels in the machine code and in the PTX of each architecture.
    """
    problems = []
    for architecture in architectures:
        target = "sm_" + architecture.removesuffix("+PTX").replace(".", "")
        kinds = [("machine code", found)] + ([("PTX", ptx)] if architecture.endswith("+PTX") else [])
        for kind, kernels in kinds:
            missing = sorted(expected - kernels.get(target, set()))
            if target not in kernels:
                problems.append(f"there is no {kind} for {target}; there is some for {', '.join(sorted(kernels)) or 'no architecture'}")
            elif missing:
                problems.append(f"the {kind} for {target} lacks the kernels {', '.join(missing)}")
    return problems


def _dump(kind: str, library: Path) -> str:
    command = [binary_tool("cuobjdump"), kind, str(library)]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{run.stdout}{run.stderr}")
    return run.stdout


def main() -> None:
    import torch

    import kdkernels
    from kdkernels import _C, config

    built_for = _C.build_info()["cuda_archs"]
    if torch.version.cuda is None:
        raise SystemExit(f"torch {torch.__version__} is not a CUDA build: install one, and build kdkernels again with KDKERNELS_CUDA=1")
    if not built_for:
        raise SystemExit(f"kdkernels was built without the CUDA kernels: {_C.build_info()['without_cuda']}")
    architectures = built_for.split(";")
    libraries = sorted(Path(kdkernels.__file__).parent.glob("_cuda*.so"))
    if len(libraries) != 1:
        raise SystemExit(f"expected one file kdkernels/_cuda*.so, found {[str(path) for path in libraries]}")
    library, problems = libraries[0], []
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}; GPUs that torch sees: {torch.cuda.device_count()}")
    print(f"{library.name}: {library.stat().st_size / 2**20:.1f} MiB, built for {built_for}")

    try:
        ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        print("undefined symbols: none (loaded with RTLD_NOW)")
    except OSError as error:
        problems.append(f"the library cannot be loaded: {error}")
    if not problems:
        config.load_cuda_kernels()
        ops = registered_ops()
        missing = [op for op in ops if not torch._C._dispatch_has_kernel_for_dispatch_key(f"kdkernels::{op}", "CUDA")]
        if missing or not ops:
            problems.append(f"not registered for the dispatch key CUDA: {', '.join(missing) or 'csrc/*/cuda.cpp registers no op'}")
        else:
            print(f"registered for the dispatch key CUDA: {len(ops)} ops: {', '.join(ops)}")

    machine_code, ptx = kernels_by_architecture(_dump("-symbols", library)), kernels_by_architecture(_dump("-ptx", library))
    expected = set(next(iter(json.loads(BUDGET.read_text()).values())))
    templates, instances = kernel_templates(), {name.partition("<")[0] for name in expected}
    if templates != instances:
        problems.append(f"csrc/*/kernels.cu has the kernels {sorted(templates)}, but {BUDGET.name} has instances of {sorted(instances)}")
    for kind, found in (("machine code", machine_code), ("PTX", ptx)):
        for architecture, kernels in sorted(found.items()):
            print(f"{kind} for {architecture}: {len(kernels)} kernels")
    problems += image_problems(architectures, machine_code, ptx, expected)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        kdkernels.show_config()
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("cuda kernels")]
    print("\n".join(lines))
    if len(lines) != 1 or f"built for {built_for}" not in lines[0] or "truncated_svd: cpu" not in printed.getvalue():
        problems.append(f"kdkernels.show_config() does not say that the CUDA kernels are built for {built_for}:\n{printed.getvalue()}")
    if "CUDA C++" not in printed.getvalue():
        problems.append("kdkernels.show_config() does not name the implementation CUDA C++ for truncated_svd")
    if problems:
        raise SystemExit("the build of the CUDA kernels is not complete:\n" + "\n".join(f"- {problem}" for problem in problems))
    print(f"the build of the CUDA kernels is complete: {len(expected)} kernels for each of {', '.join(architectures)}")


if __name__ == "__main__":
    main()
