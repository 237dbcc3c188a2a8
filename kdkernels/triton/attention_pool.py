"""Triton kernels of attention_pool and attention_transfer_loss. The arithmetic is that of csrc/attention_pool/, explained there and in
docs/attention_pool.md.

Features are read where they lie, by the strides of sample, channel and place. Three kernels: maps from features; per sample, what the loss or the
normalisation makes of its maps [places], down to the weight of each place in the gradient; and the gradient of the features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import Normalize, Reduce, Variant
from .launch import as_tl, compile_options, device_of
from .math import cast_scalar

_SHORT_POWERS = (1.0, 1.5, 2.0, 3.0, 4.0)


@triton.jit
def _value(x, p, POWER: tl.constexpr):
    """|x|^p."""
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
def _slope(x, p, POWER: tl.constexpr):
    """|x|^(p-1) sign(x); 0 at 0."""
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
    channel_ptr,  # [B, S] int32, or unused
    x_sample, x_channel, x_place,
    channels,
    places,
    p: tl.float64,  # the exponent
    MEAN: tl.constexpr,
    MAX: tl.constexpr,
    POWER: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(places, BLOCK_S)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    s = (tl.program_id(0) % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    p = cast_scalar(p, COMPUTE)
    here = x_ptr + sample * x_sample + s[None, :].to(tl.int64) * x_place
    if MAX:
        # The first channel of the largest key: the magnitude, and above all of them a NaN.
        highest: tl.constexpr = 1.7976931348623157e308 if tl.float64 == COMPUTE else 3.4028234663852886e38
        top = tl.full([BLOCK_S], -1.0, COMPUTE)
        best = tl.zeros([BLOCK_S], COMPUTE)
        channel = tl.zeros([BLOCK_S], tl.int32)
        for start in range(0, channels, BLOCK_C):
            inside = ((start + c)[:, None] < channels) & (s[None, :] < places)
            x = tl.load(here + (start + c)[:, None].to(tl.int64) * x_channel, inside, other=0.0).to(COMPUTE)
            size = tl.abs(x)
            key = tl.where(x != x, float("inf"), tl.where(inside, tl.minimum(size, highest), -1.0)).to(COMPUTE)
            block_top, block_row = tl.max(key, 0, return_indices=True)
            value = tl.sum(tl.where(c[:, None] == block_row[None, :], size, 0.0), 0)
            better = block_top > top
            best = tl.where(better, value, best)
            channel = tl.where(better, start + block_row, channel)
            top = tl.where(better, block_top, top)
        total = _value(best, p, POWER)
        tl.store(channel_ptr + sample * places + s, channel, s < places)
    else:
        sums = tl.zeros([BLOCK_C, BLOCK_S], COMPUTE)
        for start in range(0, channels, BLOCK_C):
            inside = ((start + c)[:, None] < channels) & (s[None, :] < places)
            x = tl.load(here + (start + c)[:, None].to(tl.int64) * x_channel, inside, other=0.0).to(COMPUTE)
            sums += _value(x, p, POWER)
        total = tl.sum(sums, 0)
        if MEAN:
            total = total / tl.cast(channels, COMPUTE)  # Triton makes a size of 1 a constant, which has no .to()
    tl.store(map_ptr + sample * places + s, total, s < places)


@triton.jit
def _norm(map_ptr, places, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """L2 norm of a map, scaled by its largest, so that squares stay in range."""
    lane = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, places, BLOCK):
        a = tl.load(map_ptr + start + lane, start + lane < places, other=0.0)
        largest = tl.maximum(largest, tl.abs(a), propagate_nan=tl.PropagateNan.ALL)
    top = tl.max(largest, 0)
    top = tl.where(tl.sum((largest != largest).to(tl.int32), 0) > 0, float("nan"), top).to(COMPUTE)
    ordinary = (top > 0.0) & (top < float("inf"))
    safe = tl.where(ordinary, top, 1.0)
    squares = tl.zeros([BLOCK], COMPUTE)
    for start in range(0, places, BLOCK):
        a = tl.load(map_ptr + start + lane, start + lane < places, other=0.0) / safe
        squares += a * a
    return tl.where(ordinary, top * tl.sqrt(tl.sum(squares, 0)), top)


@triton.jit
def _divisor(norm, eps):
    """max(norm, eps), or NaN."""
    return tl.where((norm > eps) | (norm != norm), norm, eps)


@triton.jit
def _normalize_kernel(map_ptr, norm_ptr, places, eps: tl.float64, SOFTMAX: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """Maps [B, places] to normalised ones, in place; norms [B] of "l2"."""
    sample = tl.program_id(0).to(tl.int64)
    row = map_ptr + sample * places
    lane = tl.arange(0, BLOCK)
    if SOFTMAX:
        largest = tl.full([BLOCK], float("-inf"), COMPUTE)
        for start in range(0, places, BLOCK):
            a = tl.load(row + start + lane, start + lane < places, other=float("-inf"))
            largest = tl.maximum(largest, a)
        top = tl.max(largest, 0)
        total = tl.zeros([BLOCK], COMPUTE)
        for start in range(0, places, BLOCK):
            a = tl.load(row + start + lane, start + lane < places, other=float("-inf"))
            total += tl.exp(a - top)
        divisor = tl.sum(total, 0)
        for start in range(0, places, BLOCK):
            a = tl.load(row + start + lane, start + lane < places, other=0.0)
            tl.store(row + start + lane, tl.exp(a - top) / divisor, start + lane < places)
    else:
        norm = _norm(row, places, COMPUTE, BLOCK)
        eps = cast_scalar(eps, COMPUTE)
        divisor = _divisor(norm, eps)
        tl.store(norm_ptr + sample, norm.to(tl.float64))
        for start in range(0, places, BLOCK):
            a = tl.load(row + start + lane, start + lane < places, other=0.0)
            tl.store(row + start + lane, a / divisor, start + lane < places)


@triton.jit
def _weigh(q_ptr, g_ptr, weight_ptr, norm, eps, factor, places, KIND: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    """The weight of each place from dL/dq: KIND 0 q is the map; 1 q = map / max(norm, eps); 2 q = softmax(map)."""
    lane = tl.arange(0, BLOCK)
    along = tl.zeros([BLOCK], COMPUTE)
    if KIND > 0:
        for start in range(0, places, BLOCK):
            inside = start + lane < places
            along += tl.load(q_ptr + start + lane, inside, other=0.0) * tl.load(g_ptr + start + lane, inside, other=0.0).to(COMPUTE)
    dot = tl.sum(along, 0)
    for start in range(0, places, BLOCK):
        inside = start + lane < places
        g = tl.load(g_ptr + start + lane, inside, other=0.0).to(COMPUTE)
        if KIND == 1:
            q = tl.load(q_ptr + start + lane, inside, other=0.0)
            # Where the norm is below eps the divisor is a constant: no second term.
            g = tl.where(norm > eps, g - q * dot, g) / _divisor(norm, eps)
        if KIND == 2:
            g = tl.load(q_ptr + start + lane, inside, other=0.0) * (g - dot)
        tl.store(weight_ptr + start + lane, g * factor, inside)


@triton.jit
def _weight_kernel(
    q_ptr, g_ptr, weight_ptr, norm_ptr, factor: tl.float64, eps: tl.float64, places,
    KIND: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    eps, factor = cast_scalar(eps, COMPUTE), cast_scalar(factor, COMPUTE)
    norm = eps
    if KIND == 1:
        norm = tl.load(norm_ptr + sample).to(COMPUTE)
    at = sample * places
    _weigh(q_ptr + at, g_ptr + at, weight_ptr + at, norm, eps, factor, places, KIND, COMPUTE, BLOCK)


@triton.jit(do_not_specialize=["batch"])  # a last, smaller batch must not compile the kernel again
def _transfer_kernel(
    student_ptr,  # maps [B, S], overwritten
    teacher_ptr,  # maps [B, S], overwritten
    loss_ptr,  # [B] float64
    to_student_ptr,  # weights [B, S], or unused
    to_teacher_ptr,
    upstream_ptr,  # [] dL/dLoss, or unused
    eps: tl.float64,
    student_factor: tl.float64,  # of the weights
    teacher_factor: tl.float64,
    batch,
    places,
    PAPER: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    WANT_STUDENT: tl.constexpr,
    WANT_TEACHER: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    s_row, t_row = student_ptr + sample * places, teacher_ptr + sample * places
    eps = cast_scalar(eps, COMPUTE)
    s_norm, t_norm = _norm(s_row, places, COMPUTE, BLOCK), _norm(t_row, places, COMPUTE, BLOCK)
    s_divisor = _divisor(s_norm, eps)
    t_divisor = _divisor(t_norm, eps)
    squares = tl.zeros([BLOCK], COMPUTE)
    s_along, t_along = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    for start in range(0, places, BLOCK):
        inside = start + lane < places
        qs, qt = tl.load(s_row + start + lane, inside, other=0.0) / s_divisor, tl.load(t_row + start + lane, inside, other=0.0) / t_divisor
        squares += (qs - qt) * (qs - qt)
        s_along += qs * (qs - qt)
        t_along += qt * (qs - qt)
    square, s_dot, t_dot = tl.sum(squares, 0), tl.sum(s_along, 0), tl.sum(t_along, 0)
    if PAPER:
        loss = tl.sqrt(square)
        slope = tl.where(loss > 0.0, 1.0 / tl.where(loss > 0.0, loss, 1.0), loss)
    else:
        loss = square / tl.cast(places, COMPUTE)
        slope = 2.0 / tl.cast(places, COMPUTE) + 0.0 * loss
    tl.store(loss_ptr + sample, loss.to(tl.float64))
    scale = slope / tl.cast(batch, COMPUTE)
    if HAS_UPSTREAM:
        scale = scale * tl.load(upstream_ptr).to(COMPUTE)
    if WANT_STUDENT or WANT_TEACHER:
        to_student, to_teacher = scale * cast_scalar(student_factor, COMPUTE), -scale * cast_scalar(teacher_factor, COMPUTE)
        for start in range(0, places, BLOCK):
            inside = start + lane < places
            qs, qt = tl.load(s_row + start + lane, inside, other=0.0) / s_divisor, tl.load(t_row + start + lane, inside, other=0.0) / t_divisor
            d = qs - qt
            if WANT_STUDENT:
                g = tl.where(s_norm > eps, d - qs * s_dot, d) / s_divisor
                tl.store(to_student_ptr + sample * places + start + lane, g * to_student, inside)
            if WANT_TEACHER:
                g = tl.where(t_norm > eps, d - qt * t_dot, d) / t_divisor
                tl.store(to_teacher_ptr + sample * places + start + lane, g * to_teacher, inside)


@triton.jit
def _scatter_kernel(
    x_ptr,  # [B, C, S] by strides
    grad_ptr,  # [B, C, S] by strides
    weight_ptr,  # [B, S]
    channel_ptr,  # [B, S] int32, or unused
    x_sample, x_channel, x_place,
    g_sample, g_channel, g_place,
    channels,
    places,
    p: tl.float64,
    MAX: tl.constexpr,
    POWER: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    # All in the first dimension of the grid: the others hold no more than 65,535 programs.
    blocks, channel_blocks = tl.cdiv(places, BLOCK_S), tl.cdiv(channels, BLOCK_C)
    sample = (tl.program_id(0) // (blocks * channel_blocks)).to(tl.int64)
    s = (tl.program_id(0) % blocks) * BLOCK_S + tl.arange(0, BLOCK_S)
    c = (tl.program_id(0) // blocks % channel_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (c[:, None] < channels) & (s[None, :] < places)
    c64, s64 = c[:, None].to(tl.int64), s[None, :].to(tl.int64)
    x = tl.load(x_ptr + sample * x_sample + c64 * x_channel + s64 * x_place, inside, other=0.0).to(COMPUTE)
    weight = tl.load(weight_ptr + sample * places + s, s < places, other=0.0)
    g = _slope(x, cast_scalar(p, COMPUTE), POWER) * weight[None, :]
    if MAX:
        channel = tl.load(channel_ptr + sample * places + s, s < places, other=-1)
        g = tl.where(c[:, None] == channel[None, :], g, 0.0)
    tl.store(grad_ptr + sample * g_sample + c64 * g_channel + s64 * g_place, g.to(grad_ptr.dtype.element_ty), inside)


def block_sizes(channels: int, places: int, place_stride: int, double: bool = False) -> dict[str, int | bool]:
    """BLOCK_C, BLOCK_S and the compiler's options for a tile of features: long where memory is adjacent, 4096 numbers (1024 doubles) at most."""
    most = 1024 if double else 4096
    if place_stride == 1:
        block_s = min(256, max(16, triton.next_power_of_2(places)))
        block_c = min(max(1, triton.next_power_of_2(channels)), most // block_s, 32)
    else:
        block_c = min(256, max(16, triton.next_power_of_2(channels)))
        block_s = min(max(1, triton.next_power_of_2(places)), most // block_c, 16)
    return {"BLOCK_C": block_c, "BLOCK_S": block_s} | compile_options(max(1, min(8, block_c * block_s // (128 if double else 512))))


def _row_block(places: int) -> dict[str, int | bool]:
    block = min(1024, max(32, triton.next_power_of_2(places)))
    return {"BLOCK": block} | compile_options(max(1, block // 256))


def _strides(x: Tensor) -> tuple[int, int, int] | None:
    """Strides of sample, channel and place, if the places lie at one step."""
    step, following = None, None
    for d in range(x.dim() - 1, 1, -1):
        if x.shape[d] == 1:
            continue
        if following is not None and x.stride(d) != following:
            return None
        step = x.stride(d) if step is None else step
        following = x.stride(d) * x.shape[d]
    return x.stride(0), x.stride(1), 1 if step is None else step


def _readable(x: Tensor) -> Tensor:
    return x if _strides(x) is not None else x.contiguous()


def _power(p: float) -> float:
    return p if p in _SHORT_POWERS else 0.0


def _pool(x: Tensor, p: float, reduce: int, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """Maps [B, *spatial] and, for a maximum, channels."""
    shape = [x.shape[0], *x.shape[2:]]
    maps = torch.empty(shape, dtype=compute, device=x.device)
    channel = torch.empty(shape if reduce == Reduce.MAX else 0, dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return maps, channel
    x = _readable(x)
    channels, places = x.shape[1], x.shape[2:].numel()
    strides = _strides(x)
    sizes = block_sizes(channels, places, strides[2], compute == torch.float64)
    with device_of(x):
        _pool_kernel[(x.shape[0] * triton.cdiv(places, sizes["BLOCK_S"]),)](
            x, maps, channel if reduce == Reduce.MAX else maps, *strides, channels, places, p,
            MEAN=reduce == Reduce.MEAN, MAX=reduce == Reduce.MAX, POWER=_power(p), COMPUTE=as_tl(compute), **sizes,
        )  # fmt: skip
    return maps, channel


def _scatter(x: Tensor, weight: Tensor, channel: Tensor, p: float, reduce: int, compute: torch.dtype) -> Tensor:
    """The gradient of the features from the weights of the places [B, *spatial]."""
    grad = torch.empty_like(x)
    if x.numel() == 0:
        return grad
    x = _readable(x)
    out = grad if _strides(grad) is not None else torch.empty_like(x, memory_format=torch.contiguous_format)
    channels, places = x.shape[1], x.shape[2:].numel()
    strides = _strides(x)
    sizes = block_sizes(channels, places, strides[2], compute == torch.float64)
    with device_of(x):
        _scatter_kernel[(x.shape[0] * triton.cdiv(places, sizes["BLOCK_S"]) * triton.cdiv(channels, sizes["BLOCK_C"]),)](
            x, out, weight, channel if reduce == Reduce.MAX else weight, *strides, *_strides(out), channels, places, p,
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
        places = x.shape[2:].numel()
        with device_of(x):
            _normalize_kernel[(x.shape[0],)](
                maps, norm, places, eps, SOFTMAX=normalize == Normalize.SOFTMAX, COMPUTE=as_tl(compute), **_row_block(places)
            )
    return maps, norm, channel


def attention_pool_backward(
    grad: Tensor, x: Tensor, maps: Tensor, norm: Tensor, channel: Tensor, p: float, reduce: int, normalize: int, eps: float
) -> Tensor:
    """Implements kdkernels::attention_pool_backward."""
    if x.numel() == 0:
        return torch.empty_like(x)
    compute = compute_dtype(x)
    weight, places = torch.empty_like(maps), x.shape[2:].numel()
    with device_of(x):
        _weight_kernel[(x.shape[0],)](
            maps, grad.contiguous(), weight, norm if normalize == Normalize.L2 else maps, _factor(x, p, reduce), eps, places,
            KIND=int(normalize), COMPUTE=as_tl(compute), **_row_block(places),
        )  # fmt: skip
    return _scatter(x, weight, channel, p, reduce, compute)


def _scale_of_half(weight: Tensor, maps: Tensor, channels: int, p: float, reduce: int) -> Tensor:
    """The power of two by which the gradient of each sample is divided to be stored in float16, [B]: csrc/attention_pool/cpu.cpp has the bound."""
    whole = maps * channels if reduce == Reduce.MEAN else maps
    slope = 2.0 ** (-24 * (p - 1)) if p < 1 else whole ** (1 - 1 / p)
    bound = (weight.abs() * slope).flatten(1).amax(1)
    exponent = torch.where(bound.isfinite() & (bound > 0), torch.frexp(bound).exponent, 15)
    return torch.ldexp(torch.ones_like(bound), (exponent - 15).clamp(-100, 100)).float()


def _transfer(student, teacher, p, variant, reduce, eps, upstream, wanted, saved=False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, both gradients, the scale of the student's gradient and the teacher's map: the last two where the gradient is saved."""
    compute = compute_dtype(student, teacher)
    batch = student.shape[0]
    losses = torch.empty(batch, dtype=torch.float64, device=student.device)
    empty, no_scale = student.new_empty(0), losses.new_empty(0, dtype=torch.float32)
    scaled = saved and student.dtype == torch.float16
    if batch == 0:
        grads = (torch.empty_like(x) if w else empty for x, w in zip((student, teacher), wanted, strict=True))
        maps = torch.empty(0, *(student.shape[2:] if saved else ()), dtype=compute, device=student.device)
        return losses.sum().to(compute), *grads, no_scale, maps
    (s_map, s_channel), (t_map, t_channel) = (_pool(x, p, reduce, compute) for x in (student, teacher))
    weights = [torch.empty_like(m) if w else None for m, w in zip((s_map, t_map), wanted, strict=True)]
    numbers = (eps, _factor(student, p, reduce), _factor(teacher, p, reduce))
    places = s_map.shape[1:].numel()
    with device_of(student):
        _transfer_kernel[(batch,)](
            s_map, t_map, losses, *(s_map if w is None else w for w in weights), s_map if upstream is None else upstream, *numbers, batch, places,
            PAPER=variant == Variant.PAPER, HAS_UPSTREAM=upstream is not None, WANT_STUDENT=wanted[0], WANT_TEACHER=wanted[1],
            COMPUTE=as_tl(compute), **_row_block(places),
        )  # fmt: skip
    scale = no_scale
    if scaled:
        scale = _scale_of_half(weights[0], s_map, student.shape[1], p, reduce)
        weights[0] /= scale.view(-1, *(1,) * (s_map.dim() - 1))
    to_student = _scatter(student, weights[0], s_channel, p, reduce, compute) if wanted[0] else empty
    to_teacher = _scatter(teacher, weights[1], t_channel, p, reduce, compute) if wanted[1] else empty
    return (losses.sum() / batch).to(compute), to_student, to_teacher, scale, t_map if saved else t_map.new_empty(0)


def attention_transfer_loss(student, teacher, p, variant, reduce, eps, save_grad) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements kdkernels::attention_transfer_loss."""
    loss, grad, _, scale, teacher_map = _transfer(student, teacher, p, variant, reduce, eps, None, (save_grad, False), save_grad)
    return loss, grad, scale, teacher_map


def attention_transfer_loss_backward(grad_loss, student, teacher, p, variant, reduce, eps, wanted) -> tuple[Tensor, Tensor]:
    """Implements kdkernels::attention_transfer_loss_backward."""
    return _transfer(student, teacher, p, variant, reduce, eps, grad_loss, wanted)[1:3]


def attention_transfer_loss_rescale_(grad: Tensor, scale: Tensor, grad_loss: Tensor) -> None:
    """Implements kdkernels::attention_transfer_loss_rescale_."""
    compute = compute_dtype(grad)
    factor = grad_loss.to(compute)
    if scale.numel():
        factor = (factor * scale).view(-1, *(1,) * (grad.dim() - 1))
    if grad.dtype == compute:
        grad.mul_(factor)
    else:
        grad.copy_(grad.to(compute) * factor)
