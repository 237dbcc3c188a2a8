"""Triton kernels of attention_pool and attention_transfer_loss.

csrc/attention_pool/ and docs/attention_pool.md explain the formulas. Features are read in place,
with the strides of samples, channels and spatial positions. Three kinds of kernels run one after
another:

1. _pool_kernel computes the maps from the features.
2. _normalize_kernel, _weight_kernel and _transfer_kernel process the map of one sample per program.
   They normalise it, or compute the loss, and the factor of each position in the gradient.
3. _scatter_kernel computes the gradient of the features from these factors.
"""

from __future__ import annotations

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import Normalize, Reduce, Variant
from .launch import as_tl, compile_options, device_of
from .math import cast_scalar, divide, square_root
from .rescale import rescale_

_SIMPLE_POWERS = (1.0, 1.5, 2.0, 3.0, 4.0)


@triton.jit
def _value(x, p, POWER: tl.constexpr):
    """Compute |x|^p."""
    size = tl.abs(x)
    if POWER == 1.0:
        return size
    elif POWER == 1.5:
        return size * tl.sqrt(size)
    elif POWER == 2.0:
        return x * x
    elif POWER == 3.0:
        return size * (x * x)
    elif POWER == 4.0:
        return (x * x) * (x * x)
    else:
        return tl.where(size == 0.0, 0.0, tl.exp(p * tl.log(tl.where(size == 0.0, 1.0, size))))


@triton.jit
def _value_derivative(x, p, POWER: tl.constexpr):
    """Compute |x|^(p-1) sign(x), the derivative of |x|^p divided by p; 0 at x = 0."""
    size = tl.abs(x)
    sign = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x)).to(x.dtype)  # x itself for 0 and NaN
    if POWER == 1.0:
        return sign
    elif POWER == 1.5:
        return sign * tl.sqrt(size)
    elif POWER == 2.0:
        return x
    elif POWER == 3.0:
        return size * x
    elif POWER == 4.0:
        return (x * x) * x
    else:
        return sign * tl.exp((p - 1.0) * tl.log(tl.where(size == 0.0, 1.0, size)))


@triton.jit
def _pool_kernel(
    x_ptr,  # [B, C, S] by strides
    map_ptr,  # [B, S]
    channel_ptr,  # [B, S] int32: the channels of the maxima, or unused
    x_sample, x_channel, x_position,  # strides
    channels,
    positions,
    p: tl.float64,  # the exponent
    MEAN: tl.constexpr,
    MAX: tl.constexpr,
    POWER: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(positions, BLOCK_S)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    s = (tl.program_id(0) % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    p = cast_scalar(p, COMPUTE)
    position_ptr = x_ptr + sample * x_sample + s[None, :].to(tl.int64) * x_position
    if MAX:
        # Find the first channel with the largest key: the magnitude, or infinity for NaN.
        highest: tl.constexpr = 1.7976931348623157e308 if tl.float64 == COMPUTE else 3.4028234663852886e38
        best_key = tl.full([BLOCK_S], -1.0, COMPUTE)
        best_size = tl.zeros([BLOCK_S], COMPUTE)
        channel = tl.zeros([BLOCK_S], tl.int32)
        for start in range(0, channels, BLOCK_C):
            inside = ((start + c)[:, None] < channels) & (s[None, :] < positions)
            x = tl.load(position_ptr + (start + c)[:, None].to(tl.int64) * x_channel, inside, other=0.0).to(COMPUTE)
            size = tl.abs(x)
            key = tl.where(x != x, float("inf"), tl.where(inside, tl.minimum(size, highest), -1.0)).to(COMPUTE)
            block_best_key, block_row = tl.max(key, 0, return_indices=True)
            value = tl.sum(tl.where(c[:, None] == block_row[None, :], size, 0.0), 0)
            is_better = block_best_key > best_key
            best_size = tl.where(is_better, value, best_size)
            channel = tl.where(is_better, start + block_row, channel)
            best_key = tl.where(is_better, block_best_key, best_key)
        total = _value(best_size, p, POWER)
        tl.store(channel_ptr + sample * positions + s, channel, s < positions)
    else:
        sums = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
        for start in range(0, channels, BLOCK_C):
            inside = ((start + c)[:, None] < channels) & (s[None, :] < positions)
            x = tl.load(position_ptr + (start + c)[:, None].to(tl.int64) * x_channel, inside, other=0.0).to(COMPUTE)
            sums += _value(x, p, POWER)
        total = tl.sum(sums, 0)
        if MEAN:
            total = total / tl.cast(channels, COMPUTE)  # not .to(): Triton turns a size of 1 into a constant, which has no .to()
    tl.store(map_ptr + sample * positions + s, total, s < positions)


@triton.jit
def _norm(map_ptr, positions, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the L2 norm of a map, scaled by the largest element so that squares stay in range."""
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, positions, BLOCK):
        a = tl.load(map_ptr + start + lane, start + lane < positions, other=0.0)
        largest = tl.maximum(largest, tl.abs(a), propagate_nan=tl.PropagateNan.ALL)
    top = tl.max(largest, 0)
    top = tl.where(tl.sum((largest != largest).to(tl.int32), 0) > 0, float("nan"), top).to(COMPUTE)
    is_positive_finite = (top > 0.0) & (top < float("inf"))
    divisor = tl.where(is_positive_finite, top, 1.0)
    squares = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, positions, BLOCK):
        a = divide(tl.load(map_ptr + start + lane, start + lane < positions, other=0.0), divisor)
        squares += a * a
    return tl.where(is_positive_finite, top * square_root(tl.sum(squares, 0)), top)


@triton.jit
def _divisor(norm, eps):
    """Return max(norm, eps), or NaN if the norm is NaN."""
    return tl.where((norm > eps) | (norm != norm), norm, eps)


@triton.jit
def _normalize_kernel(map_ptr, norm_ptr, positions, eps: tl.float64, SOFTMAX: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Normalise maps [B, positions] in place, and store the norms [B] for "l2"."""
    sample = tl.program_id(0).to(tl.int64)
    row = map_ptr + sample * positions
    lane = tl.arange(0, BLOCK)
    if SOFTMAX:
        largest = tl.full([BLOCK], float("-inf"), COMPUTE)
        for start in range(0, positions, BLOCK):
            a = tl.load(row + start + lane, start + lane < positions, other=float("-inf"))
            largest = tl.maximum(largest, a)
        top = tl.max(largest, 0)
        total = tl.zeros([BLOCK], COMPUTE)
        for start in range(0, positions, BLOCK):
            a = tl.load(row + start + lane, start + lane < positions, other=float("-inf"))
            total += tl.exp(a - top)
        divisor = tl.sum(total, 0)
        for start in range(0, positions, BLOCK):
            a = tl.load(row + start + lane, start + lane < positions, other=0.0)
            tl.store(row + start + lane, tl.exp(a - top) / divisor, start + lane < positions)
    else:
        norm = _norm(row, positions, COMPUTE, BLOCK)
        eps = cast_scalar(eps, COMPUTE)
        divisor = _divisor(norm, eps)
        tl.store(norm_ptr + sample, norm.to(tl.float64))
        for start in range(0, positions, BLOCK):
            a = tl.load(row + start + lane, start + lane < positions, other=0.0)
            tl.store(row + start + lane, divide(a, divisor), start + lane < positions)


@triton.jit
def _store_weights(q_ptr, g_ptr, weight_ptr, norm, eps, factor, positions, KIND: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Compute dL/dmap times factor for each position, from dL/dq.

    KIND 0: q is the map. KIND 1: q = map / max(norm, eps). KIND 2: q = softmax(map).
    """
    lane = tl.arange(0, BLOCK)
    products = tl.zeros([BLOCK], COMPUTE)
    if KIND > 0:
        for start in range(0, positions, BLOCK):
            inside = start + lane < positions
            products += tl.load(q_ptr + start + lane, inside, other=0.0) * tl.load(g_ptr + start + lane, inside, other=0.0).to(COMPUTE)
    dot = tl.sum(products, 0)
    for start in range(0, positions, BLOCK):
        inside = start + lane < positions
        g = tl.load(g_ptr + start + lane, inside, other=0.0).to(COMPUTE)
        if KIND == 1:
            q = tl.load(q_ptr + start + lane, inside, other=0.0)
            # If the norm is below eps, the divisor is constant, and there is no second term.
            g = tl.where(norm > eps, g - q * dot, g) / _divisor(norm, eps)
        if KIND == 2:
            g = tl.load(q_ptr + start + lane, inside, other=0.0) * (g - dot)
        tl.store(weight_ptr + start + lane, g * factor, inside)


@triton.jit
def _weight_kernel(
    q_ptr, g_ptr, weight_ptr, norm_ptr, factor: tl.float64, eps: tl.float64, positions,
    KIND: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    eps, factor = cast_scalar(eps, COMPUTE), cast_scalar(factor, COMPUTE)
    norm = eps
    if KIND == 1:
        norm = tl.load(norm_ptr + sample).to(COMPUTE)
    at = sample * positions
    _store_weights(q_ptr + at, g_ptr + at, weight_ptr + at, norm, eps, factor, positions, KIND, COMPUTE, BLOCK)


@triton.jit(do_not_specialize=["batch"])  # the smaller last batch of an epoch must not recompile the kernel
def _transfer_kernel(
    student_ptr,  # maps [B, S], overwritten
    teacher_ptr,  # maps [B, S], overwritten
    loss_ptr,  # [B] float64
    student_weight_ptr,  # weights [B, S], or unused
    teacher_weight_ptr,
    upstream_ptr,  # []: the gradient with respect to the loss, or unused
    eps: tl.float64,
    student_factor: tl.float64,  # of the weights
    teacher_factor: tl.float64,
    batch,
    positions,
    PAPER: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    WANT_STUDENT: tl.constexpr,
    WANT_TEACHER: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    s_row, t_row = student_ptr + sample * positions, teacher_ptr + sample * positions
    eps = cast_scalar(eps, COMPUTE)
    s_norm, t_norm = _norm(s_row, positions, COMPUTE, BLOCK), _norm(t_row, positions, COMPUTE, BLOCK)
    s_divisor = _divisor(s_norm, eps)
    t_divisor = _divisor(t_norm, eps)
    squares = tl.zeros([BLOCK], COMPUTE)
    s_products, t_products = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    for start in range(0, positions, BLOCK):
        inside = start + lane < positions
        q_s = divide(tl.load(s_row + start + lane, inside, other=0.0), s_divisor)
        q_t = divide(tl.load(t_row + start + lane, inside, other=0.0), t_divisor)
        squares += (q_s - q_t) * (q_s - q_t)
        s_products += q_s * (q_s - q_t)
        t_products += q_t * (q_s - q_t)
    squared_distance, s_dot, t_dot = tl.sum(squares, 0), tl.sum(s_products, 0), tl.sum(t_products, 0)
    if PAPER:
        loss = tl.sqrt(squared_distance)
        derivative = tl.where(loss > 0.0, 1.0 / tl.where(loss > 0.0, loss, 1.0), loss)
    else:
        loss = squared_distance / tl.cast(positions, COMPUTE)
        derivative = 2.0 / tl.cast(positions, COMPUTE) + 0.0 * loss
    tl.store(loss_ptr + sample, loss.to(tl.float64))
    scale = derivative / tl.cast(batch, COMPUTE)
    if HAS_UPSTREAM:
        scale = scale * tl.load(upstream_ptr).to(COMPUTE)
    if WANT_STUDENT or WANT_TEACHER:
        student_scale, teacher_scale = scale * cast_scalar(student_factor, COMPUTE), -scale * cast_scalar(teacher_factor, COMPUTE)
        for start in range(0, positions, BLOCK):
            inside = start + lane < positions
            q_s = divide(tl.load(s_row + start + lane, inside, other=0.0), s_divisor)
            q_t = divide(tl.load(t_row + start + lane, inside, other=0.0), t_divisor)
            d = q_s - q_t
            if WANT_STUDENT:
                g = tl.where(s_norm > eps, d - q_s * s_dot, d) / s_divisor
                tl.store(student_weight_ptr + sample * positions + start + lane, g * student_scale, inside)
            if WANT_TEACHER:
                g = tl.where(t_norm > eps, d - q_t * t_dot, d) / t_divisor
                tl.store(teacher_weight_ptr + sample * positions + start + lane, g * teacher_scale, inside)


@triton.jit
def _scatter_kernel(
    x_ptr,  # [B, C, S] by strides
    grad_ptr,  # [B, C, S] by strides
    weight_ptr,  # [B, S]
    channel_ptr,  # [B, S] int32, or unused
    x_sample, x_channel, x_position,
    g_sample, g_channel, g_position,
    channels,
    positions,
    p: tl.float64,
    MAX: tl.constexpr,
    POWER: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    # The grid has one dimension, because the others are limited to 65,535 programs.
    blocks, channel_blocks = tl.cdiv(positions, BLOCK_S), tl.cdiv(channels, BLOCK_C)
    sample = (tl.program_id(0) // (blocks * channel_blocks)).to(tl.int64)
    s = (tl.program_id(0) % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = (tl.program_id(0) // blocks % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c[:, None] < channels) & (s[None, :] < positions)
    c64, s64 = c[:, None].to(tl.int64), s[None, :].to(tl.int64)
    x = tl.load(x_ptr + sample * x_sample + c64 * x_channel + s64 * x_position, inside, other=0.0).to(COMPUTE)
    weight = tl.load(weight_ptr + sample * positions + s, s < positions, other=0.0)
    g = _value_derivative(x, cast_scalar(p, COMPUTE), POWER) * weight[None, :]
    if MAX:
        channel = tl.load(channel_ptr + sample * positions + s, s < positions, other=-1)
        g = tl.where(c[:, None] == channel[None, :], g, 0.0)
    tl.store(grad_ptr + sample * g_sample + c64 * g_channel + s64 * g_position, g.to(grad_ptr.dtype.element_ty), inside)


def block_sizes(channels: int, positions: int, position_stride: int, double: bool = False) -> dict[str, int | bool]:
    """Return BLOCK_C, BLOCK_S and the compiler options for a tile of features.

    The tile is longer in the dimension that is contiguous in memory. It has at most 4096 elements,
    or 1024 in float64.
    """
    max_elements = 1024 if double else 4096
    if position_stride == 1:
        block_s = min(256, max(16, triton.next_power_of_2(positions)))
        block_c = min(max(1, triton.next_power_of_2(channels)), max_elements // block_s, 32)
    else:
        block_c = min(256, max(16, triton.next_power_of_2(channels)))
        block_s = min(max(1, triton.next_power_of_2(positions)), max_elements // block_c, 16)
    return {"BLOCK_C": block_c, "BLOCK_S": block_s} | compile_options(max(1, min(8, block_c * block_s // (128 if double else 512))))


def _row_block(positions: int) -> dict[str, int | bool]:
    block = min(1024, max(32, triton.next_power_of_2(positions)))
    return {"BLOCK": block} | compile_options(max(1, block // 256))


Strides = tuple[int, int, int]  # of samples, channels and positions


def _strides(x: Tensor) -> Strides | None:
    """Return the strides of samples, channels and positions; None if positions have several."""
    position_stride, next_stride = None, None
    for dim in range(x.dim() - 1, 1, -1):
        if x.shape[dim] == 1:
            continue
        if next_stride is not None and x.stride(dim) != next_stride:
            return None
        position_stride = x.stride(dim) if position_stride is None else position_stride
        next_stride = x.stride(dim) * x.shape[dim]
    return x.stride(0), x.stride(1), 1 if position_stride is None else position_stride


def _with_position_stride(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy if its positions need more than one stride."""
    return x if _strides(x) is not None else x.contiguous()


def _power(p: float) -> float:
    return p if p in _SIMPLE_POWERS else 0.0


def _pool(x: Tensor, p: float, reduce: int, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the maps [B, *spatial] and, for a maximum, its channels."""
    shape = [x.shape[0], *x.shape[2:]]
    maps = torch.empty(shape, dtype=compute, device=x.device)
    channel = torch.empty(shape if reduce == Reduce.MAX else 0, dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return maps, channel
    x = _with_position_stride(x)
    channels, positions = x.shape[1], x.shape[2:].numel()
    strides = cast(Strides, _strides(x))
    sizes = block_sizes(channels, positions, strides[2], compute == torch.float64)
    with device_of(x):
        _pool_kernel[(x.shape[0] * triton.cdiv(positions, sizes["BLOCK_S"]),)](
            x, maps, channel if reduce == Reduce.MAX else maps, *strides, channels, positions, p,
            MEAN=reduce == Reduce.MEAN, MAX=reduce == Reduce.MAX, POWER=_power(p), COMPUTE=as_tl(compute), **sizes,
        )  # fmt: skip
    return maps, channel


def _scatter(x: Tensor, weight: Tensor, channel: Tensor, p: float, reduce: int, compute: torch.dtype) -> Tensor:
    """Compute the gradient of the features from the factors of the positions [B, *spatial]."""
    grad = torch.empty_like(x)
    if x.numel() == 0:
        return grad
    x = _with_position_stride(x)
    out = grad if _strides(grad) is not None else torch.empty_like(x, memory_format=torch.contiguous_format)
    channels, positions = x.shape[1], x.shape[2:].numel()
    strides = cast(Strides, _strides(x))
    sizes = block_sizes(channels, positions, strides[2], compute == torch.float64)
    with device_of(x):
        _scatter_kernel[(x.shape[0] * triton.cdiv(positions, sizes["BLOCK_S"]) * triton.cdiv(channels, sizes["BLOCK_C"]),)](
            x, out, weight, channel if reduce == Reduce.MAX else weight, *strides, *cast(Strides, _strides(out)), channels, positions, p,
            MAX=reduce == Reduce.MAX, POWER=_power(p), COMPUTE=as_tl(compute), **sizes,
        )  # fmt: skip
    return grad if out is grad else grad.copy_(out)


def _factor(x: Tensor, p: float, reduce: int) -> float:
    return p / (x.shape[1] if reduce == Reduce.MEAN else 1)


def attention_pool(x: Tensor, p: float, reduce: int, normalize: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Implements kdkernels::attention_pool."""
    compute = compute_dtype(x)
    maps, channel = _pool(x, p, reduce, compute)
    norm = torch.empty(x.shape[0] if normalize == Normalize.L2 else 0, dtype=torch.float64, device=x.device)
    if normalize != Normalize.NONE and maps.numel():
        positions = x.shape[2:].numel()
        with device_of(x):
            _normalize_kernel[(x.shape[0],)](
                maps, norm, positions, eps, SOFTMAX=normalize == Normalize.SOFTMAX, COMPUTE=as_tl(compute), **_row_block(positions)
            )
    return maps, norm, channel


def attention_pool_backward(
    grad: Tensor, x: Tensor, maps: Tensor, norm: Tensor, channel: Tensor, p: float, reduce: int, normalize: int, eps: float
) -> Tensor:
    """Implements kdkernels::attention_pool_backward."""
    if x.numel() == 0:
        return torch.empty_like(x)
    compute = compute_dtype(x)
    weight, positions = torch.empty_like(maps), x.shape[2:].numel()
    with device_of(x):
        _weight_kernel[(x.shape[0],)](
            maps, grad.contiguous(), weight, norm if normalize == Normalize.L2 else maps, _factor(x, p, reduce), eps, positions,
            KIND=int(normalize), COMPUTE=as_tl(compute), **_row_block(positions),
        )  # fmt: skip
    return _scatter(x, weight, channel, p, reduce, compute)


def _float16_scale(weight: Tensor, maps: Tensor, channels: int, p: float, reduce: int) -> Tensor:
    """Return the powers of two [B] by which gradients are divided to be stored in float16.

    csrc/attention_pool/cpu.cpp derives the bound of the gradient.
    """
    sums = maps * channels if reduce == Reduce.MEAN else maps
    derivative = 2.0 ** (-24 * (p - 1)) if p < 1 else sums ** (1 - 1 / p)
    bound = (weight.abs() * derivative).flatten(1).amax(1)
    exponent = torch.where(bound.isfinite() & (bound > 0), torch.frexp(bound).exponent, 15)
    return torch.ldexp(torch.ones_like(bound), (exponent - 15).clamp(-100, 100)).float()


def _transfer(student, teacher, p, variant, reduce, eps, upstream, wanted, saved=False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the loss, both gradients, the scale of the student's gradient and the teacher's map.

    The last two are empty unless the gradient is saved.
    """
    compute = compute_dtype(student, teacher)
    batch = student.shape[0]
    losses = torch.empty(batch, dtype=torch.float64, device=student.device)
    empty, no_scale = student.new_empty(0), losses.new_empty(0, dtype=torch.float32)
    scaled = saved and student.dtype == torch.float16
    if batch == 0:
        grad_student, grad_teacher = (torch.empty_like(x) if w else empty for x, w in zip((student, teacher), wanted, strict=True))
        maps = torch.empty(0, *(student.shape[2:] if saved else ()), dtype=compute, device=student.device)
        return losses.sum().to(compute), grad_student, grad_teacher, no_scale, maps
    (s_map, s_channel), (t_map, t_channel) = (_pool(x, p, reduce, compute) for x in (student, teacher))
    s_weight, t_weight = (torch.empty_like(m) if w else None for m, w in zip((s_map, t_map), wanted, strict=True))
    eps_and_factors = (eps, _factor(student, p, reduce), _factor(teacher, p, reduce))
    positions = s_map.shape[1:].numel()
    with device_of(student):
        _transfer_kernel[(batch,)](
            s_map, t_map, losses, *(s_map if w is None else w for w in (s_weight, t_weight)), s_map if upstream is None else upstream,
            *eps_and_factors, batch, positions,
            PAPER=variant == Variant.PAPER, HAS_UPSTREAM=upstream is not None, WANT_STUDENT=wanted[0], WANT_TEACHER=wanted[1],
            COMPUTE=as_tl(compute), **_row_block(positions),
        )  # fmt: skip
    scale = no_scale
    if scaled and s_weight is not None:
        scale = _float16_scale(s_weight, s_map, student.shape[1], p, reduce)
        s_weight /= scale.view(-1, *(1,) * (s_map.dim() - 1))
    grad_student = _scatter(student, s_weight, s_channel, p, reduce, compute) if s_weight is not None else empty
    grad_teacher = _scatter(teacher, t_weight, t_channel, p, reduce, compute) if t_weight is not None else empty
    return (losses.sum() / batch).to(compute), grad_student, grad_teacher, scale, t_map if saved else t_map.new_empty(0)


def attention_transfer_loss(student, teacher, p, variant, reduce, eps, save_grad) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements kdkernels::attention_transfer_loss."""
    loss, grad, _, scale, teacher_map = _transfer(student, teacher, p, variant, reduce, eps, None, (save_grad, False), save_grad)
    return loss, grad, scale, teacher_map


def attention_transfer_loss_backward(grad_loss, student, teacher, p, variant, reduce, eps, wanted) -> tuple[Tensor, Tensor]:
    """Implements kdkernels::attention_transfer_loss_backward."""
    return _transfer(student, teacher, p, variant, reduce, eps, grad_loss, wanted)[1:3]


def attention_transfer_loss_rescale_(grad: Tensor, scale: Tensor, grad_loss: Tensor) -> None:
    """Implements kdkernels::attention_transfer_loss_rescale_."""
    if not scale.numel():
        rescale_(grad, grad_loss)
        return
    factor = (grad_loss.to(compute_dtype(grad)) * scale).view(-1, *(1,) * (grad.dim() - 1))
    grad.copy_(grad.to(factor.dtype) * factor)
