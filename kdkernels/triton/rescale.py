"""Multiplies a gradient that the forward pass saved by the upstream gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from .launch import compile_options, device_of, is_dense, multiprocessors


@triton.jit(do_not_specialize=["count"])
def _rescale_kernel(grad_ptr, scale_ptr, count, BLOCK: tl.constexpr):
    """Compute grad *= scale in place. Return at once if scale is 1, as in a plain .backward()."""
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + at, mask=at < count)
            tl.store(grad_ptr + at, (grad.to(scale.dtype) * scale).to(grad.dtype), mask=at < count)


def rescale_(grad: Tensor, scale: Tensor) -> None:
    """Multiply grad by scale, a tensor with one element, in place and rounded once.

    If scale is 1, grad is not read. The host does not wait for the value of scale.
    """
    if not grad.numel():
        return
    if not is_dense(grad):
        grad.copy_(grad.to(compute_dtype(grad)) * scale.to(compute_dtype(grad)))
        return
    with device_of(grad):
        programs = min(triton.cdiv(grad.numel(), 4096), 8 * multiprocessors(grad))
        _rescale_kernel[(programs,)](grad, scale.to(compute_dtype(grad)), grad.numel(), BLOCK=4096, **compile_options(4))
