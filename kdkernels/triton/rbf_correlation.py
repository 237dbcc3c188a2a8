"""Triton kernels of rbf_correlation and rbf_correlation_loss.

csrc/rbf_correlation/ and docs/rbf_correlation.md explain the formulas. The loss is computed in
float64, from columns that are stored as rows [B * K, M]. _mark_kernel chooses the method of each
column from the range of its elements, and stores the choice in GPU memory, so that the host does
not wait. Then one kernel runs for each method. Its programs return at once if the column uses
another method.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import Reduction
from .launch import as_tl, compile_options, device_of
from .math import cast_scalar, exp_nonpositive, exp_parts
from .rescale import rescale_

# The mark of a column: the number of terms that are enough, or that its pairs are summed. More than
# 16 terms do not fit the registers, and summing pairs is cheap on a GPU.
_FEW: tl.constexpr = tl.constexpr(8)
_MANY: tl.constexpr = tl.constexpr(16)
_PAIRS: tl.constexpr = tl.constexpr(1)


@triton.jit
def _exp_neg_abs(log_ratio):
    """Compute e^-|y| and e^-|y| - 1, both with a small relative error."""
    scale, r, h = exp_parts(-tl.abs(log_ratio))
    rest = scale * (r + h)
    return scale + rest, rest + (scale - 1.0)


@triton.jit
def _range_of_column(s_ptr, t_ptr, n, BLOCK: tl.constexpr):
    """Compute center and radius of the range of a student's and a teacher's elements together.

    Both are NaN if an element is not finite.
    """
    lane = tl.arange(0, BLOCK)
    low, high = tl.full([BLOCK], float("inf"), tl.float64), tl.full([BLOCK], float("-inf"), tl.float64)
    nan_if_not_finite = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        index = tl.minimum(start + lane, n - 1)  # past the end, the last element is read again
        s, t = tl.load(s_ptr + index).to(tl.float64), tl.load(t_ptr + index).to(tl.float64)
        low, high = tl.minimum(low, tl.minimum(s, t)), tl.maximum(high, tl.maximum(s, t))
        nan_if_not_finite += (s - s) + (t - t)
    lowest, radius = tl.min(low, 0), (tl.max(high, 0) - tl.min(low, 0)) * 0.5
    nan_or_zero = tl.sum(nan_if_not_finite, 0)
    return lowest + radius + nan_or_zero, radius + nan_or_zero


@triton.jit
def _mark_kernel(
    sx_ptr, sy_ptr, tx_ptr, ty_ptr,  # [B * K, m or n]
    grad_sx_ptr, grad_sy_ptr, grad_tx_ptr, grad_ty_ptr,
    loss_ptr,  # [B * K] float64
    center_ptr,  # [B * K] float64
    mark_ptr,  # [B * K] int32
    m, n,
    scale: tl.float64,
    few_limit: tl.float64, many_limit: tl.float64,  # the largest z for which 8 and 16 terms are enough
    WANT_SX: tl.constexpr, WANT_SY: tl.constexpr, WANT_TX: tl.constexpr, WANT_TY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Choose the method of each column.

    If a column contains a NaN or an infinity, its loss and gradients are set to NaN here.
    """
    column = tl.program_id(0).to(tl.int64)
    scale = cast_scalar(scale, tl.float64)
    x_center, x_radius = _range_of_column(sx_ptr + column * m, tx_ptr + column * m, m, BLOCK)
    y_center, y_radius = _range_of_column(sy_ptr + column * n, ty_ptr + column * n, n, BLOCK)
    distance = tl.abs(x_center - y_center)
    center_on_x = x_radius <= y_radius
    z = scale * scale * tl.where(center_on_x, x_radius * (y_radius + distance), y_radius * (x_radius + distance))
    pairs_are_few = tl.cast(m, tl.int64) * n <= 64 * (tl.cast(m, tl.int64) + n)
    few, many = z <= cast_scalar(few_limit, tl.float64), z <= cast_scalar(many_limit, tl.float64)
    tl.store(center_ptr + column, tl.where(center_on_x, x_center, y_center))
    tl.store(mark_ptr + column, tl.where(z != z, 0, tl.where(pairs_are_few, _PAIRS, tl.where(few, _FEW, tl.where(many, _MANY, _PAIRS)))))
    tl.store(loss_ptr + column, z * 0.0)
    if z != z:
        lane = tl.arange(0, BLOCK)
        nans = tl.full([BLOCK], float("nan"), tl.float64)
        for start in range(0, m, BLOCK):
            if WANT_SX:
                tl.store(grad_sx_ptr + column * m + start + lane, nans, start + lane < m)
            if WANT_TX:
                tl.store(grad_tx_ptr + column * m + start + lane, nans, start + lane < m)
        for start in range(0, n, BLOCK):
            if WANT_SY:
                tl.store(grad_sy_ptr + column * n + start + lane, nans, start + lane < n)
            if WANT_TY:
                tl.store(grad_ty_ptr + column * n + start + lane, nans, start + lane < n)


@triton.jit
def _terms(s_ptr, t_ptr, first, n, center, scale, STUDENT: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the terms [D, A'] of a block, [BLOCK, 2 RANK], and derivatives in the columns of D.

    The derivatives are those of the student's terms or of the teacher's. Rows past the end are 0.
    """
    i = first + tl.arange(0, BLOCK)
    term = tl.arange(0, 2 * RANK)[None, :]
    raw_s, raw_t = tl.load(s_ptr + i, i < n, other=0.0).to(tl.float64), tl.load(t_ptr + i, i < n, other=0.0).to(tl.float64)
    t, difference = tl.where(i < n, (raw_t - center) * scale, 0.0), tl.where(i < n, (raw_s - raw_t) * scale, 0.0)
    s = t + difference
    log_ratio = difference * (s + t) * -0.5
    larger = tl.where(i < n, exp_nonpositive(tl.where(log_ratio > 0.0, s * s, t * t) * -0.5), 0.0)
    ratio, ratio_minus_one = _exp_neg_abs(log_ratio)
    step = larger * ratio_minus_one
    d, a = tl.where(log_ratio > 0.0, -step, step), tl.where(log_ratio > 0.0, larger * ratio, larger)
    terms, derivatives = tl.zeros([BLOCK, 2 * RANK], tl.float64), tl.zeros([BLOCK, 2 * RANK], tl.float64)
    previous_phi = tl.zeros([BLOCK], tl.float64)
    for r in range(RANK):
        if STUDENT:
            phi, u = a + d, s
        else:
            phi, u = a, t
        terms = tl.where(term == r, d[:, None], tl.where(term == RANK + r, a[:, None], terms))
        derivatives = tl.where(term == r, (previous_phi - u * phi)[:, None], derivatives)
        root = tl.sqrt(tl.full([BLOCK], 1.0, tl.float64) * (r + 1))
        previous_phi = phi * root
        d, a = (difference * (a + d) + t * d) / root, a * t / root
    return terms, derivatives


@triton.jit
def _products(s_ptr, t_ptr, n, center, scale, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """Compute [D, A']^T [D, A'], a matrix [2 RANK, 2 RANK]."""
    products = tl.zeros([2 * RANK, 2 * RANK], tl.float64)
    for first in range(0, n, BLOCK):
        terms, _ = _terms(s_ptr, t_ptr, first, n, center, scale, True, RANK, BLOCK)
        products = tl.dot(tl.trans(terms), terms, products, input_precision="ieee", out_dtype=tl.float64)
    return products


@triton.jit
def _add_rows(products, RANK: tl.constexpr):
    """Replace [[a], [b]] by [[a + b], [a]]."""
    is_first = tl.arange(0, 2)[:, None, None] == 0
    halves = tl.reshape(products, [2, RANK, 2 * RANK])
    upper, total = tl.sum(tl.where(is_first, halves, 0.0), 0), tl.sum(halves, 0)
    return tl.reshape(tl.where(is_first, total[None, :, :], upper[None, :, :]), [2 * RANK, 2 * RANK])


@triton.jit
def _combine(products, TEACHER: tl.constexpr, RANK: tl.constexpr):
    """Combine products = Y^T Y, with Y = [E, B'], into [B, E]^T [B, E].

    The inner product of the result with X^T X is the loss. For the gradient of the teacher, the
    result is [B, E]^T B' in the first columns.
    """
    if TEACHER:
        is_second = tl.arange(0, 2)[:, None, None] == 1
        lower = tl.sum(tl.where(is_second, tl.reshape(products, [2, RANK, 2 * RANK]), 0.0), 0)
        combined = tl.reshape(tl.where(is_second, 0.0, lower[None, :, :]), [2 * RANK, 2 * RANK])
    else:
        combined = _add_rows(products, RANK)
    return _add_rows(tl.trans(combined), RANK)


@triton.jit
def _differentiate(s_ptr, t_ptr, out_ptr, n, center, scale, factor, weights, STUDENT: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    for first in range(0, n, BLOCK):
        terms, derivatives = _terms(s_ptr, t_ptr, first, n, center, scale, STUDENT, RANK, BLOCK)
        g = tl.dot(terms, weights, input_precision="ieee", out_dtype=tl.float64)
        tl.store(out_ptr + first + lane, tl.sum(g * derivatives, 1) * factor, first + lane < n)


@triton.jit
def _terms_kernel(
    sx_ptr, sy_ptr, tx_ptr, ty_ptr,
    grad_sx_ptr, grad_sy_ptr, grad_tx_ptr, grad_ty_ptr,
    loss_ptr, center_ptr, mark_ptr,
    m, n,
    scale: tl.float64, factor: tl.float64,
    WANT_SX: tl.constexpr, WANT_SY: tl.constexpr, WANT_TX: tl.constexpr, WANT_TY: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute loss and gradients of the columns that are marked with this rank."""
    column = tl.program_id(0).to(tl.int64)
    if tl.load(mark_ptr + column) == RANK:
        scale, factor = cast_scalar(scale, tl.float64), cast_scalar(factor, tl.float64)
        center = tl.load(center_ptr + column)
        sx, tx, sy, ty = sx_ptr + column * m, tx_ptr + column * m, sy_ptr + column * n, ty_ptr + column * n
        x_products, y_products = _products(sx, tx, m, center, scale, RANK, BLOCK), _products(sy, ty, n, center, scale, RANK, BLOCK)
        weights = _combine(y_products, False, RANK)
        tl.store(loss_ptr + column, tl.maximum(tl.sum(tl.sum(x_products * weights, 1), 0), 0.0))
        if WANT_SX:
            _differentiate(sx, tx, grad_sx_ptr + column * m, m, center, scale, factor, weights, True, RANK, BLOCK)
        if WANT_TX:
            _differentiate(sx, tx, grad_tx_ptr + column * m, m, center, scale, -factor, _combine(y_products, True, RANK), False, RANK, BLOCK)
        if WANT_SY:
            _differentiate(sy, ty, grad_sy_ptr + column * n, n, center, scale, factor, _combine(x_products, False, RANK), True, RANK, BLOCK)
        if WANT_TY:
            _differentiate(sy, ty, grad_ty_ptr + column * n, n, center, scale, -factor, _combine(x_products, True, RANK), False, RANK, BLOCK)


@triton.jit
def _load_pair(s_ptr, t_ptr, i, n, center, scale):
    """Return scaled difference and sum of a student's and a teacher's elements.

    Elements past the end are very far from all others, so that S = T = 0.
    """
    s, t = tl.load(s_ptr + i, i < n, other=0.0).to(tl.float64), tl.load(t_ptr + i, i < n, other=0.0).to(tl.float64)
    difference = tl.where(i < n, (s - t) * scale, 0.0)
    return difference, tl.where(i < n, ((s - center) + (t - center)) * scale, 1e100)


@triton.jit(do_not_specialize=["x_blocks"])
def _pairs_kernel(
    sx_ptr, sy_ptr, tx_ptr, ty_ptr,
    grad_sx_ptr, grad_sy_ptr, grad_tx_ptr, grad_ty_ptr,
    part_ptr,  # [B * K, blocks of x] float64, zeros
    center_ptr, mark_ptr,
    m, n, x_blocks,
    scale: tl.float64, factor: tl.float64,
    WANT_SX: tl.constexpr, WANT_SY: tl.constexpr, WANT_TX: tl.constexpr, WANT_TY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """Sum over pairs: one block of x and all of y.

    Programs from number x_blocks on process a block of y and all of x instead, for the gradients of
    y.
    """
    blocks = x_blocks + tl.cdiv(n, BLOCK)
    column, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    if tl.load(mark_ptr + column) == _PAIRS:
        scale, factor = cast_scalar(scale, tl.float64), cast_scalar(factor, tl.float64)
        center = tl.load(center_ptr + column)
        is_x = block < x_blocks
        if is_x:
            s, t, grad_s_ptr, grad_t_ptr, count = sx_ptr + column * m, tx_ptr + column * m, grad_sx_ptr + column * m, grad_tx_ptr + column * m, m
            other_s, other_t, others = sy_ptr + column * n, ty_ptr + column * n, n
            first = block * BLOCK
        else:
            s, t, grad_s_ptr, grad_t_ptr, count = sy_ptr + column * n, ty_ptr + column * n, grad_sy_ptr + column * n, grad_ty_ptr + column * n, n
            other_s, other_t, others = sx_ptr + column * m, tx_ptr + column * m, m
            first = (block - x_blocks) * BLOCK
        i = first + tl.arange(0, BLOCK)
        own_difference, own_sum = _load_pair(s, t, i, count, center, scale)
        squares = tl.zeros([BLOCK], tl.float64)
        grad_s, grad_t = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for start in range(0, others, BLOCK_OTHER):
            j = start + tl.arange(0, BLOCK_OTHER)
            other_difference, other_sum = _load_pair(other_s, other_t, j, others, center, scale)
            e, p = own_difference[:, None] - other_difference[None, :], own_sum[:, None] - other_sum[None, :]
            in_range = (i < count)[:, None] & (j < others)[None, :]
            e, p = tl.where(in_range, e, 0.0), tl.where(in_range, p, 0.0)  # otherwise two elements past the end would be close to each other
            log_ratio = e * p * -0.5
            d_s, d_t = (p + e) * 0.5, (p - e) * 0.5
            larger = exp_nonpositive(tl.where(log_ratio > 0.0, d_s * d_s, d_t * d_t) * -0.5)
            ratio, ratio_minus_one = _exp_neg_abs(log_ratio)
            step, smaller = larger * ratio_minus_one, larger * ratio
            difference = tl.where(log_ratio > 0.0, -step, step)
            squares += tl.sum(difference * difference, 1)
            grad_s -= tl.sum(difference * tl.where(log_ratio > 0.0, larger, smaller) * d_s, 1)
            grad_t += tl.sum(difference * tl.where(log_ratio > 0.0, smaller, larger) * d_t, 1)
        if is_x:
            tl.store(part_ptr + column * x_blocks + block, tl.sum(squares, 0))
        if (WANT_SX and is_x) or (WANT_SY and not is_x):
            tl.store(grad_s_ptr + i, grad_s * factor, i < count)
        if (WANT_TX and is_x) or (WANT_TY and not is_x):
            tl.store(grad_t_ptr + i, grad_t * factor, i < count)


@triton.jit
def _correlation_kernel(
    x_ptr, y_ptr, out_ptr, m, columns, numbers, inverse: tl.float64, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute BLOCK elements of a row [N * K] of the result, from x [B * M, K] and y [B, N * K]."""
    blocks = tl.cdiv(numbers, BLOCK)  # `blocks` and j have 64 bits if `numbers` has
    row = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * columns + j % columns, j < numbers, other=0.0).to(COMPUTE)
    y = tl.load(y_ptr + row // m * numbers + j, j < numbers, other=0.0).to(COMPUTE)
    value = exp_nonpositive(-(x - y) * (x - y) * cast_scalar(inverse, COMPUTE))
    tl.store(out_ptr + row * numbers + j, value, j < numbers)


@triton.jit(do_not_specialize=["batch"])
def _correlation_backward_kernel(
    grad_ptr,  # [B, M, N, K] by strides
    x_ptr, y_ptr, to_x_ptr,  # [B, M, K], [B, N, K], [B, M, K]
    part_ptr,  # [blocks of M, B, N, K]
    g_sample, g_row, g_number, g_column,
    batch, m, n, columns,
    inverse: tl.float64,
    COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    blocks, column_blocks = tl.cdiv(m, BLOCK_M), tl.cdiv(columns, BLOCK_K)
    block = (tl.program_id(0) // column_blocks % blocks).to(tl.int64)
    sample = (tl.program_id(0) // (column_blocks * blocks)).to(tl.int64)
    inverse = cast_scalar(inverse, COMPUTE)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
    k = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    x = tl.load(x_ptr + (sample * m + i) * columns + k, (i < m) & (k < columns), other=0.0).to(COMPUTE)
    to_x = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_K], COMPUTE)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)[None, :, None]
        y = tl.load(y_ptr + (sample * n + j) * columns + k, (j < n) & (k < columns), other=0.0).to(COMPUTE)
        g_ptr = grad_ptr + sample * g_sample + i * g_row + j.to(tl.int64) * g_number + k * g_column
        g = tl.load(g_ptr, (i < m) & (j < n) & (k < columns), other=0.0).to(COMPUTE)
        d = x - y
        g = g * exp_nonpositive(-d * d * inverse) * d * (2.0 * inverse)
        to_x -= g
        part = tl.sum(g, 0)[None, :, :]
        tl.store(part_ptr + ((block * batch + sample) * n + j) * columns + k, part, (j < n) & (k < columns))
    total = tl.sum(to_x, 1)[:, None, :]
    tl.store(to_x_ptr + (sample * m + i) * columns + k, total, (i < m) & (k < columns))


def largest_z(rank: int, double: bool) -> float:
    """Return the largest z for which R = `rank` terms are enough.

    There, z^(R-1) / (R-1)! is the accuracy of csrc/rbf_correlation/rank.h.
    """
    return (2.0 ** (-56 if double else -28) * math.factorial(rank - 1)) ** (1 / (rank - 1))


def term_sizes(rank: int) -> dict[str, int | bool]:
    few = rank == _FEW.value
    return {"RANK": rank, "BLOCK": 64 if few else 32} | compile_options(4 if few else 8)


def pair_sizes() -> dict[str, int | bool]:
    return {"BLOCK": 32, "BLOCK_OTHER": 16} | compile_options(4)


def dense_sizes(columns: int, double: bool) -> dict[str, int | bool]:
    tile, block_m = (512 if double else 1024), 8
    block_k = min(triton.next_power_of_2(columns), tile // block_m)
    return {"BLOCK_M": block_m, "BLOCK_N": tile // (block_m * block_k), "BLOCK_K": block_k} | compile_options(4)


def _loss(inputs: tuple[Tensor, ...], beta: float, reduction: int, wanted) -> tuple[Tensor, list[Tensor]]:
    sx, sy = inputs[:2]
    batch, m, columns = sx.shape
    n, compute, device = sy.shape[1], compute_dtype(*inputs), sx.device
    count = batch * columns
    rows = [x.transpose(1, 2).contiguous() for x in inputs]  # not a copy for the results of truncated_svd
    gradients = [torch.empty(x.shape, dtype=compute, device=device) if w else None for x, w in zip(rows, wanted, strict=True)]
    losses, centers = (torch.empty(count, dtype=torch.float64, device=device) for _ in range(2))
    marks = torch.empty(count, dtype=torch.int32, device=device)
    if count:
        scale = math.sqrt(2 / beta)
        unused = losses.to(compute)  # same dtype as the gradients, because a kernel selects between two of these pointers
        targets = [unused if g is None else g for g in gradients]
        factor = 2 * scale / (batch if reduction == Reduction.BATCHMEAN else 1)
        limits = [largest_z(rank, compute == torch.float64) for rank in (_FEW.value, _MANY.value)]
        wants = {f"WANT_{name}": bool(w) for name, w in zip(("SX", "SY", "TX", "TY"), wanted, strict=True)}
        sizes = pair_sizes()
        blocks = [triton.cdiv(length, sizes["BLOCK"]) for length in (m, n)]
        parts = torch.zeros(count, blocks[0], dtype=torch.float64, device=device)
        with device_of(sx):
            _mark_kernel[(count,)](*rows, *targets, losses, centers, marks, m, n, scale, *limits, **wants, BLOCK=256, **compile_options(4))
            for rank in (_FEW.value, _MANY.value):
                _terms_kernel[(count,)](*rows, *targets, losses, centers, marks, m, n, scale, factor, **wants, **term_sizes(rank))
            _pairs_kernel[(count * sum(blocks),)](*rows, *targets, parts, centers, marks, m, n, blocks[0], scale, factor, **wants, **sizes)
        losses += parts.sum(1)
    per_sample = losses.view(batch, columns).sum(1)
    if reduction != Reduction.NONE:
        per_sample = per_sample.sum() / (max(batch, 1) if reduction == Reduction.BATCHMEAN else 1)
    return per_sample.to(compute), [_like_input(g, x, compute) for g, x in zip(gradients, inputs, strict=True)]


def _like_input(rows: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient, stored as rows [B, K, n], with the shape and strides of x."""
    if rows is None:
        return x.new_empty(0, dtype=dtype)
    result = torch.empty_like(x, dtype=dtype)
    columns = rows.transpose(1, 2)
    return columns if columns.stride() == result.stride() else result.copy_(columns)


def _check_reduction(reduction: int) -> None:
    if reduction == Reduction.MEAN:
        raise ValueError(f"reduction must be one of 0 (none), 1 (sum), 3 (batchmean), got {reduction}")


def rbf_correlation_loss(sx, sy, tx, ty, beta, reduction, wanted) -> tuple[Tensor, ...]:
    """Implements kdkernels::rbf_correlation_loss."""
    _check_reduction(reduction)
    loss, gradients = _loss((sx, sy, tx, ty), beta, reduction, wanted)
    return loss, *gradients


def rbf_correlation_loss_backward(grad_loss, sx, sy, tx, ty, beta, reduction, wanted) -> tuple[Tensor, ...]:
    """Implements kdkernels::rbf_correlation_loss_backward."""
    _check_reduction(reduction)
    inputs = (sx, sy, tx, ty)
    gradients = _loss(inputs, beta, reduction, wanted)[1]
    factor = grad_loss.view(-1, 1, 1) if grad_loss.dim() else grad_loss
    results = []
    for gradient, x, want in zip(gradients, inputs, wanted, strict=True):
        if want:
            gradient = gradient * factor
            gradient = gradient.masked_fill_(factor == 0, 0) if grad_loss.dim() else gradient
        results.append(gradient.to(x.dtype))
    return tuple(results)


def rbf_correlation(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """Implements kdkernels::rbf_correlation."""
    (batch, m, columns), n, compute = x.shape, y.shape[1], compute_dtype(x, y)
    out = torch.empty(batch, m, n, columns, dtype=compute, device=x.device)
    if out.numel():
        with device_of(x):
            _correlation_kernel[(batch * m * triton.cdiv(n * columns, 1024),)](
                x.contiguous(), y.contiguous(), out, m, columns, n * columns, 1 / beta, COMPUTE=as_tl(compute), BLOCK=1024, **compile_options(4)
            )
    return out


def rbf_correlation_backward(grad: Tensor, x: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Implements kdkernels::rbf_correlation_backward."""
    (batch, m, columns), n, compute = x.shape, y.shape[1], compute_dtype(x, y)
    if grad.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(y)
    sizes = dense_sizes(columns, compute == torch.float64)
    blocks, column_blocks = triton.cdiv(m, sizes["BLOCK_M"]), triton.cdiv(columns, sizes["BLOCK_K"])
    to_x = torch.empty(x.shape, dtype=compute, device=x.device)
    parts = torch.empty(blocks, *y.shape, dtype=compute, device=x.device)
    with device_of(x):
        _correlation_backward_kernel[(batch * blocks * column_blocks,)](
            grad, x.contiguous(), y.contiguous(), to_x, parts, *grad.stride(), batch, m, n, columns, 1 / beta, COMPUTE=as_tl(compute), **sizes
        )
    return torch.empty_like(x).copy_(to_x), torch.empty_like(y).copy_(parts.sum(0))


def rbf_correlation_loss_rescale_(grad: Tensor, grad_loss: Tensor) -> None:
    """Implements kdkernels::rbf_correlation_loss_rescale_."""
    if grad_loss.dim() == 0:
        rescale_(grad, grad_loss)
        return
    factor = grad_loss.view(-1, 1, 1)
    grad.mul_(factor).masked_fill_(factor == 0, 0)  # a sample whose factor is 0 has gradient 0, even if the saved gradient is not finite
