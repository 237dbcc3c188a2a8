"""Kernels of temperature_kl for ordinary rows: the forward KL and the gradient of the student.

They compute the formulas of temperature_kl_divergence.py with fewer instructions. A row is ordinary
if no exponential overflows and no large offset between the networks makes differences of logits
inaccurate: it contains no NaN and no infinity (classes that both networks exclude by -inf may
occur), no class is 2^60 times as likely for the student as for the teacher, and the mean difference
of the logits is below 62 T. Other rows are left to _kl_kernel, which runs afterwards on these rows
only; the host does not wait to find out.

Exponents are in base 2: t = y log2(e), and 1 / T becomes log2(e) / T.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import HAS_CUDA_KERNELS, cuda_kernels_run_on
from .launch import compile_options, multiprocessors
from .math import LN2, cast_scalar, centred_kl, exp2_parts
from .temperature_kl_rows import Rows, aligned, aligned_rows, row_offset, tile_pointers

# The states of a row.
_COMPUTED = tl.constexpr(1)
LEFT = tl.constexpr(2)  # left to _kl_kernel

# The largest t of an ordinary row. The hardware flushes e to 0 below 2^-126, so that a
# class loses a probability of at most 2^-66.
_STEEP = tl.constexpr(60.0)
_FAR = tl.constexpr(90.0)  # the largest mean difference of the logits of an ordinary row, in the unit of t

# The logit of a class that is excluded or not present. Its difference from all others is finite, or
# minus infinity, and its probability is 0.
EXCLUDED = tl.constexpr(-3.0e38)

SMALLEST = 1 << 23  # logits; with fewer, the second launch would cost more time than is saved
SHORTEST_ROW = 257  # classes, if they are adjacent in memory; for shorter rows _kl_kernel is as fast
LONGEST_SHORT_ROW = 4096
_LONGEST_ROW = 1 << 21  # one program merges the statistics of the tiles of a row
# The fastest of the settings that were measured on an H100: registers of a thread, and programs of
# _long_rows_kernel per multiprocessor. What these programs read between the two reads of a group
# exceeds the L2 cache; fewer programs or shorter groups were not faster.
_SHORT_REGISTERS = 80
_LONG_REGISTERS = 80
_PROGRAMS = 25
_GROUP = 8  # tiles of a task
# Not measured yet: registers of a thread if rows are adjacent in memory. Without a limit, the
# kernel uses about 150 registers, and 12 warps share a multiprocessor. With it, 16 warps do, and at
# most 8 bytes are spilled.
_MAP_REGISTERS = 128


class Statistics(NamedTuple):
    """Sums over classes. For a tile, tensors [ROWS, 1] with the sums of each of its rows."""

    top: tl.tensor  # the largest teacher logit
    total: tl.tensor  # sum of e = exp((teacher - top) / T)
    mean: tl.tensor  # m, the mean of d = teacher - student with weights e
    convex: tl.tensor  # sum of e (e^y - 1 - y), y = (m - d) / T; infinity if some t is too large
    drift: tl.tensor  # sum of -e y


class Terms(NamedTuple):
    """The terms of a tile [ROWS, BLOCK] from which its gradient is computed."""

    weight: tl.tensor  # e
    growth: tl.tensor  # e (e^y - 1)


class Row(NamedTuple):
    """The values from which the gradient of a row is computed, [ROWS, 1]."""

    top: tl.tensor
    mean: tl.tensor
    w: tl.tensor  # E_p[e^y] - 1
    factor: tl.tensor  # of e (e^y - 1 - w) in the gradient


@triton.jit
def _terms(teacher, student, top, mean, c):
    """Compute t, the parts of 2^t and the terms of a tile; c = log2(e) / T."""
    weight = tl.exp2((teacher - top) * c)
    t = (mean - (teacher - student)) * c
    scale, r, h = exp2_parts(t)
    return t, scale, r, h, Terms(weight, weight * (scale * (r + h) + (scale - 1.0)))


@triton.jit
def _statistics(teacher, student, c):
    """Compute the statistics of each row of a tile [ROWS, BLOCK], and the terms of its gradient."""
    top = tl.max(teacher, 1, keep_dims=True)
    weight = tl.exp2((teacher - top) * c)
    total = tl.sum(weight, 1, keep_dims=True)
    mean = tl.sum(weight * (teacher - student), 1, keep_dims=True) / total
    t, scale, r, h, terms = _terms(teacher, student, top, mean, c)
    convex = weight * (scale * h + (scale * r + ((scale - 1.0) - t * LN2)))
    convex = tl.where(t > _STEEP, float("inf"), convex)
    sums = Statistics(top, total, mean, tl.sum(convex, 1, keep_dims=True), tl.sum(weight * t, 1, keep_dims=True) * -LN2)
    return sums, terms


@triton.jit
def _merge(tiles, c):
    """Merge the statistics [1, TILES] of the tiles of a row.

    _recenter in temperature_kl_divergence.py explains the change of the mean.
    """
    top = tl.max(tiles.top, 1, keep_dims=True)
    shrink = tl.exp2((tiles.top - top) * c)
    share = tiles.total * shrink
    total = tl.sum(share, 1, keep_dims=True)
    mean = tl.sum(share * tiles.mean, 1, keep_dims=True) / total
    delta = (tiles.mean - mean) * c
    scale, r, h = exp2_parts(-delta)
    growth = scale * (r + h) + (scale - 1.0)
    rest = scale * h + (scale * r + ((scale - 1.0) + delta * LN2))
    convex = (tiles.convex * (1.0 + growth) - tiles.drift * growth) * shrink + share * rest
    convex = tl.where(-delta > _STEEP, float("inf"), convex)
    drift = tiles.drift * shrink + share * (delta * LN2)
    return Statistics(top, total, mean, tl.sum(convex, 1, keep_dims=True), tl.sum(drift, 1, keep_dims=True))


@triton.jit
def _finish(sums, t, c, row_weight, T_SQUARED: tl.constexpr):
    """Return the loss, whether the row is ordinary, and the values for the gradient."""
    is_ordinary = (sums.top > EXCLUDED * 0.5) & (sums.convex > -1e30) & (sums.convex < 1e30) & (tl.abs(sums.drift) < 1e30)
    is_ordinary = is_ordinary & (tl.abs(sums.mean * c) < _FAR)
    inverse_total = 1.0 / tl.where(is_ordinary, sums.total, 1.0)
    convex, drift = sums.convex * inverse_total, sums.drift * inverse_total
    w = convex - drift
    kl = centred_kl(convex, drift, w)
    factor = (row_weight * t if T_SQUARED else row_weight / t) * (inverse_total / (1.0 + w))
    return kl * t * t if T_SQUARED else kl, is_ordinary, Row(sums.top, sums.mean, w, factor)


@triton.jit
def _gradient(terms, row):
    """Compute the gradient (q - p) times the factor of the row."""
    return (terms.growth - terms.weight * row.w) * row.factor


@triton.jit
def _read(pointer, present, POLICY: tl.constexpr):
    """Read logits. Classes that are not present, or excluded by -inf, get the logit EXCLUDED."""
    logits = tl.load(pointer, mask=present, other=EXCLUDED, eviction_policy=POLICY).to(tl.float32)
    return tl.maximum(logits, EXCLUDED, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_numbers(row, present, temperature_ptr, temperature, weight_ptr, weight, upstream_ptr, upstream_stride):
    """Return T and the weight in the loss of rows [ROWS]."""
    t = tl.zeros(row.shape, tl.float32) + cast_scalar(temperature, tl.float32)
    if temperature_ptr is not None:
        t = tl.load(temperature_ptr + row, mask=present, other=1.0).to(tl.float32)
    row_weight = tl.zeros(row.shape, tl.float32) + cast_scalar(weight, tl.float32)
    if weight_ptr is not None:
        row_weight = row_weight * tl.load(weight_ptr).to(tl.float32)
    if upstream_ptr is not None:
        row_weight = row_weight * tl.load(upstream_ptr + row * upstream_stride, mask=present, other=0.0).to(tl.float32)
    return t[:, None], row_weight[:, None]


@triton.jit
def _short_rows_kernel(
    base,  # Rows of teacher logits [rows, C]
    other,  # Rows of student logits
    grad,  # Rows, or None if no gradient is wanted
    loss_ptr,  # [rows], or None
    state_ptr,  # [rows] int32
    left_ptr,  # [] int32, zero: the number of rows that are LEFT
    temperature_ptr, mask_ptr, weight_ptr, upstream_ptr, upstream_stride, temperature: tl.float64, weight: tl.float64,  # see _kl_kernel
    rows,
    classes,
    inner_size,
    T_SQUARED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,  # see alignment_of_rows
    ONE_STRIDE: tl.constexpr,  # see tile_pointers
):  # fmt: skip
    """Compute the losses and the gradients of rows that fit the registers of a program."""
    base, other, classes = aligned_rows(base, ALIGN), aligned_rows(other, ALIGN), aligned(classes, ALIGN)
    if grad is not None:
        grad = aligned_rows(grad, ALIGN)
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    in_batch = row < rows
    kept = in_batch
    if mask_ptr is not None:
        kept = in_batch & tl.load(mask_ptr + row, mask=in_batch, other=0).to(tl.int1)
    t, row_weight = _row_numbers(row, in_batch, temperature_ptr, temperature, weight_ptr, weight, upstream_ptr, upstream_stride)
    c = 1.4426950408889634 / t
    column = tl.arange(0, BLOCK)[None, :].to(tl.int64)
    present = kept[:, None] & (column < classes)
    teacher = _read(tile_pointers(base, first, inner_size, ROWS, ONE_STRIDE) + column * base.class_stride, present, "")
    student = _read(tile_pointers(other, first, inner_size, ROWS, ONE_STRIDE) + column * other.class_stride, present, "")
    sums, terms = _statistics(teacher, student, c)
    loss, is_ordinary, values = _finish(sums, t, c, row_weight, T_SQUARED)
    is_done = ~kept[:, None] | is_ordinary
    tl.store(state_ptr + row[:, None], tl.where(is_done, _COMPUTED, LEFT), mask=in_batch[:, None])
    left = tl.sum(tl.sum((in_batch[:, None] & ~is_done).to(tl.int32), 1), 0)
    if left > 0:
        tl.atomic_add(left_ptr, left)
    if loss_ptr is not None:
        tl.store(loss_ptr + row[:, None], tl.where(kept[:, None], loss, 0.0), mask=in_batch[:, None] & is_done)
    if grad is not None:
        gradient = tl.where(kept[:, None], _gradient(terms, values), 0.0)
        written = (in_batch[:, None] & is_done) & (column < classes)
        pointer = tile_pointers(grad, first, inner_size, ROWS, ONE_STRIDE) + column * grad.class_stride
        tl.store(pointer, gradient.to(grad.pointer.dtype.element_ty), mask=written)


@triton.jit
def _merge_row(row, sums_ptr, value_ptr, loss_ptr, left_ptr, t, c, row_weight, tiles, T_SQUARED: tl.constexpr, TILES: tl.constexpr):
    """Merge the statistics of all tiles of a row, write its results, and return its state."""
    tile = tl.arange(0, TILES)[None, :]
    at, inside = sums_ptr + row * 5 * tiles + tile, tile < tiles
    sums = Statistics(
        tl.load(at, mask=inside, other=EXCLUDED), tl.load(at + tiles, mask=inside, other=0.0),
        tl.load(at + 2 * tiles, mask=inside, other=0.0), tl.load(at + 3 * tiles, mask=inside, other=0.0),
        tl.load(at + 4 * tiles, mask=inside, other=0.0),
    )  # fmt: skip
    loss, is_ordinary, values = _finish(_merge(sums, c), t, c, row_weight, T_SQUARED)
    zero = tl.zeros([1, 1], tl.int32)
    if loss_ptr is not None:
        tl.store(loss_ptr + row + zero, loss, mask=is_ordinary)
    value_ptr += row * 4
    tl.store(value_ptr + zero, values.top)
    tl.store(value_ptr + 1 + zero, values.mean)
    tl.store(value_ptr + 2 + zero, values.w)
    tl.store(value_ptr + 3 + zero, values.factor)
    is_left = tl.sum(tl.sum((~is_ordinary).to(tl.int32), 1), 0)
    if is_left > 0:
        tl.atomic_add(left_ptr, 1)
    return tl.where(is_left > 0, LEFT, _COMPUTED)


@triton.jit
def _long_rows_kernel(
    base,  # Rows of teacher logits [rows, C]; the classes are adjacent in memory
    other,  # Rows of student logits
    grad,  # Rows, or None if no gradient is wanted
    loss_ptr,  # [rows], or None
    state_ptr,  # [rows] int32, zeros
    left_ptr,  # [] int32, zero: the number of rows that are LEFT
    count_ptr,  # [rows] int32, zeros: the groups of a row whose statistics are in sums_ptr
    ticket_ptr,  # [] int64, zero: the next task
    sums_ptr,  # [rows, 5, tiles]: the statistics of the tiles of a row
    value_ptr,  # [rows, 4]: the values of a row for its gradient
    temperature_ptr, mask_ptr, weight_ptr, upstream_ptr, upstream_stride, temperature: tl.float64, weight: tl.float64,  # see _kl_kernel
    rows,
    classes,
    inner_size,
    groups,  # of a row
    lag,
    T_SQUARED: tl.constexpr,
    TILE: tl.constexpr,  # classes
    GROUP: tl.constexpr,  # tiles
    TILES: tl.constexpr,  # a power of two, at least the number of tiles of a row
    ALIGN: tl.constexpr,  # see alignment_of_rows
):  # fmt: skip
    """Compute the losses and the gradients of long rows, in groups of tiles of classes.

    A program is one warp, so that sums over a tile need no barrier. Each group is processed twice:
    for the statistics and for the gradient. These tasks are numbered, and programs take them in
    this order: the statistics of row i, then the gradient of row i - lag. So the row of a gradient
    was completed before, and what was read between is bounded; if it fits the L2 cache, the second
    read does not need the memory. The program that adds the last statistics of a row merges them. A
    program waits only for tasks with lower numbers, which other programs have already begun.
    """
    base, other, classes = aligned_rows(base, ALIGN), aligned_rows(other, ALIGN), aligned(classes, ALIGN)
    if grad is not None:
        grad = aligned_rows(grad, ALIGN)
    tasks_per_row = groups if grad is None else 2 * groups
    tasks = (tl.cast(rows, tl.int64) + lag) * tasks_per_row
    tiles = groups * GROUP
    lane, zero = tl.arange(0, TILE)[None, :], tl.zeros([1, 1], tl.int32)
    task = tl.atomic_add(ticket_ptr, 1)
    while task < tasks:
        step, group = task // tasks_per_row, (task % tasks_per_row).to(tl.int32)
        is_gradient = group >= groups
        row = tl.where(is_gradient, step - lag, step)
        group = tl.where(is_gradient, group - groups, group)
        if (row >= 0) & (row < rows):
            kept = row >= 0
            if mask_ptr is not None:
                kept = tl.load(mask_ptr + row) != 0
            t, row_weight = _row_numbers(
                row + tl.arange(0, 1), tl.full([1], True, tl.int1), temperature_ptr, temperature, weight_ptr, weight, upstream_ptr, upstream_stride
            )
            c = 1.4426950408889634 / t
            teacher_row, student_row = base.pointer + row_offset(base, row, inner_size), other.pointer + row_offset(other, row, inner_size)
            if is_gradient:
                if grad is not None:
                    gradient_row = grad.pointer + row_offset(grad, row, inner_size)
                    state = tl.full([], _COMPUTED, tl.int32)
                    if kept:
                        state = tl.atomic_add(state_ptr + row, 0)
                        while state == 0:
                            state = tl.atomic_add(state_ptr + row, 0)
                    if state == _COMPUTED:
                        at = value_ptr + row * 4 + zero
                        values = Row(tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3))
                        for tile in range(group * GROUP, (group + 1) * GROUP):
                            column = tile * TILE + lane
                            gradient = tl.zeros([1, TILE], tl.float32)
                            if kept:
                                teacher = _read(teacher_row + column, column < classes, "evict_first")
                                student = _read(student_row + column, column < classes, "evict_first")
                                _, _, _, _, terms = _terms(teacher, student, values.top, values.mean, c)
                                gradient = _gradient(terms, values)
                            rounded = gradient.to(grad.pointer.dtype.element_ty)
                            tl.store(gradient_row + column, rounded, mask=column < classes, eviction_policy="evict_first")
            elif kept:
                for tile in range(group * GROUP, (group + 1) * GROUP):
                    column = tile * TILE + lane
                    sums, _ = _statistics(_read(teacher_row + column, column < classes, ""), _read(student_row + column, column < classes, ""), c)
                    at = sums_ptr + row * 5 * tiles + tile + zero
                    tl.store(at, sums.top)
                    tl.store(at + tiles, sums.total)
                    tl.store(at + 2 * tiles, sums.mean)
                    tl.store(at + 3 * tiles, sums.convex)
                    tl.store(at + 4 * tiles, sums.drift)
                tl.debug_barrier()
                if tl.atomic_add(count_ptr + row, 1) == groups - 1:
                    tl.debug_barrier()
                    state = _merge_row(row, sums_ptr, value_ptr, loss_ptr, left_ptr, t, c, row_weight, tiles, T_SQUARED, TILES)
                    tl.debug_barrier()
                    tl.atomic_add(state_ptr + row, state)
            elif group == 0:
                if loss_ptr is not None:
                    tl.store(loss_ptr + row, 0.0)
                tl.atomic_add(state_ptr + row, _COMPUTED)
        task = tl.atomic_add(ticket_ptr, 1)


def short_row_sizes(classes: int, class_stride: int) -> dict[str, int | bool] | None:
    """Return ROWS and BLOCK of _short_rows_kernel, or None if it does not support rows."""
    block = triton.next_power_of_2(classes)
    if class_stride == 1:
        warps = max(1, block // 512)
        return {"ROWS": 1, "BLOCK": block} | _compile_options(warps, _SHORT_REGISTERS) if SHORTEST_ROW <= classes <= LONGEST_SHORT_ROW else None
    block = max(16, block)
    rows = 1024 // block  # they are adjacent in memory: read whole memory sectors
    return {"ROWS": rows, "BLOCK": block} | _compile_options(2, _MAP_REGISTERS) if block <= 64 else None


def long_row_sizes(classes: int) -> dict[str, int | bool] | None:
    """Return TILE, GROUP and TILES of _long_rows_kernel, or None if it does not support rows."""
    tiles = triton.cdiv(classes, 512 * _GROUP) * _GROUP
    sizes = {"TILE": 512, "GROUP": _GROUP, "TILES": triton.next_power_of_2(tiles)} | _compile_options(1, _LONG_REGISTERS)
    return sizes if LONGEST_SHORT_ROW < classes <= _LONGEST_ROW else None


def _compile_options(num_warps: int, registers: int) -> dict[str, int | bool]:
    """Return options for Triton's compiler.

    A thread holds 16 logits of each network. The kernels are fastest with few registers, because
    more warps then share a multiprocessor.
    """
    options = compile_options(num_warps)
    return options | {"maxnreg": registers} if "maxnreg" in options else options


class Left(NamedTuple):
    """The rows that _kl_kernel has to compute."""

    state: Tensor  # [rows] int32
    number: Tensor  # of these rows, int32, in its first element


def _has_cuda_kernel(x: Tensor) -> bool:
    return HAS_CUDA_KERNELS and x.is_cuda and cuda_kernels_run_on(x.device.index)


def _launch_cuda(
    base: Rows, other: Rows, grad: Rows, loss: Tensor | None, row_arguments: tuple, rows: int, classes: int, inner_size: int, scale_by_t2: bool
) -> Left | None:
    """Do what `launch` does with the CUDA kernel of csrc/temperature_kl/long_rows.h.

    It reads rows once, and _long_rows_kernel reads them twice. Returns None, without computing
    anything, if it was not built for this GPU or does not support the rows.
    """
    teacher, student, gradient = (cast(Tensor, r.pointer) for r in (base, other, grad))
    if not (_has_cuda_kernel(teacher) and teacher.dtype == student.dtype == gradient.dtype in (torch.float32, torch.bfloat16)):
        return None
    row_temperature, mask, weight_tensor, upstream, upstream_stride, temperature, weight = row_arguments
    state = torch.empty(rows, dtype=torch.int32, device=teacher.device)
    left = torch.zeros(1, dtype=torch.int32, device=teacher.device)
    strides = [cast(int, stride) for r in (base, other, grad) for stride in (r.outer_stride, r.inner_stride)]
    computed = torch.ops.kdkernels._temperature_kl_long_rows(
        teacher, student, gradient, strides, inner_size, rows, classes, temperature, row_temperature, mask, weight, weight_tensor, upstream,
        upstream_stride, scale_by_t2, loss, state, left,
    )  # fmt: skip
    return Left(state, left) if computed else None


def launch(
    base: Rows,
    other: Rows,
    grad: Rows | None,
    loss: Tensor | None,
    row_arguments: tuple,
    rows: int,
    classes: int,
    inner_size: int,
    align: int,
    scale_by_t2: bool,
) -> Left | None:
    """Compute the ordinary rows, and return which rows are left.

    Returns None, without computing anything, if the kernels do not support the layout.
    """
    x = cast(Tensor, base.pointer)
    strides = {r.class_stride for r in (base, other, grad) if r is not None}
    sizes = short_row_sizes(classes, max(strides))
    if sizes is not None:
        state, count = torch.empty(rows, dtype=torch.int32, device=x.device), torch.zeros(1, dtype=torch.int32, device=x.device)
        _short_rows_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
            base, other, grad, loss, state, count, *row_arguments, rows, classes, inner_size, T_SQUARED=scale_by_t2, ALIGN=align,
            ONE_STRIDE=inner_size % sizes["ROWS"] == 0, **sizes,
        )  # fmt: skip
        return Left(state, count)
    sizes = long_row_sizes(classes) if strides == {1} else None
    if sizes is None:
        return None
    if grad is not None and (left := _launch_cuda(base, other, grad, loss, row_arguments, rows, classes, inner_size, scale_by_t2)):
        return left
    programs = _PROGRAMS * multiprocessors(x)
    groups = triton.cdiv(classes, sizes["TILE"] * sizes["GROUP"])
    # The ticket, and the number of rows that are left with padding, have 8 bytes each.
    counters = torch.zeros(2 * rows + 4, dtype=torch.int32, device=x.device)
    ticket, left, state, groups_done = counters.split((2, 2, rows, rows))
    sums = torch.empty(rows * 5 * groups * sizes["GROUP"], dtype=torch.float32, device=x.device)
    values = torch.empty(rows * 4, dtype=torch.float32, device=x.device)
    # All programs together are about `programs` tasks ahead of the one that computes a gradient.
    lag = 0 if grad is None else min(rows, triton.cdiv(programs, groups) + 1)
    tasks = (rows + lag) * groups * (1 if grad is None else 2)
    _long_rows_kernel[(min(programs, tasks),)](
        base, other, grad, loss, state, left, groups_done, ticket.view(torch.int64), sums, values, *row_arguments, rows, classes, inner_size,
        groups, lag, T_SQUARED=scale_by_t2, ALIGN=align, **sizes,
    )  # fmt: skip
    return Left(state, left)
