"""Helpers of the launchers of all kernels."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton.language as tl
from torch import Tensor


def device_of(x: Tensor) -> AbstractContextManager:
    """Return a context in which Triton launches on the device of x.

    Triton launches on the current device. Tensors on the CPU (the interpreter) need no context.
    """
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def multiprocessors(x: Tensor) -> int:
    """Return the number of multiprocessors of the device of x."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def compile_options(num_warps: int) -> dict[str, int | bool]:
    """Return options for Triton's compiler.

    ``maxnreg`` allows as many registers as possible. By default, ptxas spills a few registers so
    that more programs fit on a multiprocessor, which does not make these kernels faster.
    ``enable_fp_fusion`` fuses products and sums in every Triton release, whatever its default.
    """
    options: dict[str, int | bool] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if torch.version.hip is None:
        options["maxnreg"] = min(255, 65536 // (32 * num_warps))
    return options


def as_tl(dtype: torch.dtype) -> tl.dtype:
    """Return the Triton dtype of a compute dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def is_dense(x: Tensor) -> bool:
    """Return whether x fills one contiguous block of memory, with the dimensions in any order."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride != step:
            return False
        step *= size
    return True
