"""Triton kernels of temperature_kl. The arithmetic is that of csrc/temperature_kl/, explained there and in docs/temperature_kl.md.

One program works on a tile of ROWS rows and walks over their classes in blocks of BLOCK: once for the statistics of the row, which are merged
block by block, and once more for the gradients. A row that fits one block is read from memory once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compile_options, device_of, is_dense
from .math import centred_kl, exp_falling, exp_parts, log, log1p

_DIRECTIONS = {"forward": 0, "reverse": 1, "jsd": 2}


@triton.jit
def _weights(b, o, present, safe, inv_t, mean):
    """e = z p_b, d = (b - o) / T, and z p_b (e^y - 1), z p_b (e^y - 1 - y), z p_b y with y = mean - d."""
    e = tl.where(present, exp_falling((b - safe) * inv_t), 0.0)
    d = (b - o) * inv_t
    y = mean - d
    scale, r, h = exp_parts(tl.minimum(y, 17.0, propagate_nan=tl.PropagateNan.ALL))
    ey = tl.where(e == 0.0, 0.0, e * y)
    up = e * (scale * (r + h) + (scale - 1.0))
    above = e * (scale * h + (scale * r + ((scale - 1.0) - y)))
    # Past e^16 the product p_b e^y is formed in the exponent, where it cannot overflow.
    joined = present & ~(y < 16.0)
    highest: tl.constexpr = 709.0 if b.dtype == tl.float64 else 88.0
    grown = tl.exp(tl.minimum((o - safe) * inv_t + mean, highest, propagate_nan=tl.PropagateNan.ALL))
    up = tl.where(joined, grown - e, tl.where(present, up, 0.0))
    above = tl.where(joined, up - ey, tl.where(present, above, 0.0))
    return e, d, up, above, ey


@triton.jit
def _kl_kernel(
    student_ptr,  # [rows, C] by strides
    teacher_ptr,  # [rows, C] by strides
    temperature_ptr,  # [rows] or unused
    mask_ptr,  # [rows] or unused
    weight_ptr,  # [] weight of a row in the loss, or unused
    upstream_ptr,  # [] or [rows], or unused
    loss_ptr,  # [rows]
    to_student_ptr,
    to_teacher_ptr,
    to_temperature_ptr,  # [rows]
    temperature,
    weight,
    rows,
    classes,
    inner,  # row = outer * inner + i
    s_outer, s_inner, s_class,
    t_outer, t_inner, t_class,
    gs_outer, gs_inner, gs_class,
    gt_outer, gt_inner, gt_class,
    BETA: tl.constexpr,
    EPS: tl.constexpr,
    DIRECTION: tl.constexpr,  # 0 forward, 1 reverse, 2 jsd
    T_SQUARED: tl.constexpr,
    ENTROPY: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    UPSTREAM: tl.constexpr,  # 0 none, 1 one number, 2 one per row
    WANT_LOSS: tl.constexpr,
    WANT_STUDENT: tl.constexpr,
    WANT_TEACHER: tl.constexpr,
    WANT_TEMPERATURE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_batch = row < rows
    keep = in_batch
    if HAS_MASK:
        keep = in_batch & tl.load(mask_ptr + row, mask=in_batch, other=0).to(tl.int1)
    t_row = tl.load(temperature_ptr + row, mask=in_batch, other=1.0).to(COMPUTE) if HAS_TEMPERATURE else tl.full([ROWS], 1.0, COMPUTE) * temperature
    inv_t = (1.0 / t_row)[:, None]
    outer, i = row // inner, row % inner
    s_row = student_ptr + (outer * s_outer + i * s_inner)[:, None]
    t_row_ptr = teacher_ptr + (outer * t_outer + i * t_inner)[:, None]
    column = tl.arange(0, BLOCK)[None, :].to(tl.int64)

    # A row that is masked out, or past the end, is read as zeros in both nets.
    if ONE_BLOCK:
        present = keep[:, None] & (column < classes)
        s = tl.load(s_row + column * s_class, mask=present, other=0.0).to(COMPUTE)
        t = tl.load(t_row_ptr + column * t_class, mask=present, other=0.0).to(COMPUTE)

    negative: tl.constexpr = -float("inf")
    top = tl.full([ROWS, 1], negative, COMPUTE)
    safe = tl.zeros([ROWS, 1], COMPUTE)  # top, or 0 while no class has been seen
    z = tl.zeros([ROWS, 1], COMPUTE)
    mean = tl.zeros([ROWS, 1], COMPUTE)
    convex = tl.zeros([ROWS, 1], COMPUTE)
    drift = tl.zeros([ROWS, 1], COMPUTE)
    o_top = tl.full([ROWS, 1], negative, COMPUTE)
    o_safe = tl.zeros([ROWS, 1], COMPUTE)
    o_z = tl.zeros([ROWS, 1], COMPUTE)
    far = tl.zeros([ROWS, 1], tl.int1)

    for start in range(0, classes, BLOCK):
        in_row = start + column < classes
        if not ONE_BLOCK:
            present = keep[:, None] & in_row
            s = tl.load(s_row + (start + column) * s_class, mask=present, other=0.0).to(COMPUTE)
            t = tl.load(t_row_ptr + (start + column) * t_class, mask=present, other=0.0).to(COMPUTE)
        if DIRECTION == 1:
            b, o = s, t
        else:
            b, o = t, s

        # log-sum-exp of the other side, needed where the nets are far apart
        o_next = tl.maximum(o_top, tl.max(tl.where(in_row, o, negative), 1, keep_dims=True))
        o_next_safe = tl.where(o_next == negative, 0.0, o_next)
        o_z = o_z * tl.where(o_top == negative, 0.0, tl.exp((o_safe - o_next_safe) * inv_t))
        o_z += tl.sum(tl.where(in_row, tl.exp((o - o_next_safe) * inv_t), 0.0), 1, keep_dims=True)
        o_top, o_safe = o_next, o_next_safe

        # The mean so far, over all blocks.
        next_top = tl.maximum(top, tl.max(tl.where(in_row, b, negative), 1, keep_dims=True))
        next_safe = tl.where(next_top == negative, 0.0, next_top)
        began = z > 0.0
        far = far | ((z == 0.0) & (convex > 0.0))  # classes of the other side came before any of this side
        shrink = tl.where(began, tl.exp((safe - next_safe) * inv_t), 0.0)
        top, safe = next_top, next_safe
        e = tl.where(in_row, exp_falling((b - safe) * inv_t), 0.0)
        d = (b - o) * inv_t
        before = z * shrink
        z = before + tl.sum(e, 1, keep_dims=True)
        total = before * mean + tl.sum(tl.where(e == 0.0, 0.0, e * d), 1, keep_dims=True)
        next_mean = tl.where(z == 0.0, mean, total / z)

        # Moves the sums so far from the old centre to the new one, exactly: y' = y - delta.
        delta = tl.where(began, mean - next_mean, 0.0)
        mean = next_mean
        scale, r, h = exp_parts(-delta)
        up = scale * (r + h) + (scale - 1.0)
        above = scale * h + (scale * r + ((scale - 1.0) + delta))
        convex = (convex * (1.0 + up) - drift * up) * shrink + before * above
        drift = drift * shrink + before * delta

        e, d, up, above, ey = _weights(b, o, in_row, safe, inv_t, mean)
        block = tl.sum(above, 1, keep_dims=True)
        far = far | ~(block < 1e30)
        convex += block
        drift -= tl.sum(ey, 1, keep_dims=True)

    inv_z = 1.0 / z
    convex, drift = convex * inv_z, drift * inv_z
    w = convex - drift
    kl = centred_kl(convex, drift, w)
    far = far | ~(convex < 1e30)
    log_z = log(z)
    far_shift = (safe - o_safe) * inv_t + log_z - log(o_z)
    shift = tl.where(far, far_shift, mean + drift - kl)  # log p_b - log p_o = d - shift
    kl = tl.where(far, mean - far_shift, kl)
    w = tl.where(far, 0.0, w)
    drift = tl.where(far, 0.0, drift)

    factor = tl.full([ROWS], 1.0, COMPUTE)
    if T_SQUARED:
        factor = t_row * t_row
    row_weight = tl.full([ROWS], 1.0, COMPUTE) * weight
    if HAS_WEIGHT:
        row_weight = row_weight * tl.load(weight_ptr).to(COMPUTE)
    if UPSTREAM == 1:
        row_weight = row_weight * tl.load(upstream_ptr).to(COMPUTE)
    if UPSTREAM == 2:
        row_weight = row_weight * tl.load(upstream_ptr + row, mask=in_batch, other=0.0).to(COMPUTE)
    scale_out = (row_weight * factor)[:, None] * inv_t

    A: tl.constexpr = 1.0 - BETA
    mean_v = tl.zeros([ROWS, 1], COMPUTE)
    mean_lift = tl.zeros([ROWS, 1], COMPUTE)
    value = kl
    if DIRECTION == 2 or EPS > 0.0 or not ENTROPY:
        extra = tl.zeros([ROWS, 1], COMPUTE)
        for start in range(0, classes, BLOCK):
            in_row = start + column < classes
            if not ONE_BLOCK:
                present = keep[:, None] & in_row
                s = tl.load(s_row + (start + column) * s_class, mask=present, other=0.0).to(COMPUTE)
                t = tl.load(t_row_ptr + (start + column) * t_class, mask=present, other=0.0).to(COMPUTE)
            p = tl.where(in_row, exp_falling((t - safe) * inv_t), 0.0) * inv_z
            v = (t - safe) * inv_t
            log_q = (s - safe) * inv_t + shift - log_z
            if DIRECTION == 2:
                q, log_pm, log_qm, f, near = _jsd_terms(p, (t - s) * inv_t - shift, log_q, BETA)
                pa, qb = tl.where(p == 0.0, 0.0, p * log_pm), tl.where(q == 0.0, 0.0, q * log_qm)
                extra += tl.sum(tl.where(in_row, tl.where(near, p * f, BETA * pa + A * qb), 0.0), 1, keep_dims=True)
                mean_v += tl.sum(tl.where(in_row, pa, 0.0), 1, keep_dims=True)  # E_p[log p / M]
                mean_lift += tl.sum(tl.where(in_row, qb, 0.0), 1, keep_dims=True)  # E_q[log q / M]
            else:
                mean_v += tl.sum(tl.where(p == 0.0, 0.0, p * v), 1, keep_dims=True)
                if EPS > 0.0:
                    lift = tl.where(p == 0.0, 0.0, p * _log_lift(p, v, log_z, EPS))
                    mean_lift += tl.sum(lift, 1, keep_dims=True)
                    added = lift + EPS * (log(p + EPS) - log_q) if ENTROPY else -EPS * log_q
                    extra += tl.sum(tl.where(in_row, added, 0.0), 1, keep_dims=True)
        if DIRECTION == 2:
            value = tl.where(extra < 0.0, 0.0, extra)
        else:
            value = kl + extra
            if not ENTROPY:
                value += log_z - mean_v

    slope = tl.zeros([ROWS, 1], COMPUTE)
    if WANT_STUDENT or WANT_TEACHER or WANT_TEMPERATURE:
        for start in range(0, classes, BLOCK):
            in_row = start + column < classes
            if not ONE_BLOCK:
                present = keep[:, None] & in_row
                s = tl.load(s_row + (start + column) * s_class, mask=present, other=0.0).to(COMPUTE)
                t = tl.load(t_row_ptr + (start + column) * t_class, mask=present, other=0.0).to(COMPUTE)
            if DIRECTION == 1:
                b, o = s, t
            else:
                b, o = t, s
            e, d, up, above, ey = _weights(b, o, in_row, safe, inv_t, mean)
            p, v = e * inv_z, (b - safe) * inv_t
            if DIRECTION == 2:
                z_gap = d - shift
                q, log_pm, log_qm, f, near = _jsd_terms(p, z_gap, (s - safe) * inv_t + shift - log_z, BETA)
                to_other = tl.where(q == 0.0, 0.0, A * q * (log_qm - mean_lift))
                to_base = tl.where(p == 0.0, 0.0, BETA * p * (log_pm - mean_v))
            else:
                p_other = tl.exp((o - o_safe) * inv_t) / o_z
                up = tl.where(far, p_other * z - e, up)
                to_other = (up - w * e) * inv_z / (1.0 + w)
                if EPS > 0.0:
                    to_other += EPS * (classes * (p + to_other) - 1.0)
                a = d - mean - drift
                if not ENTROPY:
                    a = a - (v - mean_v)
                elif EPS > 0.0:
                    a = a + _log_lift(p, v, log_z, EPS) - mean_lift
                to_base = tl.where(p == 0.0, 0.0, p * a)
            to_other, to_base = tl.where(in_row, to_other, 0.0), tl.where(in_row, to_base, 0.0)
            slope += tl.sum(tl.where(to_other == 0.0, 0.0, to_other * ((o - safe) * inv_t)), 1, keep_dims=True)
            slope += tl.sum(tl.where(to_base == 0.0, 0.0, to_base * v), 1, keep_dims=True)
            if DIRECTION == 1:
                to_s, to_t = to_base, to_other
            else:
                to_s, to_t = to_other, to_base
            written = in_batch[:, None] & in_row
            kept = keep[:, None]
            if WANT_STUDENT:
                where = to_student_ptr + (outer * gs_outer + i * gs_inner)[:, None] + (start + column) * gs_class
                tl.store(where, tl.where(kept, to_s * scale_out, 0.0).to(to_student_ptr.dtype.element_ty), mask=written)
            if WANT_TEACHER:
                where = to_teacher_ptr + (outer * gt_outer + i * gt_inner)[:, None] + (start + column) * gt_class
                tl.store(where, tl.where(kept, to_t * scale_out, 0.0).to(to_teacher_ptr.dtype.element_ty), mask=written)

    row_value = tl.sum(value, 1)
    if WANT_LOSS:
        tl.store(loss_ptr + row, tl.where(keep, row_value * factor, 0.0), mask=in_batch)
    if WANT_TEMPERATURE:
        own = tl.zeros([ROWS], COMPUTE)
        if T_SQUARED:
            own = 2.0 * t_row * row_value
        total_slope = row_weight * (own - factor / t_row * tl.sum(slope, 1))
        tl.store(to_temperature_ptr + row, tl.where(keep, total_slope, 0.0).to(to_temperature_ptr.dtype.element_ty), mask=in_batch)


@triton.jit
def _log_lift(p, v, log_z, EPS: tl.constexpr):
    """log(1 + eps / p), from whichever side does not cancel."""
    return tl.where(p > EPS, log1p(EPS / p), log(p + EPS) - (v - log_z))


@triton.jit
def _jsd_terms(p, z, log_q, BETA: tl.constexpr):
    """q, log(p / M), log(q / M), f(q/p - 1) and whether the series of f holds; z = log p - log q (csrc/temperature_kl/jsd.h)."""
    A: tl.constexpr = 1.0 - BETA
    NEAR: tl.constexpr = 0.05 if p.dtype == tl.float64 else 0.25
    student_alone = ~(z > -16.0)
    scale, r, h = exp_parts(tl.where(student_alone, 0.0, -z))
    u = scale * (r + h) + (scale - 1.0)
    log_pm = -log1p(A * u)
    log_qm = tl.where(student_alone, -log(A + BETA * tl.exp(tl.minimum(z, 0.0))), log_pm - z)
    log_pm = tl.where(student_alone, log_qm + z, log_pm)
    highest: tl.constexpr = 709.0 if p.dtype == tl.float64 else 88.0
    q = tl.where(student_alone, tl.exp(tl.minimum(log_q, highest, propagate_nan=tl.PropagateNan.ALL)), p + p * u)
    # sum_{k >= 2} (-1)^k (a - a^k) u^k / (k (k - 1)), by Horner from k = 15
    poly = tl.zeros(p.shape, p.dtype)
    for i in tl.static_range(14):
        poly = poly * u + (1 - 2 * ((15 - i) % 2)) * (A - A ** (15 - i)) / ((15 - i) * (14 - i))
    return q, log_pm, log_qm, poly * u * u, (tl.abs(u) < NEAR) & ~student_alone


@triton.jit
def _rescale_kernel(grad_ptr, scale_ptr, count, BLOCK: tl.constexpr):
    """grad *= scale in place; the unit scale of a plain .backward() leaves at once."""
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < count)
        tl.store(grad_ptr + at, (grad.to(scale.dtype) * scale).to(grad.dtype), mask=at < count)


def _common_layout(tensors: list[Tensor | None], dim: int) -> tuple[int, list[tuple[int, int, int]]] | None:
    """Rows as (outer, inner) for all tensors at once: inner size, and (outer stride, inner stride, class stride) of each; None if two do not do."""
    present = [x for x in tensors if x is not None]
    dims = [d for d in range(present[0].dim()) if d != dim and present[0].shape[d] != 1]
    groups: list[list[int]] = []
    for d in dims:
        if groups and all(x.stride(groups[-1][-1]) == x.stride(d) * x.shape[d] for x in present):
            groups[-1].append(d)
        else:
            groups.append([d])
    if len(groups) > 2:
        return None
    inner_dims = groups[-1] if groups else []
    inner = 1
    for d in inner_dims:
        inner *= present[0].shape[d]

    def strides(x: Tensor | None) -> tuple[int, int, int]:
        if x is None:
            return 0, 0, 0
        outer = x.stride(groups[0][-1]) if len(groups) == 2 else 0
        return outer, x.stride(inner_dims[-1]) if inner_dims else 0, x.stride(dim)

    return inner, [strides(x) for x in tensors]


def block_sizes(classes: int, class_stride: int, double: bool = False) -> dict[str, int | bool]:
    """ROWS, BLOCK, ONE_BLOCK and num_warps of the tiles: 4 logits per thread (2 in double), which keeps every variant in registers."""
    block = max(16, triton.next_power_of_2(classes))
    tile, longest = (256, 256) if double else (512, 2048)
    if class_stride == 1:
        one_block = block <= longest
        block = min(block, longest)
        rows = max(1, tile // block)
    else:  # neighbours in memory are rows: whole sectors of them
        rows = 16 if double else 32
        one_block = block * rows <= tile
        block = min(block, tile // rows)
    per_thread = 2 if double else 4
    return {"ROWS": rows, "BLOCK": block, "ONE_BLOCK": one_block, "num_warps": max(1, rows * block // (32 * per_thread))}


def _launch(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, t_squared, entropy, eps,
            *, upstream=None, loss=None, to_student=None, to_teacher=None, to_temperature=None) -> Tensor | float:  # fmt: skip
    """Runs the kernel; returns the weight of a row in the loss."""
    dim = dim % student.dim()
    classes = student.shape[dim]
    rows = student.numel() // classes
    compute = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    weight, weight_tensor = _row_weight(reduction, classes, rows, mask, normalizer)
    result = weight if weight_tensor is None else weight * weight_tensor
    if rows == 0:
        return result
    layout = _common_layout([student, teacher, to_student, to_teacher], dim)
    if layout is None:  # rows of three or more runs: work on a copy with the classes last
        moved = [None if x is None else x.movedim(dim, -1).contiguous() for x in (student, teacher, to_student, to_teacher)]
        _launch(*moved[:2], temperature, row_temperature, mask, normalizer, -1, direction, beta, reduction, t_squared, entropy, eps,
                upstream=upstream, loss=loss, to_student=moved[2], to_teacher=moved[3], to_temperature=to_temperature)  # fmt: skip
        for x, copy in ((to_student, moved[2]), (to_teacher, moved[3])):
            if x is not None:
                x.copy_(copy.movedim(-1, dim))
        return result
    inner, strides = layout
    if compute == torch.float64 and row_temperature is None:  # a scalar argument of a kernel is a float32
        row_temperature = torch.full((rows,), temperature, dtype=compute, device=student.device)
    if compute == torch.float64 and weight_tensor is None:
        weight_tensor, weight = torch.full((), weight, dtype=compute, device=student.device), 1.0
    row_numbers = [None if x is None else x.contiguous() for x in (row_temperature, mask, weight_tensor, upstream)]
    row_temperature, mask, weight_tensor, upstream = row_numbers
    pointers = [
        row_temperature,
        mask if mask is None else mask.view(torch.uint8),
        weight_tensor,
        upstream,
        loss,
        to_student,
        to_teacher,
        to_temperature,
    ]
    sizes = block_sizes(classes, strides[0][2], compute == torch.float64)
    sizes |= compile_options(sizes["num_warps"])
    with device_of(student):
        _kl_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
            student, teacher, *(student if p is None else p for p in pointers), float(temperature), float(weight), rows, classes, inner,
            *(s for operand in strides for s in operand),
            BETA=beta, EPS=eps, DIRECTION=_DIRECTIONS[direction], T_SQUARED=t_squared, ENTROPY=entropy,
            HAS_TEMPERATURE=row_temperature is not None, HAS_MASK=mask is not None, HAS_WEIGHT=weight_tensor is not None,
            UPSTREAM=0 if upstream is None else 1 if upstream.dim() == 0 else 2,
            WANT_LOSS=loss is not None, WANT_STUDENT=to_student is not None, WANT_TEACHER=to_teacher is not None,
            WANT_TEMPERATURE=to_temperature is not None, COMPUTE=tl.float64 if compute == torch.float64 else tl.float32, **sizes,
        )  # fmt: skip
    return result


def _row_weight(reduction, classes, rows, mask, normalizer) -> tuple[float, Tensor | None]:
    """Weight of a row in the loss as number times tensor (or None), without reading anything back."""
    if reduction in ("none", "sum"):
        return 1.0, None
    per_class = 1.0 / classes if reduction == "mean" else 1.0
    if normalizer is not None:
        return per_class, 1.0 / normalizer.to(torch.float64).reshape(())
    if mask is not None:
        return per_class, 1.0 / mask.sum().clamp(min=1).to(torch.float64)
    return per_class / max(rows, 1), None


def _row_shape(x: Tensor, dim: int) -> list[int]:
    return [*x.shape[:dim], *x.shape[dim:][1:]]


def temperature_kl(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2, include_entropy,
                   target_eps, save_grad) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Implements kdkernels::temperature_kl."""
    compute = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    row_loss = torch.empty(_row_shape(student, dim), dtype=compute, device=student.device)
    grad = torch.empty_like(student) if save_grad else student.new_empty(0)
    weight = _launch(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2,
                     include_entropy, target_eps, loss=row_loss, to_student=grad if save_grad else None)  # fmt: skip
    if reduction == "none":
        return row_loss, grad
    total = row_loss.sum(dtype=torch.float64)
    return (total * weight).to(compute), grad


def temperature_kl_backward(grad_loss, student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2,
                            include_entropy, target_eps, wanted) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements kdkernels::temperature_kl_backward."""
    compute = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    to_student = torch.empty_like(student) if wanted[0] else None
    to_teacher = torch.empty_like(teacher) if wanted[1] else None
    dtype = compute if row_temperature is None else row_temperature.dtype
    to_temperature = torch.empty(_row_shape(student, dim), dtype=dtype, device=student.device) if wanted[2] else None
    _launch(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2, include_entropy,
            target_eps, upstream=grad_loss, to_student=to_student, to_teacher=to_teacher, to_temperature=to_temperature)  # fmt: skip
    return tuple(student.new_empty(0) if x is None else x for x in (to_student, to_teacher, to_temperature))


def temperature_kl_rescale_(grad: Tensor, grad_loss: Tensor, dim: int) -> None:
    """Implements kdkernels::temperature_kl_rescale_."""
    if grad_loss.dim() > 0:
        grad.mul_(grad_loss.unsqueeze(dim))
    elif not is_dense(grad):
        grad.mul_(grad_loss)
    elif grad.numel():
        with device_of(grad):
            _rescale_kernel[(triton.cdiv(grad.numel(), 4096),)](grad, grad_loss, grad.numel(), BLOCK=4096, **compile_options(4))
