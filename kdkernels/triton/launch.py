"""What the launchers of all kernels share."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton.language as tl
from torch import Tensor


def device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of x. In the interpreter there is none."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def compile_options(num_warps: int) -> dict[str, int | bool]:
    """Options of the compiler. ptxas left alone spills a few registers to fit more programs on a processor; these kernels need none to wait on.
    Products and sums are fused whatever the default of the Triton release is."""
    options: dict[str, int | bool] = {"num_warps": num_warps, "enable_fp_fusion": True}
    if torch.version.hip is None:
        options["maxnreg"] = min(255, 65536 // (32 * num_warps))
    return options


def as_tl(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a compute dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def is_dense(x: Tensor) -> bool:
    """Whether the elements of x fill one stretch of memory, in whatever order of the dimensions."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride != step:
            return False
        step *= size
    return True
