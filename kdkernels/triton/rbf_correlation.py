"""Triton kernels of rbf_correlation and rbf_correlation_loss. The arithmetic is that of csrc/rbf_correlation/, explained there and in
docs/rbf_correlation.md.

The loss: a first kernel looks at the range of each column and marks it with the way it goes, so that is known on the device alone; then each way has
a kernel, whose programs leave at once where a column goes another. All in double. Columns are read as rows [B * K, M].
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
from .math import exp_nonpositive, exp_parts, cast_scalar

# What a column is marked with: the terms that do, or that its pairs are to be summed. More than 16 do not fit the registers, and pairs are cheap.
_FEW: tl.constexpr = tl.constexpr(8)
_MANY: tl.constexpr = tl.constexpr(16)
_PAIRS: tl.constexpr = tl.constexpr(1)


@triton.jit
def _fall(log_ratio):
    """e^-|y|, and that less 1: each to its own last digits."""
    scale, r, h = exp_parts(-tl.abs(log_ratio))
    rest = scale * (r + h)
    return scale + rest, rest + (scale - 1.0)


@triton.jit
def _range(s_ptr, t_ptr, n, BLOCK: tl.constexpr):
    """Middle and radius of a student's and a teacher's numbers together; NaN if one is not finite."""
    lane = tl.arange(0, BLOCK)
    low, high = tl.full([BLOCK], float("inf"), tl.float64), tl.full([BLOCK], float("-inf"), tl.float64)
    off = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        at = tl.minimum(start + lane, n - 1)  # behind the end: the last number again
        s, t = tl.load(s_ptr + at).to(tl.float64), tl.load(t_ptr + at).to(tl.float64)
        low, high = tl.minimum(low, tl.minimum(s, t)), tl.maximum(high, tl.maximum(s, t))
        off += (s - s) + (t - t)
    lowest, radius = tl.min(low, 0), (tl.max(high, 0) - tl.min(low, 0)) * 0.5
    nothing = tl.sum(off, 0)
    return lowest + radius + nothing, radius + nothing


@triton.jit
def _mark_kernel(
    sx_ptr, sy_ptr, tx_ptr, ty_ptr,  # [B * K, m or n]
    to_sx_ptr, to_sy_ptr, to_tx_ptr, to_ty_ptr,
    loss_ptr,  # [B * K] float64
    center_ptr,  # [B * K] float64
    mark_ptr,  # [B * K] int32
    m, n,
    scale: tl.float64,
    few_limit: tl.float64, many_limit: tl.float64,  # the largest z for which 8 and 16 terms do
    WANT_SX: tl.constexpr, WANT_SY: tl.constexpr, WANT_TX: tl.constexpr, WANT_TY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Which way each column goes. One with a NaN or an infinity is done: its loss and its gradients are NaN."""
    column = tl.program_id(0).to(tl.int64)
    scale = cast_scalar(scale, tl.float64)
    x_middle, x_radius = _range(sx_ptr + column * m, tx_ptr + column * m, m, BLOCK)
    y_middle, y_radius = _range(sy_ptr + column * n, ty_ptr + column * n, n, BLOCK)
    apart = tl.abs(x_middle - y_middle)
    by_x = x_radius <= y_radius
    z = scale * scale * tl.where(by_x, x_radius * (y_radius + apart), y_radius * (x_radius + apart))
    pairs_are_few = tl.cast(m, tl.int64) * n <= 64 * (tl.cast(m, tl.int64) + n)
    few, many = z <= cast_scalar(few_limit, tl.float64), z <= cast_scalar(many_limit, tl.float64)
    tl.store(center_ptr + column, tl.where(by_x, x_middle, y_middle))
    tl.store(mark_ptr + column, tl.where(z != z, 0, tl.where(pairs_are_few, _PAIRS, tl.where(few, _FEW, tl.where(many, _MANY, _PAIRS)))))
    tl.store(loss_ptr + column, z * 0.0)
    if z != z:
        lane = tl.arange(0, BLOCK)
        nothing = tl.full([BLOCK], float("nan"), tl.float64)
        for start in range(0, m, BLOCK):
            if WANT_SX:
                tl.store(to_sx_ptr + column * m + start + lane, nothing, start + lane < m)
            if WANT_TX:
                tl.store(to_tx_ptr + column * m + start + lane, nothing, start + lane < m)
        for start in range(0, n, BLOCK):
            if WANT_SY:
                tl.store(to_sy_ptr + column * n + start + lane, nothing, start + lane < n)
            if WANT_TY:
                tl.store(to_ty_ptr + column * n + start + lane, nothing, start + lane < n)


@triton.jit
def _terms(s_ptr, t_ptr, first, n, center, scale, STUDENT: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """D beside A', [BLOCK, 2 RANK], and the derivatives of the student's or the teacher's terms, which meet the columns of D; 0 behind the end."""
    i = first + tl.arange(0, BLOCK)
    place = tl.arange(0, 2 * RANK)[None, :]
    raw_s, raw_t = tl.load(s_ptr + i, i < n, other=0.0).to(tl.float64), tl.load(t_ptr + i, i < n, other=0.0).to(tl.float64)
    t, change = tl.where(i < n, (raw_t - center) * scale, 0.0), tl.where(i < n, (raw_s - raw_t) * scale, 0.0)
    s = t + change
    log_ratio = change * (s + t) * -0.5
    larger = tl.where(i < n, exp_nonpositive(tl.where(log_ratio > 0.0, s * s, t * t) * -0.5), 0.0)
    fallen, change_of_fallen = _fall(log_ratio)
    step = larger * change_of_fallen
    d, a = tl.where(log_ratio > 0.0, -step, step), tl.where(log_ratio > 0.0, larger * fallen, larger)
    terms, slopes = tl.zeros([BLOCK, 2 * RANK], tl.float64), tl.zeros([BLOCK, 2 * RANK], tl.float64)
    below = tl.zeros([BLOCK], tl.float64)
    for r in range(RANK):
        if STUDENT:
            phi, u = a + d, s
        else:
            phi, u = a, t
        terms = tl.where(place == r, d[:, None], tl.where(place == RANK + r, a[:, None], terms))
        slopes = tl.where(place == r, (below - u * phi)[:, None], slopes)
        root = tl.sqrt(tl.full([BLOCK], 1.0, tl.float64) * (r + 1))
        below = phi * root
        d, a = (change * (a + d) + t * d) / root, a * t / root
    return terms, slopes


@triton.jit
def _products(s_ptr, t_ptr, n, center, scale, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """The products of all columns of the terms with one another, [2 RANK, 2 RANK]: D^T D, D^T A' above A'^T D, A'^T A'."""
    products = tl.zeros([2 * RANK, 2 * RANK], tl.float64)
    for first in range(0, n, BLOCK):
        terms, _ = _terms(s_ptr, t_ptr, first, n, center, scale, True, RANK, BLOCK)
        products = tl.dot(tl.trans(terms), terms, products, input_precision="ieee", out_dtype=tl.float64)
    return products


@triton.jit
def _add_rows(products, RANK: tl.constexpr):
    """[[a], [b]] to [[a + b], [a]]."""
    first = tl.arange(0, 2)[:, None, None] == 0
    halves = tl.reshape(products, [2, RANK, 2 * RANK])
    upper, total = tl.sum(tl.where(first, halves, 0.0), 0), tl.sum(halves, 0)
    return tl.reshape(tl.where(first, total[None, :, :], upper[None, :, :]), [2 * RANK, 2 * RANK])


@triton.jit
def _combine(products, TEACHER: tl.constexpr, RANK: tl.constexpr):
    """With Y = [E B'] and products = Y^T Y: [B E]^T [B E], whose product with X^T X is the loss; for the teacher [B E]^T B' in the first columns."""
    if TEACHER:
        second = tl.arange(0, 2)[:, None, None] == 1
        lower = tl.sum(tl.where(second, tl.reshape(products, [2, RANK, 2 * RANK]), 0.0), 0)
        moved = tl.reshape(tl.where(second, 0.0, lower[None, :, :]), [2 * RANK, 2 * RANK])
    else:
        moved = _add_rows(products, RANK)
    return _add_rows(tl.trans(moved), RANK)


@triton.jit
def _differentiate(s_ptr, t_ptr, out_ptr, n, center, scale, slope, weights, STUDENT: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    for first in range(0, n, BLOCK):
        terms, slopes = _terms(s_ptr, t_ptr, first, n, center, scale, STUDENT, RANK, BLOCK)
        g = tl.dot(terms, weights, input_precision="ieee", out_dtype=tl.float64)
        tl.store(out_ptr + first + lane, tl.sum(g * slopes, 1) * slope, first + lane < n)


@triton.jit
def _terms_kernel(
    sx_ptr, sy_ptr, tx_ptr, ty_ptr,
    to_sx_ptr, to_sy_ptr, to_tx_ptr, to_ty_ptr,
    loss_ptr, center_ptr, mark_ptr,
    m, n,
    scale: tl.float64, slope: tl.float64,
    WANT_SX: tl.constexpr, WANT_SY: tl.constexpr, WANT_TX: tl.constexpr, WANT_TY: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns that are marked with this rank."""
    column = tl.program_id(0).to(tl.int64)
    if tl.load(mark_ptr + column) == RANK:
        scale, slope = cast_scalar(scale, tl.float64), cast_scalar(slope, tl.float64)
        center = tl.load(center_ptr + column)
        sx, tx, sy, ty = sx_ptr + column * m, tx_ptr + column * m, sy_ptr + column * n, ty_ptr + column * n
        of_x, of_y = _products(sx, tx, m, center, scale, RANK, BLOCK), _products(sy, ty, n, center, scale, RANK, BLOCK)
        weights = _combine(of_y, False, RANK)
        tl.store(loss_ptr + column, tl.maximum(tl.sum(tl.sum(of_x * weights, 1), 0), 0.0))
        if WANT_SX:
            _differentiate(sx, tx, to_sx_ptr + column * m, m, center, scale, slope, weights, True, RANK, BLOCK)
        if WANT_TX:
            _differentiate(sx, tx, to_tx_ptr + column * m, m, center, scale, -slope, _combine(of_y, True, RANK), False, RANK, BLOCK)
        if WANT_SY:
            _differentiate(sy, ty, to_sy_ptr + column * n, n, center, scale, slope, _combine(of_x, False, RANK), True, RANK, BLOCK)
        if WANT_TY:
            _differentiate(sy, ty, to_ty_ptr + column * n, n, center, scale, -slope, _combine(of_x, True, RANK), False, RANK, BLOCK)


@triton.jit
def _load_pair(s_ptr, t_ptr, i, n, center, scale):
    """Scaled difference and sum of a student's and a teacher's numbers; far from all others behind the end, where S = T = 0."""
    s, t = tl.load(s_ptr + i, i < n, other=0.0).to(tl.float64), tl.load(t_ptr + i, i < n, other=0.0).to(tl.float64)
    change = tl.where(i < n, (s - t) * scale, 0.0)
    return change, tl.where(i < n, ((s - center) + (t - center)) * scale, 1e100)


@triton.jit(do_not_specialize=["x_blocks"])
def _pairs_kernel(
    sx_ptr, sy_ptr, tx_ptr, ty_ptr,
    to_sx_ptr, to_sy_ptr, to_tx_ptr, to_ty_ptr,
    part_ptr,  # [B * K, blocks of x] float64, zeros
    center_ptr, mark_ptr,
    m, n, x_blocks,
    scale: tl.float64, slope: tl.float64,
    WANT_SX: tl.constexpr, WANT_SY: tl.constexpr, WANT_TX: tl.constexpr, WANT_TY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """A block of x against all of y, or, in the programs behind those, of y against all of x: the loss is the same seen from there."""
    blocks = x_blocks + tl.cdiv(n, BLOCK)
    column, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    if tl.load(mark_ptr + column) == _PAIRS:
        scale, slope = cast_scalar(scale, tl.float64), cast_scalar(slope, tl.float64)
        center = tl.load(center_ptr + column)
        of_x = block < x_blocks
        if of_x:
            s, t, to_s, to_t, count = sx_ptr + column * m, tx_ptr + column * m, to_sx_ptr + column * m, to_tx_ptr + column * m, m
            other_s, other_t, others = sy_ptr + column * n, ty_ptr + column * n, n
            first = block * BLOCK
        else:
            s, t, to_s, to_t, count = sy_ptr + column * n, ty_ptr + column * n, to_sy_ptr + column * n, to_ty_ptr + column * n, n
            other_s, other_t, others = sx_ptr + column * m, tx_ptr + column * m, m
            first = (block - x_blocks) * BLOCK
        i = first + tl.arange(0, BLOCK)
        change, total = _load_pair(s, t, i, count, center, scale)
        squares = tl.zeros([BLOCK], tl.float64)
        grad_s, grad_t = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
        for start in range(0, others, BLOCK_OTHER):
            j = start + tl.arange(0, BLOCK_OTHER)
            other_change, other_total = _load_pair(other_s, other_t, j, others, center, scale)
            e, p = change[:, None] - other_change[None, :], total[:, None] - other_total[None, :]
            real = (i < count)[:, None] & (j < others)[None, :]
            e, p = tl.where(real, e, 0.0), tl.where(real, p, 0.0)  # two that are far away are near one another
            log_ratio = e * p * -0.5
            d_s, d_t = (p + e) * 0.5, (p - e) * 0.5
            larger = exp_nonpositive(tl.where(log_ratio > 0.0, d_s * d_s, d_t * d_t) * -0.5)
            fallen, change_of_fallen = _fall(log_ratio)
            step, smaller = larger * change_of_fallen, larger * fallen
            difference = tl.where(log_ratio > 0.0, -step, step)
            squares += tl.sum(difference * difference, 1)
            grad_s -= tl.sum(difference * tl.where(log_ratio > 0.0, larger, smaller) * d_s, 1)
            grad_t += tl.sum(difference * tl.where(log_ratio > 0.0, smaller, larger) * d_t, 1)
        if of_x:
            tl.store(part_ptr + column * x_blocks + block, tl.sum(squares, 0))
        if (WANT_SX and of_x) or (WANT_SY and not of_x):
            tl.store(to_s + i, grad_s * slope, i < count)
        if (WANT_TX and of_x) or (WANT_TY and not of_x):
            tl.store(to_t + i, grad_t * slope, i < count)


@triton.jit
def _correlation_kernel(
    x_ptr, y_ptr, out_ptr, m, columns, numbers, inverse: tl.float64, COMPUTE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Numbers [BLOCK] of a row [N * K] of the result: x [B * M, K] against y [B, N * K]."""
    blocks = tl.cdiv(numbers, BLOCK)  # 64 bits wide if `numbers` is, and so is j
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
        at = grad_ptr + sample * g_sample + i * g_row + j.to(tl.int64) * g_number + k * g_column
        g = tl.load(at, (i < m) & (j < n) & (k < columns), other=0.0).to(COMPUTE)
        d = x - y
        g = g * exp_nonpositive(-d * d * inverse) * d * (2.0 * inverse)
        to_x -= g
        part = tl.sum(g, 0)[None, :, :]
        tl.store(part_ptr + ((block * batch + sample) * n + j) * columns + k, part, (j < n) & (k < columns))
    total = tl.sum(to_x, 1)[:, None, :]
    tl.store(to_x_ptr + (sample * m + i) * columns + k, total, (i < m) & (k < columns))


def largest_z(rank: int, double: bool) -> float:
    """For which `rank` terms do: z^(R-1) / (R-1)! is the accuracy of csrc/rbf_correlation/rank.h."""
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
    rows = [x.transpose(1, 2).contiguous() for x in inputs]  # no copy of what truncated_svd made
    gradients = [torch.empty(x.shape, dtype=compute, device=device) if w else None for x, w in zip(rows, wanted, strict=True)]
    losses, centers = (torch.empty(count, dtype=torch.float64, device=device) for _ in range(2))
    marks = torch.empty(count, dtype=torch.int32, device=device)
    if count:
        scale = math.sqrt(2 / beta)
        unused = losses.to(compute)  # of the gradients' type: a kernel chooses between two of them
        targets = [unused if g is None else g for g in gradients]
        slope = 2 * scale / (batch if reduction == Reduction.BATCHMEAN else 1)
        limits = [largest_z(rank, compute == torch.float64) for rank in (_FEW.value, _MANY.value)]
        wants = {f"WANT_{name}": bool(w) for name, w in zip(("SX", "SY", "TX", "TY"), wanted, strict=True)}
        sizes = pair_sizes()
        blocks = [triton.cdiv(length, sizes["BLOCK"]) for length in (m, n)]
        parts = torch.zeros(count, blocks[0], dtype=torch.float64, device=device)
        with device_of(sx):
            _mark_kernel[(count,)](*rows, *targets, losses, centers, marks, m, n, scale, *limits, **wants, BLOCK=256, **compile_options(4))
            for rank in (_FEW.value, _MANY.value):
                _terms_kernel[(count,)](*rows, *targets, losses, centers, marks, m, n, scale, slope, **wants, **term_sizes(rank))
            _pairs_kernel[(count * sum(blocks),)](*rows, *targets, parts, centers, marks, m, n, blocks[0], scale, slope, **wants, **sizes)
        losses += parts.sum(1)
    per_sample = losses.view(batch, columns).sum(1)
    if reduction != Reduction.NONE:
        per_sample = per_sample.sum() / (max(batch, 1) if reduction == Reduction.BATCHMEAN else 1)
    return per_sample.to(compute), [_laid_out(g, x, compute) for g, x in zip(gradients, inputs, strict=True)]


def _laid_out(rows: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient in rows [B, K, n] with the shape and the strides of x."""
    if rows is None:
        return x.new_empty(0, dtype=dtype)
    like = torch.empty_like(x, dtype=dtype)
    columns = rows.transpose(1, 2)
    return columns if columns.stride() == like.stride() else like.copy_(columns)


def _check_reduction(reduction: int) -> None:
    if reduction == Reduction.MEAN:
        raise ValueError(f"reduction must be one of 0 (none), 1 (sum), 3 (batchmean), got {reduction}")


def rbf_correlation_loss(sx, sy, tx, ty, beta, reduction, wanted) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implements kdkernels::rbf_correlation_loss."""
    _check_reduction(reduction)
    loss, gradients = _loss((sx, sy, tx, ty), beta, reduction, wanted)
    return loss, *gradients


def rbf_correlation_loss_backward(grad_loss, sx, sy, tx, ty, beta, reduction, wanted) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        grad.mul_(grad_loss)
        return
    factor = grad_loss.view(-1, 1, 1)
    grad.mul_(factor).masked_fill_(factor == 0, 0)  # a sample that was left out stays out, also where its gradient is not finite
