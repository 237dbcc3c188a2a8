"""What was built, what is loaded, and where each op goes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from importlib.metadata import PackageNotFoundError, version

import torch

from . import _C

try:
    VERSION = version("kdkernels")
except PackageNotFoundError:  # a source tree on the path that was built in place but not installed
    VERSION = "0+unknown"

OPS = ("temperature_kl", "attention_pool", "truncated_svd", "align_singular_vectors", "rbf_correlation")
# What the build recorded counts, and not the file: a build in place without CUDA leaves the module of the one before where it is.
HAS_CUDA_KERNELS = bool(_C.build_info()["cuda_archs"]) and torch.version.cuda is not None
IN_CUDA = ("truncated_svd", "align_singular_vectors")  # have CUDA C++ kernels too, preferred where they were built


def load_cpu_kernels() -> str:
    """Imports the CPU kernels of the best instruction set that was built and this CPU has; returns its name.

    The environment variable ``KDKERNELS_CPU_ISA`` chooses another (for tests and benches).
    """
    info = _C.build_info()
    built = info["isas"].split(",")
    order = ["avx512", "avx2", "baseline"]
    usable = [isa for isa in order[order.index(info["best_isa"]) :] if isa in built]
    chosen = os.environ.get("KDKERNELS_CPU_ISA") or (usable[0] if usable else None)
    if chosen not in usable:
        raise ImportError(
            f"CPU kernels for {chosen!r} cannot run here: KDKERNELS_CPU_ISA must be one of {usable} (built: {built}, this CPU: {info['best_isa']})"
        )
    importlib.import_module(f"kdkernels._cpu_{chosen}")
    return chosen


CPU_ISA = load_cpu_kernels()


def release_memory() -> None:
    """Gives memory that freed large results left for the next ones (see ``KDKERNELS_KEEP_MB``) back to the system. What is in use stays."""
    importlib.import_module(f"kdkernels._cpu_{CPU_ISA}").release_memory()


def load_cuda_kernels() -> None:
    if HAS_CUDA_KERNELS:
        importlib.import_module("kdkernels._cuda")


def has_image(capability: tuple[int, int], architectures: str) -> bool:
    """Whether kernels built for such architectures ("8.0;9.0a;10.0+PTX") run on a GPU of this compute capability.

    A cubin runs on its own and later minor versions of the same major version, the driver compiles PTX for every later GPU. The suffix "a" binds both
    to exactly one capability, "f" to the major version.
    """
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", architectures):
        target = int(major), int(minor)
        later = capability >= target and (capability[0] == target[0] or (bool(ptx) and suffix != "f"))
        if capability == target or (later and suffix != "a"):
            return True
    return False


@functools.cache
def cuda_kernels_run_on(device: int | None) -> bool:
    """Whether the CUDA kernels were built, and for the architecture of this GPU; None is the current one."""
    return HAS_CUDA_KERNELS and has_image(torch.cuda.get_device_capability(device), _C.build_info()["cuda_archs"])


def cuda_kernels_status(
    architectures: str,  # built for, as "8.0;9.0;10.0+PTX"; empty where the CUDA kernels were not built
    without_cuda: str,  # why they were not built, and what to do
    gpus: list[tuple[str, tuple[int, int]]],  # name and compute capability of each GPU that torch sees
    torch_cuda: str | None,  # torch.version.cuda
) -> str:
    """One sentence: what the CUDA kernels were built for and whether they run on these GPUs, or why they are not there; and what to do."""
    if not architectures:
        return f"not built: {without_cuda}"
    if torch_cuda is None:
        return f"built for {architectures}, but this torch has no CUDA: install a CUDA build of torch, then build kdkernels again"
    if not gpus:
        return f"built for {architectures}; torch sees no GPU: if there is one, check its driver with nvidia-smi"
    unserved = {f"{name} ({major}.{minor})": (major, minor) for name, (major, minor) in gpus if not has_image((major, minor), architectures)}
    if not unserved:
        return f"built for {architectures}, used on " + ", ".join(dict.fromkeys(f"{name} ({major}.{minor})" for name, (major, minor) in gpus))
    start = f"built for {architectures}, which does not run on {', '.join(unserved)}, where Triton is used instead"
    missing = [f"{major}.{minor}" for major, minor in sorted(set(unserved.values())) if (major, minor) >= (8, 0)]
    if not missing:
        return f"{start}: the CUDA kernels need a GPU of compute capability 8.0 or later"
    return f"{start}: build kdkernels again with TORCH_CUDA_ARCH_LIST='{';'.join([architectures, *missing])}'"


def build_info() -> dict:
    """What was built and loaded, as a dict of strings: versions, compiler, instruction sets, and the backend of each op by device."""
    info = _C.build_info()
    triton = importlib.util.find_spec("triton") is not None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]
    backends, svd = {"cpu": f"C++ ({CPU_ISA})"}, {}
    if torch.version.cuda is None and torch.version.hip is None:
        backends["cuda"] = "unavailable: install a build of torch with CUDA or ROCm"
    else:
        backends["cuda"] = "Triton" if triton else "unavailable: pip install triton"
        svd["cuda"] = "Triton" if triton else "plain torch: pip install triton, or build the CUDA kernels"
        if HAS_CUDA_KERNELS and (not gpus or any(cuda_kernels_run_on(i) for i in range(count))):
            svd["cuda"] = f"CUDA C++, where a matrix exceeds its memory {svd['cuda']}"
    backends["other devices"] = "reference in plain PyTorch"
    svd["other devices"] = "plain PyTorch, with the fused op's derivative"
    return {
        "version": VERSION,
        "torch": f"{torch.__version__} (built against {info['torch']})",
        "compiler": info["compiler"],
        "cpu_isas_built": info["isas"],
        "cpu_isa": CPU_ISA,
        "cuda_kernels": cuda_kernels_status(info["cuda_archs"], info["without_cuda"], gpus, torch.version.cuda),
        "triton": triton_version() if triton else "not installed: pip install triton",
        "ops": {op: backends | (svd if op in IN_CUDA else {}) for op in OPS},
    }


def triton_version() -> str:
    return version("triton")


def show_config() -> None:
    """Prints what is built, which instruction set is loaded, and what each op dispatches to."""
    info = build_info()
    ops = info.pop("ops")
    for key, value in info.items():
        print(f"{key.replace('_', ' '):<16}{value}")
    for op, backends in ops.items():
        print(f"{op}: " + ", ".join(f"{device} -> {backend}" for device, backend in backends.items()))
