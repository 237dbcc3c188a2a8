"""Reports which kernels were built, which are loaded, and which backend computes each op."""

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
except PackageNotFoundError:  # built in place in a source tree, but not installed
    VERSION = "0+unknown"

OPS = ("temperature_kl", "attention_pool", "truncated_svd", "align_singular_vectors", "rbf_correlation")
# Read from the build's record. The existence of kdkernels/_cuda*.so proves nothing: building in
# place without CUDA does not delete the module of an earlier build.
HAS_CUDA_KERNELS = bool(_C.build_info()["cuda_archs"]) and torch.version.cuda is not None
OPS_WITH_CUDA_KERNELS = ("truncated_svd", "align_singular_vectors")  # with an implementation "cuda", preferred if built


def load_cpu_kernels() -> str:
    """Import the CPU kernels for the best instruction set that was built and this CPU supports.

    The environment variable ``KDKERNELS_CPU_ISA`` selects another one, for tests and benchmarks.

    Returns:
        The name of the instruction set.

    Raises:
        ImportError: the selected kernels were not built, or this CPU cannot run them.
    """
    info = _C.build_info()
    built = info["isas"].split(",")
    preference = ["avx512", "avx2", "baseline"]
    supported = [isa for isa in preference[preference.index(info["best_isa"]) :] if isa in built]
    chosen = os.environ.get("KDKERNELS_CPU_ISA") or (supported[0] if supported else None)
    if chosen not in supported:
        raise ImportError(
            f"CPU kernels for {chosen!r} cannot run on this machine: KDKERNELS_CPU_ISA must be one of {supported} "
            f"(built: {built}, this CPU: {info['best_isa']})"
        )
    importlib.import_module(f"kdkernels._cpu_{chosen}")
    return chosen


CPU_ISA = load_cpu_kernels()


def release_memory() -> None:
    """Return to the system the memory that is kept for reuse by later large results.

    ``KDKERNELS_KEEP_MB`` limits how much memory is kept. Memory in use is not affected.
    """
    importlib.import_module(f"kdkernels._cpu_{CPU_ISA}").release_memory()


def load_cuda_kernels() -> None:
    if HAS_CUDA_KERNELS:
        importlib.import_module("kdkernels._cuda")


def has_image(capability: tuple[int, int], architectures: str) -> bool:
    """Return whether kernels built for these architectures run on a GPU of this compute capability.

    ``architectures`` is a list such as "8.0;9.0a;10.0+PTX". A cubin runs on its own compute
    capability and on later minor versions of the same major version. With "+PTX", the driver can
    compile the kernels for every later GPU. The suffix "a" restricts both to exactly one compute
    capability, the suffix "f" to one major version.
    """
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d)([af]?)(\+PTX)?", architectures):
        target = int(major), int(minor)
        same_or_later = capability >= target and (capability[0] == target[0] or (bool(ptx) and suffix != "f"))
        if capability == target or (same_or_later and suffix != "a"):
            return True
    return False


@functools.cache
def cuda_kernels_run_on(device: int | None) -> bool:
    """Return whether the CUDA kernels were built for this GPU.

    ``device`` is the index of the GPU; None is the current device.
    """
    return HAS_CUDA_KERNELS and has_image(torch.cuda.get_device_capability(device), _C.build_info()["cuda_archs"])


def cuda_kernels_status(
    architectures: str,  # of the build, such as "8.0;9.0;10.0+PTX"; empty if the CUDA kernels were not built
    without_cuda: str,  # why they were not built, and how to build them
    gpus: list[tuple[str, tuple[int, int]]],  # name and compute capability of each GPU that torch sees
    torch_cuda: str | None,  # torch.version.cuda
) -> str:
    """Describe in one sentence whether the CUDA kernels were built and run on these GPUs.

    If they cannot be used, the sentence says why and what to do.
    """
    if not architectures:
        return f"not built: {without_cuda}"
    if torch_cuda is None:
        return f"built for {architectures}, but this torch has no CUDA: install a CUDA build of torch, then build kdkernels again"
    if not gpus:
        return f"built for {architectures}; torch sees no GPU: if there is one, check its driver with nvidia-smi"
    unsupported = {f"{name} ({major}.{minor})": (major, minor) for name, (major, minor) in gpus if not has_image((major, minor), architectures)}
    if not unsupported:
        return f"built for {architectures}, used on " + ", ".join(dict.fromkeys(f"{name} ({major}.{minor})" for name, (major, minor) in gpus))
    problem = f"built for {architectures}, which does not run on {', '.join(unsupported)}, where Triton is used instead"
    missing = [f"{major}.{minor}" for major, minor in sorted(set(unsupported.values())) if (major, minor) >= (8, 0)]
    if not missing:
        return f"{problem}: the CUDA kernels need a GPU of compute capability 8.0 or later"
    return f"{problem}: build kdkernels again with TORCH_CUDA_ARCH_LIST='{';'.join([architectures, *missing])}'"


def build_info() -> dict:
    """Return what was built and loaded: versions, compiler, instruction sets, and backends.

    All values are strings, except "ops": {op: {device: backend}}.
    """
    info = _C.build_info()
    triton = importlib.util.find_spec("triton") is not None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)]
    backends, svd_backends = {"cpu": f"C++ ({CPU_ISA})"}, {}
    if torch.version.cuda is None and torch.version.hip is None:
        backends["cuda"] = "unavailable: install a build of torch with CUDA or ROCm"
    else:
        backends["cuda"] = "Triton" if triton else "unavailable: pip install triton"
        svd_backends["cuda"] = "Triton" if triton else "plain torch: pip install triton, or build the CUDA kernels"
        if HAS_CUDA_KERNELS and (not gpus or any(cuda_kernels_run_on(i) for i in range(count))):
            svd_backends["cuda"] = f"CUDA C++; for matrices that exceed the shared memory {svd_backends['cuda']}"
    backends["other devices"] = "reference in plain PyTorch"
    svd_backends["other devices"] = "plain PyTorch, with the fused op's derivative"
    return {
        "version": VERSION,
        "torch": f"{torch.__version__} (built against {info['torch']})",
        "compiler": info["compiler"],
        "cpu_isas_built": info["isas"],
        "cpu_isa": CPU_ISA,
        "cuda_kernels": cuda_kernels_status(info["cuda_archs"], info["without_cuda"], gpus, torch.version.cuda),
        "triton": triton_version() if triton else "not installed: pip install triton",
        "ops": {op: backends | (svd_backends if op in OPS_WITH_CUDA_KERNELS else {}) for op in OPS},
    }


def triton_version() -> str:
    return version("triton")


def show_config() -> None:
    """Print what was built, which instruction set is loaded, and the backend of each op."""
    info = build_info()
    ops = info.pop("ops")
    for key, value in info.items():
        print(f"{key.replace('_', ' '):<16}{value}")
    for op, backends in ops.items():
        print(f"{op}: " + ", ".join(f"{device} -> {backend}" for device, backend in backends.items()))
