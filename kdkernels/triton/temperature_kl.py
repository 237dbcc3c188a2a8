"""Triton kernels of temperature_kl. The arithmetic is that of csrc/temperature_kl/, explained there and in docs/temperature_kl.md.

One program works on a tile of ROWS rows and walks over their classes in blocks of BLOCK: once for the statistics of the row, which are merged
block by block, and once more for the gradients. A row that fits one block is read from memory once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import Reduction
from .launch import compile_options, device_of, is_dense
from .math import centred_kl, exp_falling, exp_parts, log, log1p


@triton.jit
def _logits(s_row, t_row, column, s_class, t_class, present, COMPUTE: tl.constexpr):
    """A quarter of the logits of a block of both nets: the difference of two differences of finite numbers may be four times the largest."""
    s = tl.load(s_row + column * s_class, mask=present, other=0.0).to(COMPUTE)
    t = tl.load(t_row + column * t_class, mask=present, other=0.0).to(COMPUTE)
    return s * 0.25, t * 0.25


@triton.jit
def _weights(b, o, present, safe, b_centre, o_centre, inv_t, mean):
    """e = z p_b, d = b - o (of centred logits), and z p_b (e^y - 1), z p_b (e^y - 1 - y), z p_b y with y = (mean - d) / T."""
    e = tl.where(present, exp_falling((b - safe) * inv_t), 0.0)
    d = (b - b_centre) - (o - o_centre)
    y = (mean - d) * inv_t
    scale, r, h = exp_parts(tl.minimum(y, 17.0, propagate_nan=tl.PropagateNan.ALL))
    ey = tl.where(e == 0.0, 0.0, e * y)
    up = e * (scale * (r + h) + (scale - 1.0))
    above = tl.where(e == 0.0, 0.0, e * (scale * h + (scale * r + ((scale - 1.0) - y))))
    # Past e^16 the product p_b e^y is formed in the exponent, where it cannot overflow.
    joined = present & ~(y < 16.0)
    highest: tl.constexpr = 709.0 if b.dtype == tl.float64 else 88.0
    exponent = ((o - o_centre) + (b_centre - safe)) * inv_t + mean * inv_t
    grown = tl.exp(tl.minimum(exponent, highest, propagate_nan=tl.PropagateNan.ALL))
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
    row_scale_ptr,  # [rows], with SCALED the power of two by which the row of to_student was divided
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
    SCALED: tl.constexpr,
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
    # Logits are read in quarters, and divided by a quarter of T.
    t_column = (t_row * 0.25)[:, None]
    inv_t = 1.0 / t_column
    outer, i = row // inner, row % inner
    s_row = student_ptr + (outer * s_outer + i * s_inner)[:, None]
    t_row_ptr = teacher_ptr + (outer * t_outer + i * t_inner)[:, None]
    column = tl.arange(0, BLOCK)[None, :].to(tl.int64)

    # A row that is masked out, or past the end, is read as zeros in both nets.
    if ONE_BLOCK:
        present = keep[:, None] & (column < classes)
        s, t = _logits(s_row, t_row_ptr, column, s_class, t_class, present, COMPUTE)

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
    # What is subtracted from the logits of either net before their difference is taken: 0, or their maxima where these are far apart.
    b_centre = tl.zeros([ROWS, 1], COMPUTE)
    o_centre = tl.zeros([ROWS, 1], COMPUTE)

    for start in range(0, classes, BLOCK):
        in_row = start + column < classes
        if not ONE_BLOCK:
            present = keep[:, None] & in_row
            s, t = _logits(s_row, t_row_ptr, start + column, s_class, t_class, present, COMPUTE)
        if DIRECTION == 1:
            b, o = s, t
        else:
            b, o = t, s

        # log-sum-exp of the other side, needed where the nets are far apart
        o_next = tl.maximum(o_top, tl.max(tl.where(in_row, o, negative), 1, keep_dims=True))
        o_next_safe = tl.where(o_next == negative, 0.0, o_next)
        o_before, o_before_safe = o_z, o_safe
        o_z = o_z * tl.where(o_top == negative, 0.0, tl.exp((o_safe - o_next_safe) * inv_t))
        o_z += tl.sum(tl.where(in_row, tl.exp((o - o_next_safe) * inv_t), 0.0), 1, keep_dims=True)
        o_top, o_safe = o_next, o_next_safe

        next_top = tl.maximum(top, tl.max(tl.where(in_row, b, negative), 1, keep_dims=True))
        next_safe = tl.where(next_top == negative, 0.0, next_top)
        began = z > 0.0
        shrink = tl.where(began, tl.exp((safe - next_safe) * inv_t), 0.0)
        top, safe = next_top, next_safe
        before = z * shrink
        began = before > 0.0

        # The mean of d so far, over all blocks. Other centres move d and its mean alike.
        apart = ~(tl.abs((safe - o_safe) * inv_t) <= 64.0)
        b_next, o_next = tl.where(apart, safe, 0.0), tl.where(apart, o_safe, 0.0)
        mean = tl.where(began, mean - ((b_next - b_centre) - (o_next - o_centre)), 0.0)
        b_centre, o_centre = b_next, o_next
        e = tl.where(in_row, exp_falling((b - safe) * inv_t), 0.0)
        d = (b - b_centre) - (o - o_centre)
        z = before + tl.sum(e, 1, keep_dims=True)
        inv = tl.where(z == 0.0, 0.0, 1.0 / z)
        next_mean = before * inv * mean + tl.sum(tl.where(e == 0.0, 0.0, (e * inv) * d), 1, keep_dims=True)

        # Moves the sums so far from the old centre to the new one, exactly: y' = y - delta.
        delta = tl.where(began, (mean - next_mean) * inv_t, 0.0)
        mean = next_mean
        scale, r, h = exp_parts(-delta)
        up = scale * (r + h) + (scale - 1.0)
        above = scale * h + (scale * r + ((scale - 1.0) + delta))
        convex = (convex * (1.0 + up) - drift * up) * shrink + before * above
        drift = drift * shrink + before * delta
        # Classes without probability so far: all that they add is the other side's.
        highest: tl.constexpr = 709.0 if tl.float64 == COMPUTE else 88.0
        exponent = ((o_before_safe - o_centre) + (b_centre - safe)) * inv_t + mean * inv_t
        alone = o_before * tl.exp(tl.minimum(exponent, highest, propagate_nan=tl.PropagateNan.ALL))
        convex = tl.where(began, convex, tl.where(o_before == 0.0, 0.0, alone))
        drift = tl.where(began, drift, 0.0)

        e, d, up, above, ey = _weights(b, o, in_row, safe, b_centre, o_centre, inv_t, mean)
        block = tl.sum(above, 1, keep_dims=True)
        far = far | ((z > 0.0) & ~((block < 1e30) & (block > -1e30)))
        convex += block
        drift -= tl.sum(ey, 1, keep_dims=True)

    inv_z = 1.0 / z
    convex, drift = convex * inv_z, drift * inv_z
    w = convex - drift
    kl = centred_kl(convex, drift, w)
    far = far | ~((convex < 1e30) & (convex > -1.0))  # negative: terms were cut off at the end of the range
    if DIRECTION == 2:  # nets that disagree: log-sum-exps of centred logits lose fewer digits than sums that grow with the divergence
        far = far | ~(kl <= 1.0)
    log_z, log_oz = log(z), log(o_z)
    far_shift = ((safe - b_centre) - (o_safe - o_centre)) * inv_t + log_z - log_oz
    shift = tl.where(far, far_shift, mean * inv_t + drift - kl)  # log p_b - log p_o = d / T - shift
    far_kl = mean - far_shift * t_column
    kl = tl.where(far, tl.where(far_kl < 0.0, 0.0, far_kl), kl * t_column)  # in quarters of the logits' unit, like all logarithms below
    w = tl.where(far, 0.0, w)
    drift = tl.where(far, 0.0, drift)

    row_weight = tl.full([ROWS], 1.0, COMPUTE) * weight
    if HAS_WEIGHT:
        row_weight = row_weight * tl.load(weight_ptr).to(COMPUTE)
    if UPSTREAM == 1:
        row_weight = row_weight * tl.load(upstream_ptr).to(COMPUTE)
    if UPSTREAM == 2:
        row_weight = row_weight * tl.load(upstream_ptr + row, mask=in_batch, other=0.0).to(COMPUTE)
    scale_out = row_weight * t_row if T_SQUARED else row_weight / t_row
    scale_out = scale_out[:, None]

    A: tl.constexpr = 1.0 - BETA
    mean_v = tl.zeros([ROWS, 1], COMPUTE)
    mean_lift = tl.zeros([ROWS, 1], COMPUTE)
    # V and T S of dV / dT = -S / T are kept times UNIT: sums of logits near the end of the range have room, and a derivative of T^2 V that is in
    # range is found.
    UNIT: tl.constexpr = 2.0**-12
    value = kl * UNIT
    surest = tl.zeros([ROWS, 1], COMPUTE)  # the largest probability of either net
    if DIRECTION == 2 or EPS > 0.0 or not ENTROPY:
        extra = tl.zeros([ROWS, 1], COMPUTE)
        for start in range(0, classes, BLOCK):
            in_row = start + column < classes
            if not ONE_BLOCK:
                present = keep[:, None] & in_row
                s, t = _logits(s_row, t_row_ptr, start + column, s_class, t_class, present, COMPUTE)
            p = tl.where(in_row, exp_falling((t - safe) * inv_t), 0.0) * inv_z
            v = t - safe
            if DIRECTION == 2:
                d = (t - b_centre) - (s - o_centre)
                log_q = ((s - o_centre) + (b_centre - safe)) * inv_t + (shift - log_z)
                q, log_pm, log_qm, p_psi, q_psi = _jsd_terms(p, d * inv_t - shift, log_q, (s - o_safe) * inv_t, o_z, far, BETA)
                surest = tl.maximum(surest, tl.max(tl.where(in_row, tl.maximum(p, q), 0.0), 1, keep_dims=True))
                mean_v += tl.sum(tl.where(in_row, p_psi, 0.0), 1, keep_dims=True)  # E_p[log p / M]
                mean_lift += tl.sum(tl.where(in_row, q_psi, 0.0), 1, keep_dims=True)  # E_q[log q / M]
            else:
                mean_v += tl.sum(tl.where(p == 0.0, 0.0, p * v), 1, keep_dims=True)
                if EPS > 0.0:
                    near_q = ((s - o_centre) + (b_centre - safe)) + (shift - log_z) * t_column
                    log_q = tl.where(far, (s - o_safe) - log_oz * t_column, near_q)
                    lift = tl.where(p == 0.0, 0.0, p * _log_lift(p, v * inv_t, log_z, EPS) * t_column)
                    mean_lift += tl.sum(lift, 1, keep_dims=True)
                    added = lift + EPS * (log(p + EPS) * t_column - log_q) if ENTROPY else -EPS * log_q
                    extra += tl.sum(tl.where(in_row, added * UNIT, 0.0), 1, keep_dims=True)
        if DIRECTION == 2:
            value = (BETA * mean_v + A * mean_lift) * (t_column * UNIT)
        else:
            value += extra
            if not ENTROPY:
                value += (log_z * t_column - mean_v) * UNIT

    slope = tl.zeros([ROWS, 1], COMPUTE)
    # The gradients of all but the class that has more than half of a probability: it gets the negative of their sum (csrc/temperature_kl/jsd.h).
    rest_other = tl.zeros([ROWS, 1], COMPUTE)
    rest_base = tl.zeros([ROWS, 1], COMPUTE)
    if DIRECTION == 2 and (WANT_STUDENT or WANT_TEACHER or WANT_TEMPERATURE):  # noqa: SIM102 - decided when compiled
        if tl.max(tl.max(surest, 1), 0) > 0.5:
            for start in range(0, classes, BLOCK):
                in_row = start + column < classes
                if not ONE_BLOCK:
                    present = keep[:, None] & in_row
                    s, t = _logits(s_row, t_row_ptr, start + column, s_class, t_class, present, COMPUTE)
                p = tl.where(in_row, exp_falling((t - safe) * inv_t), 0.0) * inv_z
                d = (t - b_centre) - (s - o_centre)
                log_q = ((s - o_centre) + (b_centre - safe)) * inv_t + (shift - log_z)
                q, log_pm, log_qm, p_psi, q_psi = _jsd_terms(p, d * inv_t - shift, log_q, (s - o_safe) * inv_t, o_z, far, BETA)
                others = in_row & (q <= 0.5) & (q > 0.0)
                rest_other += tl.sum(tl.where(others, A * q * (log_qm - mean_lift), 0.0), 1, keep_dims=True)
                others = in_row & (p <= 0.5) & (p > 0.0)
                rest_base += tl.sum(tl.where(others, BETA * p * (log_pm - mean_v), 0.0), 1, keep_dims=True)
    if WANT_STUDENT or WANT_TEACHER or WANT_TEMPERATURE:
        # A gradient that is to be scaled is computed twice: its largest magnitude is needed first.
        largest = tl.zeros([ROWS, 1], COMPUTE)
        down = tl.full([ROWS, 1], 1.0, COMPUTE)
        PASSES: tl.constexpr = 2 if SCALED else 1
        for step in tl.static_range(PASSES):
            for start in range(0, classes, BLOCK):
                in_row = start + column < classes
                if not ONE_BLOCK:
                    present = keep[:, None] & in_row
                    s, t = _logits(s_row, t_row_ptr, start + column, s_class, t_class, present, COMPUTE)
                if DIRECTION == 1:
                    b, o = s, t
                else:
                    b, o = t, s
                e, d, up, above, ey = _weights(b, o, in_row, safe, b_centre, o_centre, inv_t, mean)
                p, v = e * inv_z, b - safe
                if DIRECTION == 2:
                    log_q = ((s - o_centre) + (b_centre - safe)) * inv_t + (shift - log_z)
                    q, log_pm, log_qm, p_psi, q_psi = _jsd_terms(p, d * inv_t - shift, log_q, (s - o_safe) * inv_t, o_z, far, BETA)
                    to_other = tl.where(q > 0.5, -rest_other, tl.where(q == 0.0, 0.0, A * q * (log_qm - mean_lift)))
                    to_base = tl.where(p > 0.5, -rest_base, tl.where(p == 0.0, 0.0, BETA * p * (log_pm - mean_v))) * t_column
                else:
                    p_other = tl.exp((o - o_safe) * inv_t) / o_z
                    up = tl.where(far, p_other * z - e, up)
                    to_other = (up - w * e) * inv_z / (1.0 + w)
                    if EPS > 0.0:
                        to_other += EPS * (classes * (p + to_other) - 1.0)
                    a = (d - mean) - drift * t_column
                    if not ENTROPY:
                        a = a - (v - mean_v)
                    elif EPS > 0.0:
                        a = a + _log_lift(p, v * inv_t, log_z, EPS) * t_column - mean_lift
                    to_base = tl.where(p == 0.0, 0.0, p * a)
                # The first by o / T, the second by b / T and times T.
                to_other, to_base = tl.where(in_row, to_other, 0.0), tl.where(in_row, to_base, 0.0)
                if WANT_TEMPERATURE:
                    slope += tl.sum(tl.where(to_other == 0.0, 0.0, to_other * UNIT * (o - o_safe)), 1, keep_dims=True)
                    slope += tl.sum(tl.where(to_base == 0.0, 0.0, to_base * UNIT * (v * inv_t)), 1, keep_dims=True)
                to_other, to_base = to_other * scale_out, to_base * (scale_out * inv_t)
                if DIRECTION == 1:
                    to_s, to_t = to_base, to_other
                else:
                    to_s, to_t = to_other, to_base
                written = in_batch[:, None] & in_row
                kept = keep[:, None]
                if step < PASSES - 1:
                    largest = tl.maximum(largest, tl.max(tl.where(kept, tl.abs(to_s), 0.0), 1, keep_dims=True))
                elif WANT_STUDENT:
                    if SCALED:
                        to_s = to_s * down
                    where = to_student_ptr + (outer * gs_outer + i * gs_inner)[:, None] + (start + column) * gs_class
                    tl.store(where, tl.where(kept, to_s, 0.0).to(to_student_ptr.dtype.element_ty), mask=written)
                if WANT_TEACHER:
                    where = to_teacher_ptr + (outer * gt_outer + i * gt_inner)[:, None] + (start + column) * gt_class
                    tl.store(where, tl.where(kept, to_t, 0.0).to(to_teacher_ptr.dtype.element_ty), mask=written)
            if step < PASSES - 1:
                up_scale, down = _powers_of_two(largest)
                tl.store(row_scale_ptr + row, tl.sum(up_scale, 1), mask=in_batch)

    row_value = tl.sum(value, 1)
    if WANT_LOSS:
        loss = (row_value * t_row if T_SQUARED else row_value / t_row) * (4.0 / UNIT)
        tl.store(loss_ptr + row, tl.where(keep, loss, 0.0), mask=in_batch)
    if WANT_TEMPERATURE:
        row_slope = tl.sum(slope, 1)
        total_slope = 2.0 * row_value - row_slope if T_SQUARED else -row_slope / t_row / t_row
        total_slope = (total_slope * row_weight) * (4.0 / UNIT)
        tl.store(to_temperature_ptr + row, tl.where(keep, total_slope, 0.0).to(to_temperature_ptr.dtype.element_ty), mask=in_batch)


@triton.jit
def _powers_of_two(largest):
    """2^n in float32 and 2^-n, so that largest * 2^-n lies in [2^14, 2^15), high in the range of float16; n = 0 for 0, inf and NaN."""
    bits = largest.to(tl.float32).to(tl.int32, bitcast=True)
    n = tl.minimum(tl.maximum(((bits >> 23) & 0xFF) - (127 + 14), -126), 126)
    n = tl.where((largest > 0.0) & (largest < float("inf")), n, 0)
    return ((n + 127) << 23).to(tl.float32, bitcast=True), ((127 - n) << 23).to(tl.float32, bitcast=True).to(largest.dtype)


@triton.jit
def _log_lift(p, v, log_z, EPS: tl.constexpr):
    """log(1 + eps / p), from whichever side does not cancel."""
    return tl.where(p > EPS, log1p(EPS / p), log(p + EPS) - (v - log_z))


@triton.jit
def _jsd_terms(p, z, log_q, far_q, far_z, far, BETA: tl.constexpr):
    """q, log(p / M), log(q / M), p psi(a u) and q psi(beta v) (csrc/temperature_kl/jsd.h); z = log p - log q.

    q is p e^-z, or e^log_q where p is too small for it, or e^far_q / far_z where the nets are far apart.
    """
    tiny: tl.constexpr = 2.3e-308 if p.dtype == tl.float64 else 1.2e-38
    limit: tl.constexpr = 708.0 if p.dtype == tl.float64 else 87.0
    A: tl.constexpr = max(1.0 - BETA, tiny)
    B: tl.constexpr = max(BETA, tiny)
    scale, r, h = exp_parts(tl.maximum(-limit, tl.minimum(limit, -z)))
    u = scale * (r + h) + (scale - 1.0)
    ratio = scale * (r + h) + scale
    inverse = 1.0 / ratio
    v = -u * inverse
    exponent = tl.minimum(tl.where(far, far_q, log_q), limit, propagate_nan=tl.PropagateNan.ALL)
    joined = tl.exp(exponent) * tl.where(far, 1.0 / far_z, 1.0)
    q = tl.where(far | ~(z > -16.0), joined, p * ratio)
    first, first_psi, first_near = _log_and_rest(A * u, B + A * ratio)
    second, second_psi, second_near = _log_and_rest(B * v, A + B * inverse)
    p_psi = tl.where(first_near, p * first_psi, A * (q - p) - p * first)
    q_psi = tl.where(second_near, q * second_psi, B * (p - q) - q * second)
    p_psi = tl.where(p == 0.0, A * q, p_psi)
    q_psi = tl.where(q == 0.0, B * p, q_psi)
    return q, -first, -second, p_psi, q_psi


@triton.jit
def _log_and_rest(x, sum_of_positives):
    """log(1 + x), psi(x) = x - log(1 + x), and whether psi is from the series; 1 + x is the sum where x is close to -1."""
    one = tl.where(x > -0.25, 1.0 + x, sum_of_positives)
    near = tl.abs(x) < 0.29
    safe = tl.where(near, x, 0.0)
    s = safe / (2.0 + safe)
    s2 = s * s
    terms: tl.constexpr = 11 if x.dtype == tl.float64 else 5
    series = tl.full(x.shape, 1.0 / (2 * terms + 1), x.dtype)
    for k in tl.static_range(terms - 1):
        series = series * s2 + 1.0 / (2 * (terms - 1 - k) + 1)
    small = 2.0 * s * s2 * series
    result = tl.where(near, 2.0 * s + small, log(one))
    return result, tl.where(near, safe * s - small, x - result), near


@triton.jit
def _rescale_kernel(grad_ptr, scale_ptr, count, BLOCK: tl.constexpr):
    """grad *= scale in place; the unit scale of a plain .backward() leaves at once."""
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + at, mask=at < count)
        tl.store(grad_ptr + at, (grad.to(scale.dtype) * scale).to(grad.dtype), mask=at < count)


@triton.jit
def _rescale_rows_kernel(
    grad_ptr,  # [rows, C] by strides
    out_ptr,  # [rows, C] by strides
    row_scale_ptr,  # [rows] or unused
    upstream_ptr,  # [] or [rows]
    mask_ptr,  # [rows] or unused
    rows,
    classes,
    inner,  # row = outer * inner + i
    g_outer, g_inner, g_class,
    o_outer, o_inner, o_class,
    HAS_SCALE: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_MASK: tl.constexpr,
    IN_PLACE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out = grad * row_scale * upstream, rounded once."""
    if IN_PLACE and not HAS_SCALE and not PER_ROW:  # the unit factor of a plain .backward() leaves everything as it is
        rows = tl.where(tl.load(upstream_ptr) == 1.0, 0, rows)
    program, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(classes, BLOCK)
    row = (program // blocks) * ROWS + tl.arange(0, ROWS)
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_batch = row < rows
    outer, i = row // inner, row % inner
    inside = in_batch[:, None] & (column < classes)
    number = tl.load(grad_ptr + (outer * g_outer + i * g_inner)[:, None] + column * g_class, mask=inside, other=0.0).to(COMPUTE)
    if HAS_SCALE:
        number = number * tl.load(row_scale_ptr + row, mask=in_batch, other=1.0).to(COMPUTE)[:, None]
    if PER_ROW:
        number = number * tl.load(upstream_ptr + row, mask=in_batch, other=0.0).to(COMPUTE)[:, None]
    else:
        number = number * tl.load(upstream_ptr).to(COMPUTE)
    if HAS_MASK:
        number = tl.where(tl.load(mask_ptr + row, mask=in_batch, other=0).to(tl.int1)[:, None], number, 0.0)
    tl.store(out_ptr + (outer * o_outer + i * o_inner)[:, None] + column * o_class, number.to(out_ptr.dtype.element_ty), mask=inside)


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
            *, upstream=None, loss=None, to_student=None, to_teacher=None, to_temperature=None, row_scale=None) -> Tensor | float:  # fmt: skip
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
                upstream=upstream, loss=loss, to_student=moved[2], to_teacher=moved[3], to_temperature=to_temperature,
                row_scale=row_scale)  # fmt: skip
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
        row_scale,
    ]
    sizes = block_sizes(classes, strides[0][2], compute == torch.float64)
    sizes |= compile_options(sizes["num_warps"])
    with device_of(student):
        _kl_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
            student, teacher, *(student if p is None else p for p in pointers), float(temperature), float(weight), rows, classes, inner,
            *(s for operand in strides for s in operand),
            BETA=beta, EPS=eps, DIRECTION=int(direction), T_SQUARED=t_squared, ENTROPY=entropy,
            HAS_TEMPERATURE=row_temperature is not None, HAS_MASK=mask is not None, HAS_WEIGHT=weight_tensor is not None,
            UPSTREAM=0 if upstream is None else 1 if upstream.dim() == 0 else 2,
            WANT_LOSS=loss is not None, WANT_STUDENT=to_student is not None, WANT_TEACHER=to_teacher is not None,
            WANT_TEMPERATURE=to_temperature is not None, SCALED=row_scale is not None,
            COMPUTE=tl.float64 if compute == torch.float64 else tl.float32, **sizes,
        )  # fmt: skip
    return result


def _row_weight(reduction, classes, rows, mask, normalizer) -> tuple[float, Tensor | None]:
    """Weight of a row in the loss as number times tensor (or None), without reading anything back."""
    if reduction in (Reduction.NONE, Reduction.SUM):
        return 1.0, None
    per_class = 1.0 / classes if reduction == Reduction.MEAN else 1.0
    if normalizer is not None:
        return per_class, 1.0 / normalizer.to(torch.float64).reshape(())
    if mask is not None:
        return per_class, 1.0 / mask.sum().clamp(min=1).to(torch.float64)
    return per_class / max(rows, 1), None


def _row_shape(x: Tensor, dim: int) -> list[int]:
    return [*x.shape[:dim], *x.shape[dim:][1:]]


def _check(student, teacher, row_temperature, mask, normalizer, dim, upstream=None, reduction=Reduction.NONE) -> None:
    """What guards the memory, for ops that are called past their public function."""
    for name, x in (("student", student), ("teacher", teacher), ("temperature", row_temperature), ("grad_loss", upstream)):
        if x is not None and x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if not -student.dim() <= dim < student.dim():
        raise ValueError(f"dim must lie in [{-student.dim()}, {student.dim() - 1}], got {dim}")
    if teacher.shape != student.shape:
        raise ValueError(f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if student.shape[dim] == 0:
        raise ValueError(f"student and teacher must have at least one class, got shape {tuple(student.shape)}")
    rows = tuple(_row_shape(student, dim))
    for name, x, shape in (
        ("temperature", row_temperature, rows),
        ("mask", mask, rows),
        ("grad_loss", upstream, rows if reduction == Reduction.NONE else ()),
    ):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if normalizer is not None and (normalizer.numel() != 1 or normalizer.is_complex()):
        raise ValueError(f"normalizer must be one real number, got shape {tuple(normalizer.shape)} of {normalizer.dtype}")
    for name, x in (("teacher", teacher), ("temperature", row_temperature), ("mask", mask), ("normalizer", normalizer), ("grad_loss", upstream)):
        if x is not None and x.device != student.device:
            raise ValueError(f"{name} must be on {student.device}, got {x.device}")


def temperature_kl(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2, include_entropy,
                   target_eps, save_grad) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements kdkernels::temperature_kl."""
    _check(student, teacher, row_temperature, mask, normalizer, dim)
    compute = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    row_loss = torch.empty(_row_shape(student, dim), dtype=compute, device=student.device)
    grad = torch.empty_like(student) if save_grad else student.new_empty(0)
    scaled = save_grad and student.dtype == torch.float16
    row_scale = student.new_empty(_row_shape(student, dim) if scaled else 0, dtype=torch.float32)
    weight = _launch(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2,
                     include_entropy, target_eps, loss=row_loss, to_student=grad if save_grad else None,
                     row_scale=row_scale if scaled else None)  # fmt: skip
    if reduction == Reduction.NONE:
        return row_loss, grad, row_scale
    total = row_loss.sum(dtype=torch.float64)
    return (total * weight).to(compute), grad, row_scale


def temperature_kl_backward(grad_loss, student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2,
                            include_entropy, target_eps, wanted) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Implements kdkernels::temperature_kl_backward."""
    _check(student, teacher, row_temperature, mask, normalizer, dim, grad_loss, reduction)
    compute = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    to_student = torch.empty_like(student) if wanted[0] else None
    to_teacher = torch.empty_like(teacher) if wanted[1] else None
    dtype = compute if row_temperature is None else row_temperature.dtype
    to_temperature = torch.empty(_row_shape(student, dim), dtype=dtype, device=student.device) if wanted[2] else None
    _launch(student, teacher, temperature, row_temperature, mask, normalizer, dim, direction, beta, reduction, scale_by_t2, include_entropy,
            target_eps, upstream=grad_loss, to_student=to_student, to_teacher=to_teacher, to_temperature=to_temperature)  # fmt: skip
    return tuple(student.new_empty(0) if x is None else x for x in (to_student, to_teacher, to_temperature))


def _check_rescale(grad, row_scale, grad_loss, mask, dim) -> None:
    _check(grad, grad, None, mask, None, dim, grad_loss, Reduction.NONE if grad_loss.dim() else Reduction.SUM)
    rows = tuple(_row_shape(grad, dim))
    if tuple(row_scale.shape) not in ((0,), rows) or row_scale.dtype != torch.float32:
        raise ValueError(f"row_scale must be float32 and empty or of shape {rows}, got {tuple(row_scale.shape)} of {row_scale.dtype}")


def _rescale(out: Tensor, grad: Tensor, row_scale: Tensor, grad_loss: Tensor, mask: Tensor | None, dim: int) -> None:
    if grad.numel() == 0:
        return
    layout = _common_layout([grad, out], dim % grad.dim())
    if layout is None:  # rows of three or more runs: work on a copy with the classes last
        moved = grad.movedim(dim, -1).contiguous()
        _rescale(moved, moved, row_scale, grad_loss, mask, -1)
        out.copy_(moved.movedim(-1, dim))
        return
    inner, strides = layout
    classes = grad.shape[dim]
    rows = grad.numel() // classes
    scaled = tuple(row_scale.shape) == tuple(_row_shape(grad, dim))
    double = torch.float64 in (grad.dtype, grad_loss.dtype)
    block = triton.next_power_of_2(classes)
    sizes = {"ROWS": max(1, 1024 // block), "BLOCK": min(block, 1024)} if strides[0][2] == 1 else {"ROWS": 32, "BLOCK": min(block, 32)}
    with device_of(grad):
        _rescale_rows_kernel[(triton.cdiv(rows, sizes["ROWS"]) * triton.cdiv(classes, sizes["BLOCK"]),)](
            grad, out, row_scale.contiguous() if scaled else grad, grad_loss.contiguous(),
            grad if mask is None else mask.contiguous().view(torch.uint8), rows, classes, inner, *strides[0], *strides[1],
            HAS_SCALE=scaled, PER_ROW=grad_loss.dim() > 0, HAS_MASK=mask is not None, IN_PLACE=out is grad,
            COMPUTE=tl.float64 if double else tl.float32, **sizes, **compile_options(4),
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
    plain = row_scale.numel() == 0 and grad_loss.dim() == 0 and mask is None
    if not plain or not is_dense(grad):
        _rescale(grad, grad, row_scale, grad_loss, mask, dim)
    elif grad.numel():
        with device_of(grad):
            _rescale_kernel[(triton.cdiv(grad.numel(), 4096),)](grad, grad_loss, grad.numel(), BLOCK=4096, **compile_options(4))
