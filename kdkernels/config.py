"""What was built, what is loaded, and where each op goes."""

from __future__ import annotations

import importlib
import importlib.util
import os

import torch

from . import _C

OPS = ("temperature_kl", "attention_pool", "truncated_svd", "align_singular_vectors", "rbf_correlation")
HAS_CUDA_KERNELS = importlib.util.find_spec("kdkernels._cuda") is not None
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


def release_memory() -> None:
    """Gives memory that freed large results left for the next ones (see ``KDKERNELS_KEEP_MB``) back to the system. What is in use stays."""
    from . import CPU_ISA

    importlib.import_module(f"kdkernels._cpu_{CPU_ISA}").release_memory()


def load_cuda_kernels() -> None:
    if HAS_CUDA_KERNELS:
        importlib.import_module("kdkernels._cuda")


def build_info() -> dict:
    """What was built and loaded, as a dict of strings: versions, compiler, instruction sets, and the backend of each op by device."""
    from . import CPU_ISA, __version__

    info = _C.build_info()
    triton = importlib.util.find_spec("triton") is not None
    backends = {"cpu": f"C++ ({CPU_ISA})", "cuda": "Triton" if triton else "unavailable: pip install triton"}
    svd = "Triton" if triton else "plain torch: pip install triton, or build the CUDA kernels"
    if HAS_CUDA_KERNELS:
        svd = f"CUDA C++, where a matrix exceeds its memory {svd}"
    return {
        "version": __version__,
        "torch": f"{torch.__version__} (built against {info['torch']})",
        "compiler": info["compiler"],
        "cpu_isas_built": info["isas"],
        "cpu_isa": CPU_ISA,
        "cuda_kernels": info["cuda_archs"] or "none built",
        "triton": triton_version() if triton else "not installed",
        "ops": {op: backends | ({"cuda": svd} if op in IN_CUDA else {}) for op in OPS},
    }


def triton_version() -> str:
    from importlib.metadata import version

    return version("triton")


def show_config() -> None:
    """Prints what is built, which instruction set is loaded, and what each op dispatches to."""
    info = build_info()
    ops = info.pop("ops")
    for key, value in info.items():
        print(f"{key.replace('_', ' '):<16}{value}")
    for op, backends in ops.items():
        print(f"{op}: " + ", ".join(f"{device} -> {backend}" for device, backend in backends.items()))
