"""Kernels that multiply a saved gradient of temperature_kl by the upstream gradient; launchers.

The forward pass has saved the gradient. A gradient of float16 logits was saved with a power of two
for each row (row_scale), by which it is also multiplied here.
"""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import Reduction
from .launch import as_tl, compile_options, device_of
from .rescale import rescale_
from .temperature_kl_checks import check_operands
from .temperature_kl_rows import Rows, aligned, aligned_rows, alignment_of_rows, as_rows, row_pointers, row_shape, store_gradient


@triton.jit
def _rescale_rows_kernel(
    gradients,  # Rows [rows, C]
    out,  # Rows [rows, C]
    row_scale_ptr,  # [rows] or None
    upstream_ptr,  # [] or [rows], see upstream_stride
    upstream_stride,  # 0 or 1
    mask_ptr,  # [rows] or None
    rows,
    classes,
    inner_size,
    SKIP_ONE: tl.constexpr,  # out is gradients and upstream is one number: do nothing if it is 1
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,  # see alignment_of_rows
):
    """Compute out = gradients * row_scale * upstream, rounded once."""
    if SKIP_ONE:
        rows = tl.where(tl.load(upstream_ptr) == 1.0, 0, rows)
    gradients, out, classes = aligned_rows(gradients, ALIGN), aligned_rows(out, ALIGN), aligned(classes, ALIGN)
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(classes, BLOCK)
    row = (program // blocks) * ROWS + tl.arange(0, ROWS)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_batch = row < rows
    inside = in_batch[:, None] & (column < classes)
    gradient = tl.load(row_pointers(gradients, row, inner_size) + column * gradients.class_stride, mask=inside, other=0.0).to(COMPUTE)
    if row_scale_ptr is not None:
        gradient = gradient * tl.load(row_scale_ptr + row, mask=in_batch, other=1.0).to(COMPUTE)[:, None]
    gradient = gradient * tl.load(upstream_ptr + row * upstream_stride, mask=in_batch, other=0.0).to(COMPUTE)[:, None]
    kept = in_batch
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + row, mask=in_batch, other=0).to(tl.int1)
    store_gradient(out, row, inner_size, column, gradient, kept[:, None], inside)


def _check_rescale(grad: Tensor, row_scale: Tensor, grad_loss: Tensor, mask: Tensor | None, dim: int) -> None:
    check_operands(grad, grad, None, mask, None, dim, grad_loss, Reduction.NONE if grad_loss.dim() else Reduction.SUM)
    rows = row_shape(grad, dim)
    if tuple(row_scale.shape) not in ((0,), rows) or row_scale.dtype != torch.float32:
        raise ValueError(f"row_scale must be float32 and empty or of shape {rows}, got {tuple(row_scale.shape)} of {row_scale.dtype}")


def rescale_sizes(classes: int, class_stride: int) -> dict[str, int]:
    """Return ROWS and BLOCK of the tiles of _rescale_rows_kernel.

    A tile has 1024 elements, along the dimension that is contiguous in memory.
    """
    block = triton.next_power_of_2(classes)
    return {"ROWS": max(1, 1024 // block), "BLOCK": min(block, 1024)} if class_stride == 1 else {"ROWS": 32, "BLOCK": min(block, 32)}


def _rescale(out: Tensor, grad: Tensor, row_scale: Tensor, grad_loss: Tensor, mask: Tensor | None, dim: int) -> None:
    if grad.numel() == 0:
        return
    layout = as_rows([grad, out], dim)
    if layout is None:  # rows with three strides or more: work on a copy with the classes last
        moved = grad.movedim(dim, -1).contiguous()
        _rescale(moved, moved, row_scale, grad_loss, mask, -1)
        out.copy_(moved.movedim(-1, dim))
        return
    inner_size, (gradients, results) = cast(tuple[int, list[Rows]], layout)
    classes = grad.shape[dim]
    rows = grad.numel() // classes
    scaled = tuple(row_scale.shape) == row_shape(grad, dim)
    per_row = grad_loss.dim() > 0
    sizes = rescale_sizes(classes, gradients.class_stride)
    with device_of(grad):
        _rescale_rows_kernel[(triton.cdiv(rows, sizes["ROWS"]) * triton.cdiv(classes, sizes["BLOCK"]),)](
            gradients, results, row_scale.contiguous() if scaled else None, grad_loss.contiguous(), int(per_row),
            None if mask is None else mask.contiguous().view(torch.uint8), rows, classes, inner_size,
            SKIP_ONE=out is grad and not scaled and not per_row, COMPUTE=as_tl(compute_dtype(grad, grad_loss)), **sizes,
            ALIGN=alignment_of_rows([gradients, results], classes), **compile_options(4),
        )  # fmt: skip


def temperature_kl_rescale(grad: Tensor, row_scale: Tensor, grad_loss: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """Implements kdkernels::temperature_kl_rescale."""
    _check_rescale(grad, row_scale, grad_loss, mask, dim)
    out = torch.empty_like(grad)
    _rescale(out, grad, row_scale, grad_loss, mask, dim)
    return out


def temperature_kl_rescale_(grad: Tensor, row_scale: Tensor, grad_loss: Tensor, mask: Tensor | None, dim: int) -> None:
    """Implements kdkernels::temperature_kl_rescale_."""
    _check_rescale(grad, row_scale, grad_loss, mask, dim)
    if row_scale.numel() == 0 and grad_loss.dim() == 0 and mask is None:
        rescale_(grad, grad_loss)
    else:
        _rescale(grad, grad, row_scale, grad_loss, mask, dim)
