"""Triton kernel of temperature_kl and its launchers: the GPU version of csrc/temperature_kl.cpp.

docs/temperature_kl.md derives the formulas. temperature_kl_rows.py reads and writes rows,
temperature_kl_divergence.py computes the statistics of a row, temperature_kl_forms.py computes
values and gradients from the statistics, and temperature_kl_rescale.py multiplies a gradient that
the forward pass saved by the upstream gradient. temperature_kl_fast.py has faster kernels for the
most common call.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import Direction, Reduction
from . import temperature_kl_fast
from .launch import as_tl, compile_options, device_of, multiprocessors
from .math import cast_scalar
from .temperature_kl_checks import check_operands
from .temperature_kl_divergence import divergence
from .temperature_kl_fast import LEFT
from .temperature_kl_forms import SUM_UNIT, jsd_gradients, jsd_means, kl_gradients, kl_means
from .temperature_kl_rescale import temperature_kl_rescale, temperature_kl_rescale_  # noqa: F401  the same set of ops
from .temperature_kl_rows import (
    Rows,
    Tile,
    aligned,
    aligned_rows,
    alignment_of_rows,
    as_rows,
    block_logits,
    columns,
    powers_of_two,
    read_logits,
    row_pointers,
    row_shape,
    store_gradient,
)


@triton.jit
def _block_gradients(
    tile, held, start, stats, means, beta, eps, gradient_scale,
    JSD: tl.constexpr, HAS_EPS: tl.constexpr, ENTROPY: tl.constexpr, COMPUTE: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients with respect to the base and the other logits of a block.

    Also returns the sums over each row of logits times gradients, multiplied by SUM_UNIT.
    """
    base, other, in_row = block_logits(tile, held, start, COMPUTE, ONE_BLOCK, BLOCK)
    if JSD:
        grad_base, grad_other = jsd_gradients(base, other, in_row, tile, stats, means, beta)
    else:
        grad_base, grad_other = kl_gradients(base, other, in_row, tile, stats, means, eps, HAS_EPS, ENTROPY)
    grad_base, grad_other = tl.where(in_row, grad_base, 0.0), tl.where(in_row, grad_other, 0.0)
    base_products = tl.where(grad_base == 0.0, 0.0, grad_base * SUM_UNIT * ((base - stats.base_max) * tile.inverse_t))
    other_products = tl.where(grad_other == 0.0, 0.0, grad_other * SUM_UNIT * (other - stats.other_max))
    products = tl.sum(other_products, 1, keep_dims=True), tl.sum(base_products, 1, keep_dims=True)
    return grad_base * (gradient_scale * tile.inverse_t), grad_other * gradient_scale, products


@triton.jit
def _kl_rows(
    block, base, other, grad_base, grad_other, row_scale_ptr, loss_ptr, grad_temperature_ptr, temperature_ptr, mask_ptr, weight_ptr, upstream_ptr,
    upstream_stride, state_ptr, temperature, weight, beta, eps, rows, classes, inner_size,
    JSD: tl.constexpr, HAS_EPS: tl.constexpr, ENTROPY: tl.constexpr, T_SQUARED: tl.constexpr, SCALE_BASE: tl.constexpr, COMPUTE: tl.constexpr,
    ONE_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the rows of a block; see _kl_kernel for the arguments."""
    row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = row < rows
    if state_ptr is not None:
        in_batch = in_batch & (tl.load(state_ptr + row, mask=in_batch, other=0) == LEFT)
    kept = in_batch
    if mask_ptr is not None:
        kept = in_batch & tl.load(mask_ptr + row, mask=in_batch, other=0).to(tl.int1)
    t = tl.full([ROWS], 1.0, COMPUTE) * cast_scalar(temperature, COMPUTE)
    if temperature_ptr is not None:
        t = tl.load(temperature_ptr + row, mask=in_batch, other=1.0).to(COMPUTE)
    quarter_t = (t * 0.25)[:, None]
    tile = Tile(
        base=row_pointers(base, row, inner_size), other=row_pointers(other, row, inner_size), base_stride=base.class_stride,
        other_stride=other.class_stride, kept=kept[:, None], classes=classes, quarter_t=quarter_t, inverse_t=1.0 / quarter_t,
    )  # fmt: skip
    held = read_logits(tile, 0, COMPUTE, BLOCK) if ONE_BLOCK else None
    stats = divergence(tile, held, JSD, COMPUTE, ONE_BLOCK, BLOCK)
    eps = cast_scalar(eps, COMPUTE)
    GRADIENTS: tl.constexpr = grad_base is not None or grad_other is not None or grad_temperature_ptr is not None
    if JSD:
        means = jsd_means(tile, held, stats, beta, GRADIENTS, COMPUTE, ONE_BLOCK, BLOCK)
    else:
        means = kl_means(tile, held, stats, eps, HAS_EPS, ENTROPY, COMPUTE, ONE_BLOCK, BLOCK)

    # V is value / T, and dV / dT is -products / T.
    row_value = tl.sum(means.value, 1)
    if loss_ptr is not None:
        loss = (row_value * t if T_SQUARED else row_value / t) * (4.0 / SUM_UNIT)
        tl.store(loss_ptr + row, tl.where(kept, loss, 0.0), mask=in_batch)
    if GRADIENTS:
        row_weight = tl.full([ROWS], 1.0, COMPUTE) * cast_scalar(weight, COMPUTE)
        if weight_ptr is not None:
            row_weight = row_weight * tl.load(weight_ptr).to(COMPUTE)
        if upstream_ptr is not None:
            row_weight = row_weight * tl.load(upstream_ptr + row * upstream_stride, mask=in_batch, other=0.0).to(COMPUTE)
        gradient_scale = (row_weight * t if T_SQUARED else row_weight / t)[:, None]
        gradient_factor = tl.full([ROWS, 1], 1.0, COMPUTE)
        if row_scale_ptr is not None:  # compute the gradient twice, because its largest magnitude is needed first
            largest = tl.zeros([ROWS, 1], COMPUTE)
            for start in range(0, classes, BLOCK):
                g_base, g_other, products = _block_gradients(
                    tile, held, start, stats, means, beta, eps, gradient_scale, JSD, HAS_EPS, ENTROPY, COMPUTE, ONE_BLOCK, BLOCK
                )
                scaled = g_base if SCALE_BASE else g_other
                largest = tl.maximum(largest, tl.max(tl.where(tile.kept, tl.abs(scaled), 0.0), 1, keep_dims=True))
            powers, gradient_factor = powers_of_two(largest)
            tl.store(row_scale_ptr + row, tl.sum(powers, 1), mask=in_batch)
        total = tl.zeros([ROWS, 1], COMPUTE)
        for start in range(0, classes, BLOCK):
            g_base, g_other, products = _block_gradients(
                tile, held, start, stats, means, beta, eps, gradient_scale, JSD, HAS_EPS, ENTROPY, COMPUTE, ONE_BLOCK, BLOCK
            )
            if grad_temperature_ptr is not None:
                total = total + products[0] + products[1]
            column = columns(start, BLOCK)
            written = in_batch[:, None] & (column < classes)
            if grad_base is not None:
                store_gradient(grad_base, row, inner_size, column, g_base * gradient_factor if SCALE_BASE else g_base, tile.kept, written)
            if grad_other is not None:
                store_gradient(grad_other, row, inner_size, column, g_other if SCALE_BASE else g_other * gradient_factor, tile.kept, written)
        if grad_temperature_ptr is not None:
            row_products = tl.sum(total, 1)
            grad_temperature = 2.0 * row_value - row_products if T_SQUARED else -row_products / t / t
            grad_temperature = (grad_temperature * row_weight) * (4.0 / SUM_UNIT)
            tl.store(grad_temperature_ptr + row, tl.where(kept, grad_temperature, 0.0).to(grad_temperature_ptr.dtype.element_ty), mask=in_batch)


@triton.jit
def _kl_kernel(
    base,  # Rows of logits [rows, C]: the teacher's in "forward" and "jsd", the student's in "reverse"
    other,  # Rows of logits [rows, C]: the other network's
    grad_base,  # Rows, or None if this gradient is not wanted
    grad_other,
    row_scale_ptr,  # [rows] float32, or None: the powers of two by which the rows of one gradient are divided
    loss_ptr,  # [rows], or None
    grad_temperature_ptr,  # [rows], or None
    temperature_ptr,  # [rows], or None: all rows use `temperature`
    mask_ptr,  # [rows], or None
    weight_ptr,  # [], or None: a factor of `weight`
    upstream_ptr,  # [] or [rows] (see upstream_stride), or None: gradient of the loss
    upstream_stride,  # 0 or 1
    state_ptr,  # [rows], or None: the states of rows, of which only those that are LEFT are computed
    left_ptr,  # [], or None: the number of rows that are LEFT
    temperature: tl.float64,
    weight: tl.float64,  # of a row in the loss
    beta: tl.float64,
    eps: tl.float64,
    rows,
    classes,
    inner_size,
    JSD: tl.constexpr,
    HAS_EPS: tl.constexpr,
    ENTROPY: tl.constexpr,
    T_SQUARED: tl.constexpr,
    SCALE_BASE: tl.constexpr,  # row_scale belongs to the gradient of the base network, not to that of the other
    COMPUTE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,  # see alignment_of_rows
):
    """Compute the losses of rows, and the gradients of the logits of both networks and of T."""
    base, other, classes = aligned_rows(base, ALIGN), aligned_rows(other, ALIGN), aligned(classes, ALIGN)
    if grad_base is not None:
        grad_base = aligned_rows(grad_base, ALIGN)
    if grad_other is not None:
        grad_other = aligned_rows(grad_other, ALIGN)
    if left_ptr is None:
        _kl_rows(
            tl.program_id(0), base, other, grad_base, grad_other, row_scale_ptr, loss_ptr, grad_temperature_ptr, temperature_ptr, mask_ptr,
            weight_ptr, upstream_ptr, upstream_stride, state_ptr, temperature, weight, beta, eps, rows, classes, inner_size,
            JSD, HAS_EPS, ENTROPY, T_SQUARED, SCALE_BASE, COMPUTE, ONE_BLOCK, ROWS, BLOCK,
        )  # fmt: skip
    elif tl.load(left_ptr) > 0:
        for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
            row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
            if tl.max(tl.load(state_ptr + row, mask=row < rows, other=0), 0) == LEFT:
                _kl_rows(
                    block, base, other, grad_base, grad_other, row_scale_ptr, loss_ptr, grad_temperature_ptr, temperature_ptr, mask_ptr,
                    weight_ptr, upstream_ptr, upstream_stride, state_ptr, temperature, weight, beta, eps, rows, classes, inner_size,
                    JSD, HAS_EPS, ENTROPY, T_SQUARED, SCALE_BASE, COMPUTE, ONE_BLOCK, ROWS, BLOCK,
                )  # fmt: skip


def block_sizes(classes: int, class_stride: int, double: bool = False) -> dict[str, int | bool]:
    """Return ROWS, BLOCK and ONE_BLOCK of the tiles, and the compiler options.

    With 4 logits per thread (2 in float64), every variant of the kernel fits the registers.
    """
    block = max(16, triton.next_power_of_2(classes))
    tile, max_block = (256, 256) if double else (512, 2048)
    if class_stride == 1:
        one_block = block <= max_block
        block = min(block, max_block)
        rows = max(1, tile // block)
    else:  # rows are adjacent in memory: read whole memory sectors
        rows = 16 if double else 32
        one_block = block * rows <= tile
        block = min(block, tile // rows)
    num_warps = max(1, rows * block // (32 * (2 if double else 4)))
    return {"ROWS": rows, "BLOCK": block, "ONE_BLOCK": one_block} | compile_options(num_warps)


class _Arguments(NamedTuple):
    """The arguments of both the forward and the backward op, in the order of their schemas."""

    student: Tensor
    teacher: Tensor
    temperature: float  # for all rows, unless row_temperature is given
    row_temperature: Tensor | None
    mask: Tensor | None
    normalizer: Tensor | None
    dim: int
    direction: int  # Direction
    beta: float
    reduction: int  # Reduction
    scale_by_t2: bool
    include_entropy: bool
    target_eps: float

    def row_weight(self) -> tuple[float, Tensor | None]:
        """Return the weight of a row in the loss, as a float and a tensor (or None) to multiply.

        The tensor is not read back to the host.
        """
        if self.reduction in (Reduction.NONE, Reduction.SUM):
            return 1.0, None
        classes = self.student.shape[self.dim]
        per_class = 1.0 / classes if self.reduction == Reduction.MEAN else 1.0
        if self.normalizer is not None:
            return per_class, 1.0 / self.normalizer.to(torch.float64).reshape(())
        if self.mask is not None:
            return per_class, 1.0 / self.mask.sum().clamp(min=1).to(torch.float64)
        return per_class / max(self.student.numel() // classes, 1), None


class _Results(NamedTuple):
    """The results that a launch writes; None if a result is not wanted."""

    loss: Tensor | None = None
    grad_student: Tensor | None = None
    grad_teacher: Tensor | None = None
    grad_temperature: Tensor | None = None
    row_scale: Tensor | None = None  # of grad_student


def _has_fast_kernel(arguments: _Arguments, results: _Results, compute: torch.dtype) -> bool:
    """Return whether a kernel of temperature_kl_fast.py computes these results, and is faster."""
    a, r = arguments, results
    return (
        a.direction == Direction.FORWARD
        and a.include_entropy
        and a.target_eps == 0
        and compute == torch.float32
        and r.grad_teacher is None
        and r.grad_temperature is None
        and r.row_scale is None
        and a.student.numel() >= temperature_kl_fast.SMALLEST
    )


def _launch(arguments: _Arguments, results: _Results, weight: float, weight_tensor: Tensor | None, upstream: Tensor | None = None) -> None:
    """Run the kernel.

    The weight of a row is weight times weight_tensor. upstream is the gradient with respect to the
    loss.
    """
    a, r = arguments, results
    if a.student.numel() == 0:
        return
    operands = [a.student, a.teacher, r.grad_student, r.grad_teacher]
    layout = as_rows(operands, a.dim)
    if layout is None:  # rows with three strides or more: work on copies with the classes last
        copies = [None if x is None else x.movedim(a.dim, -1).contiguous() for x in operands]
        student_copy, teacher_copy = cast(list[Tensor], copies[:2])
        moved = a._replace(student=student_copy, teacher=teacher_copy, dim=-1)
        _launch(moved, r._replace(grad_student=copies[2], grad_teacher=copies[3]), weight, weight_tensor, upstream)
        for x, copy in zip(operands[2:], copies[2:], strict=True):
            if x is not None and copy is not None:
                x.copy_(copy.movedim(-1, a.dim))
        return
    inner_size, (student, teacher, grad_student, grad_teacher) = layout
    reverse = a.direction == Direction.REVERSE
    base, other, grad_base, grad_other = (student, teacher, grad_student, grad_teacher) if reverse else (teacher, student, grad_teacher, grad_student)
    row_temperature, mask, upstream = (None if x is None else x.contiguous() for x in (a.row_temperature, a.mask, upstream))
    classes = a.student.shape[a.dim]
    rows = a.student.numel() // classes
    compute = compute_dtype(a.student, a.teacher)
    sizes = block_sizes(classes, cast(Rows, student).class_stride, compute == torch.float64)
    align = alignment_of_rows([base, other, grad_base, grad_other], classes)
    upstream_stride = int(upstream is not None and upstream.dim() > 0)
    mask_bytes = None if mask is None else mask.view(torch.uint8)
    blocks = triton.cdiv(rows, sizes["ROWS"])
    state, left = None, None
    with device_of(a.student):
        if _has_fast_kernel(a, r, compute):
            row_arguments = (row_temperature, mask_bytes, weight_tensor, upstream, upstream_stride, a.temperature, weight)
            fast = temperature_kl_fast.launch(
                cast(Rows, base), cast(Rows, other), grad_other, r.loss, row_arguments, rows, classes, inner_size, align, a.scale_by_t2
            )
            if fast is not None:
                (state, left), blocks = fast, min(blocks, 4 * multiprocessors(a.student))
        _kl_kernel[(blocks,)](
            base, other, grad_base, grad_other, r.row_scale, r.loss, r.grad_temperature, row_temperature,
            mask_bytes, weight_tensor, upstream, upstream_stride, state, left, a.temperature, weight, a.beta, a.target_eps, rows, classes, inner_size,
            JSD=a.direction == Direction.JSD, HAS_EPS=a.target_eps > 0, ENTROPY=a.include_entropy, T_SQUARED=a.scale_by_t2, SCALE_BASE=reverse,
            COMPUTE=as_tl(compute), ALIGN=align, **sizes,
        )  # fmt: skip


def temperature_kl(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2, include_entropy,
                   target_eps, save_grad) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements kdkernels::temperature_kl."""
    check_operands(student, teacher, row_temperature, mask, normalizer, dim)
    arguments = _Arguments(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2,
                           include_entropy, target_eps)  # fmt: skip
    compute, shape = compute_dtype(student, teacher), row_shape(student, dim)
    row_loss = torch.empty(shape, dtype=compute, device=student.device)
    grad = torch.empty_like(student) if save_grad else student.new_empty(0)
    scaled = save_grad and student.dtype == torch.float16
    row_scale = student.new_empty(shape if scaled else 0, dtype=torch.float32)
    weight, weight_tensor = arguments.row_weight()
    results = _Results(row_loss, grad_student=grad if save_grad else None, row_scale=row_scale if scaled else None)
    _launch(arguments, results, weight, weight_tensor)
    if reduction == Reduction.NONE:
        return row_loss, grad, row_scale
    factor = weight if weight_tensor is None else weight * weight_tensor
    return (row_loss.sum(dtype=torch.float64) * factor).to(compute), grad, row_scale


def temperature_kl_backward(grad_loss, student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2,
                            include_entropy, target_eps, wanted) -> tuple[Tensor, ...]:  # fmt: skip
    """Implements kdkernels::temperature_kl_backward."""
    check_operands(student, teacher, row_temperature, mask, normalizer, dim, grad_loss, reduction)
    arguments = _Arguments(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2,
                           include_entropy, target_eps)  # fmt: skip
    grad_student = torch.empty_like(student) if wanted[0] else None
    grad_teacher = torch.empty_like(teacher) if wanted[1] else None
    dtype = compute_dtype(student, teacher) if row_temperature is None else row_temperature.dtype
    grad_temperature = torch.empty(row_shape(student, dim), dtype=dtype, device=student.device) if wanted[2] else None
    _launch(arguments, _Results(None, grad_student, grad_teacher, grad_temperature), *arguments.row_weight(), grad_loss)
    return tuple(student.new_empty(0) if x is None else x for x in (grad_student, grad_teacher, grad_temperature))
