"""Triton kernels of the derivative of truncated_svd.

csrc/truncated_svd/derivative.h describes the formula. _solve_kernel solves the linear system in the
complement of the kept vectors, with one program per matrix. _update_kernel then writes the
gradient in one pass over M. The solve uses the tridiagonal form that the forward pass saved. If
there is none, or if it is inaccurate, the solve uses the tridiagonal form of the residual: M
without its projections onto the kept vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from .launch import as_tl, compile_options, device_of
from .math import cast_scalar
from .svd_sizes import ILL_CONDITIONED, block_sizes, check_fits, column_block, one_batch, precision, state_size, warps_for
from .svd_stages import apply_q, power_of_two, residual_gram, resolvent, tile_of, tridiagonalize, unit_for


@triton.jit
def _product_kernel(x_ptr, g_ptr, mg_ptr, x_batch, x_p, x_q, p, q, k, T: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr):
    """Compute mg [B, k, p] = M g in float64. The rows are divided among the programs."""
    blocks = tl.cdiv(p, BP)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i, lane = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP), tl.arange(0, BQ)
    for j in range(0, k):
        total = tl.zeros([BP], tl.float64)
        for first in range(0, q, BQ):
            c = first + lane
            m = tile_of(x_ptr + b * x_batch, i, c, x_p, x_q, p, q, tl.full([], 1.0, T), T).to(tl.float64)
            g = tl.load(g_ptr + (b * k + j) * q + c, c < q, other=0.0).to(tl.float64)
            total += tl.sum(m * g[None, :], 1)
        tl.store(mg_ptr + (b * k + j) * p + i, total, i < p)


@triton.jit
def _largest(x_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    largest = tl.full([], 0.0, tl.float64)
    for first in range(0, n, BLOCK):
        largest = tl.maximum(largest, tl.max(tl.abs(tl.load(x_ptr + first + lane, first + lane < n, other=0.0)), 0).to(tl.float64))
    return largest


@triton.jit
def _any(x_ptr, n, BLOCK: tl.constexpr):
    """Return whether any of n elements is not 0."""
    lane = tl.arange(0, BLOCK)
    count = tl.full([], 0, tl.int32)
    for first in range(0, n, BLOCK):
        count += tl.sum((tl.load(x_ptr + first + lane, first + lane < n, other=0.0) != 0.0).to(tl.int32), 0)
    return count > 0


@triton.jit
def _inverse_gaps(lam, k, gap_eps, KB: tl.constexpr):
    """Compute f(lambda_j - lambda_i) at [j, i], with f(x) = x / (x^2 + eps^2), for lam [KB]."""
    sigma_1 = tl.sqrt(tl.max(lam, 0))
    larger_root = tl.sqrt(tl.maximum(lam[:, None], lam[None, :]))
    eps = gap_eps * sigma_1 * tl.maximum(larger_root, gap_eps * sigma_1)
    gap = lam[:, None] - lam[None, :]
    squares = gap * gap + eps * eps
    return tl.where(squares > 0.0, gap / tl.where(squares > 0.0, squares, 1.0), 0.0)


@triton.jit
def _products(x_ptr, g_ptr, n, k, unit, KB: tl.constexpr, BLOCK: tl.constexpr):
    """Compute <x_i, unit g_j> at [i, j] for vectors [k, n], in float64."""
    lane, i = tl.arange(0, BLOCK), tl.arange(0, KB)
    result = tl.zeros([KB, KB], tl.float64)
    for first in range(0, n, BLOCK):
        c = first + lane
        x = tl.load(x_ptr + i[:, None] * n + c[None, :], (i < k)[:, None] & (c < n)[None, :], other=0.0).to(tl.float64)
        for j in range(0, k):
            g = tl.load(g_ptr + j * n + c, c < n, other=0.0).to(tl.float64) * unit
            result += tl.where(i[None, :] == j, tl.sum(x * g[None, :], 1)[:, None], 0.0)
    return result


@triton.jit
def _squared_lengths(g_ptr, n, k, unit, KB: tl.constexpr, BLOCK: tl.constexpr):
    lane, i = tl.arange(0, BLOCK), tl.arange(0, KB)
    result = tl.zeros([KB], tl.float64)
    for first in range(0, n, BLOCK):
        c = first + lane
        g = tl.load(g_ptr + i[:, None] * n + c[None, :], (i < k)[:, None] & (c < n)[None, :], other=0.0).to(tl.float64) * unit
        result += tl.sum(g * g, 1)
    return result


@triton.jit
def _differences(products, squares, T: tl.constexpr):
    """Compute <x_i, g_j> - <x_j, g_i>, minus a bound of the rounding errors.

    For a function of the span the exact difference is 0. A small gap would amplify rounding errors.
    """
    eps: tl.constexpr = 2.220446049250313e-16 if tl.float64 == T else 1.1920929e-7
    noise = 8 * eps * tl.sqrt(tl.maximum(squares[:, None], squares[None, :]))
    value = products - tl.trans(products)
    return tl.where(value > noise, value - noise, tl.where(value < -noise, value + noise, value - value))


@triton.jit
def _subtract_projections(z, a_ptr, p, k, PB: tl.constexpr):
    """Subtract from vectors z [PB, k] their projections onto the vectors of a.

    This is done twice, because after one pass rounding errors of large projections remain.
    """
    c = tl.arange(0, PB)
    for task in range(0, 2 * k):
        a = tl.load(a_ptr + (task % k) * p + c, c < p, other=0.0)
        z -= a[:, None] * tl.sum(a[:, None] * z, 0)[None, :]
    return z


@triton.jit(do_not_specialize=["state_size"])
def _solve_kernel(
    x_ptr, matrix_ptr, a_ptr, b_ptr, s_ptr, ga_ptr, gs_ptr, gb_ptr, mg_ptr, state_ptr, new_form_ptr, work_ptr, rows_ptr, z_ptr, coefficients_ptr,
    x_batch, x_p, x_q, state_size, p, q, k, gap_eps: tl.float64,
    HAS_A: tl.constexpr, HAS_S: tl.constexpr, HAS_B: tl.constexpr, HAS_STATE: tl.constexpr, T: tl.constexpr, PB: tl.constexpr, KB: tl.constexpr,
    RB: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute z [B, k, p] and the coefficients [B, 2 k + k^2 + 2] for _update_kernel.

    The coefficients are those of w_j, gb_j and b_i in y_j, the factor of the gradient, and the
    scale of M.
    """
    null_threshold: tl.constexpr = 1e-13 if tl.float64 == T else 1e-6
    max_finite: tl.constexpr = 1.7976931348623157e308 if tl.float64 == T else 3.4028234663852886e38
    b = tl.program_id(0).to(tl.int64)
    x_ptr += b * x_batch
    matrix_ptr += b * p * p
    a_ptr += b * k * p
    b_ptr += b * k * q
    s_ptr += b * k
    ga_ptr += b * k * p
    gs_ptr += b * k
    gb_ptr += b * k * q
    mg_ptr += b * k * p
    z_ptr += b * k * p
    rows_ptr += b * 8 * p * KB
    coefficients_ptr += b * (2 * k + k * k + 2)
    gap_eps = cast_scalar(gap_eps, tl.float64)
    wide_q = tl.cast(q, tl.int64)  # k q may exceed 32 bits
    c, j = tl.arange(0, PB), tl.arange(0, KB)
    vectors, inside = j[None, :] * p + c[:, None], (c < p)[:, None] & (j < k)[None, :]
    square, in_square = j[:, None] * k + j[None, :], (j < k)[:, None] & (j < k)[None, :]
    w_coefficients_ptr, gb_coefficients_ptr, b_coefficients_ptr, factor_ptr = (
        coefficients_ptr,
        coefficients_ptr + k,
        coefficients_ptr + 2 * k,
        coefficients_ptr + 2 * k + k * k,
    )
    s = tl.load(s_ptr + j, j < k, other=0.0).to(tl.float64)
    sigma_1 = tl.load(s_ptr).to(tl.float64)
    if sigma_1 > 0.0:
        form_ptr = new_form_ptr + b * state_size
        scale = unit_for(tl.minimum(sigma_1, max_finite), T)
        s = tl.minimum(s, max_finite) * scale
        lam = s * s
        recompute = True
        if HAS_STATE:  # it is accurate even if s is subnormal or infinite
            lambda_ptr = state_ptr + b * state_size + p * (p + 1) // 2 + 3 * p
            saved_lambda = tl.load(lambda_ptr + j, j < k, other=0.0).to(tl.float64) + tl.load(lambda_ptr + k + j, j < k, other=0.0).to(tl.float64)
            recompute = tl.sum(tl.where(j == k - 1, saved_lambda, 0.0), 0) < tl.max(saved_lambda, 0) * (ILL_CONDITIONED * ILL_CONDITIONED)
            if not recompute:
                form_ptr = state_ptr + b * state_size
                scale = tl.load(lambda_ptr + 2 * k).to(tl.float64)
                lam = saved_lambda
                s = tl.sqrt(saved_lambda)
        inverse = tl.where(s > null_threshold * tl.max(s, 0), 1.0 / tl.where(s > 0.0, s, 1.0), 0.0)

        # `unit` is a power of two that scales the largest upstream gradient to about 1. It is
        # limited so that scale / unit is a finite number.
        largest = tl.full([], 0.0, tl.float64)
        if HAS_A:
            largest = tl.maximum(largest, _largest(ga_ptr, k * p, BLOCK))
        if HAS_B:
            largest = tl.maximum(largest, _largest(gb_ptr, k * wide_q, BLOCK))
        if HAS_S:
            largest = tl.maximum(largest, _largest(gs_ptr, k, BLOCK) / scale)
        unit = tl.where(largest < float("inf"), unit_for(largest, T), power_of_two(tl.full([], -1022 if tl.float64 == T else -126, tl.int32)))
        unit = tl.where(largest > 0.0, tl.maximum(unit, scale * 2.2250738585072014e-308), 1.0)

        # r_j = P (ga_j + M gb_j / sigma_j)
        z = tl.zeros([PB, KB], T)
        if HAS_A:
            z += (tl.load(ga_ptr + vectors, inside, other=0.0).to(tl.float64) * unit).to(T)
        if HAS_B:
            mg = tl.load(mg_ptr + vectors, inside, other=0.0) * scale * unit
            z += (mg * inverse[None, :]).to(T)
        z = _subtract_projections(z, a_ptr, p, k, PB)
        inverse_gaps = _inverse_gaps(lam, k, gap_eps, KB)
        a_differences = tl.zeros([KB, KB], tl.float64)
        if HAS_A:
            a_differences = _differences(_products(a_ptr, ga_ptr, p, k, unit, KB, 256), _squared_lengths(ga_ptr, p, k, unit, KB, 256), T)

        if recompute:
            residual_gram(matrix_ptr, x_ptr, x_p, x_q, p, q, scale.to(T), a_ptr, k, T, BP, BQ, PRECISION)
            tau_of_form = form_ptr + p * (p + 1) // 2
            tridiagonalize(matrix_ptr, form_ptr, tau_of_form, tau_of_form + p, tau_of_form + 2 * p, work_ptr + b * 3 * PB, p, T, PB, RB)
        tau = form_ptr + p * (p + 1) // 2
        z = apply_q(z, form_ptr, tau, p, PB, True)
        largest_root = tl.sqrt(tl.max(lam, 0))
        eps = gap_eps * largest_root * tl.maximum(tl.sqrt(lam), gap_eps * largest_root)
        z = resolvent(z, tau + p, tau + 2 * p, lam, eps, rows_ptr, p, T, PB, KB)
        z = _subtract_projections(apply_q(z, form_ptr, tau, p, PB, False), a_ptr, p, k, PB)
        # z_j += sum_i a_i A_ij / 2 f(lambda_j - lambda_i)
        coefficients = 0.5 * a_differences * tl.trans(inverse_gaps)  # [i, j]
        for i in range(0, k):
            coefficient = tl.sum(tl.where(j[:, None] == i, coefficients, 0.0), 0).to(T)
            z += tl.load(a_ptr + i * p + c, c < p, other=0.0)[:, None] * coefficient[None, :]
        tl.store(z_ptr + vectors, z, inside)

        tl.store(w_coefficients_ptr + j, tl.zeros([KB], tl.float64), j < k)
        if HAS_S:
            tl.store(w_coefficients_ptr + j, tl.load(gs_ptr + j, j < k, other=0.0).to(tl.float64) * (unit / scale) * inverse, j < k)
        if HAS_B:
            products = _products(b_ptr, gb_ptr, wide_q, k, unit, KB, 256)
            b_differences = tl.trans(_differences(products, _squared_lengths(gb_ptr, wide_q, k, unit, KB, 256), T))  # [i, j]: B_ji
            coefficients = s[None, :] * b_differences * inverse_gaps - products * inverse[None, :]
            # [i, j]: the coefficient of b_i in y_j, stored by j
            tl.store(b_coefficients_ptr + j[None, :] * k + j[:, None], coefficients, in_square)
            tl.store(gb_coefficients_ptr + j, unit * inverse, j < k)
        tl.store(factor_ptr, scale / unit)
        tl.store(factor_ptr + 1, scale)
    else:  # a zero matrix has gradient 0; a non-finite one has NaN, or 0 if all its upstream gradients are 0
        is_used = False
        if HAS_A:
            is_used = is_used | _any(ga_ptr, k * p, BLOCK)
        if HAS_B:
            is_used = is_used | _any(gb_ptr, k * wide_q, BLOCK)
        if HAS_S:
            is_used = is_used | _any(gs_ptr, k, BLOCK)
        value = tl.where((sigma_1 == 0.0) | (not is_used), 0.0, float("nan")).to(tl.float64)
        tl.store(z_ptr + vectors, tl.zeros([PB, KB], T) + value.to(T), inside)
        tl.store(w_coefficients_ptr + j, tl.zeros([KB], tl.float64) + value, j < k)
        tl.store(gb_coefficients_ptr + j, tl.zeros([KB], tl.float64) + value, j < k)
        tl.store(b_coefficients_ptr + square, tl.zeros([KB, KB], tl.float64) + value, in_square)
        tl.store(factor_ptr, value)
        tl.store(factor_ptr + 1, value + 1.0)


@triton.jit
def _update_kernel(
    x_ptr, out_ptr, a_ptr, b_ptr, z_ptr, gb_ptr, coefficients_ptr, x_batch, x_p, x_q, o_batch, o_p, o_q, p, q, k,
    HAS_B: tl.constexpr, T: tl.constexpr, PB: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """Compute dM = sum_j z_j (M^T a_j)^T + a_j y_j^T. Each program computes some columns."""
    max_finite: tl.constexpr = 1.7976931348623157e308 if tl.float64 == T else 3.4028234663852886e38
    blocks = tl.cdiv(q, BQ)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c, i = (tl.program_id(0) % blocks) * BQ + tl.arange(0, BQ), tl.arange(0, PB)
    coefficients_ptr += b * (2 * k + k * k + 2)
    factor, scale = tl.load(coefficients_ptr + 2 * k + k * k), tl.load(coefficients_ptr + 2 * k + k * k + 1)
    m = tile_of(x_ptr + b * x_batch, i, c, x_p, x_q, p, q, scale.to(T), T)
    total = tl.zeros([PB, BQ], T)
    for j in range(0, k):
        a = tl.load(a_ptr + (b * k + j) * p + i, i < p, other=0.0)
        z = tl.load(z_ptr + (b * k + j) * p + i, i < p, other=0.0)
        w, y = tl.sum(a[:, None] * m, 0), tl.sum(z[:, None] * m, 0)
        y += tl.load(coefficients_ptr + j).to(T) * w
        if HAS_B:
            y += tl.load(coefficients_ptr + k + j).to(T) * tl.load(gb_ptr + (b * k + j) * q + c, c < q, other=0.0)
            for other in range(0, k):
                coefficient = tl.load(coefficients_ptr + 2 * k + j * k + other).to(T)
                y += coefficient * tl.load(b_ptr + (b * k + other) * q + c, c < q, other=0.0)
        total += z[:, None] * w[None, :] + a[:, None] * y[None, :]
    # Results are limited to finite numbers. A factor far from 1 is multiplied in float64, because
    # the intermediate product may leave the range of T.
    if (factor > 8.673617379884035e-19) & (factor < 1.152921504606847e18):
        total *= factor.to(T)
    else:
        total = tl.minimum(tl.maximum(total.to(tl.float64) * factor, -max_finite, propagate_nan=tl.PropagateNan.ALL), max_finite,
                           propagate_nan=tl.PropagateNan.ALL).to(T)  # fmt: skip
    total = tl.minimum(tl.maximum(total, -max_finite, propagate_nan=tl.PropagateNan.ALL), max_finite, propagate_nan=tl.PropagateNan.ALL)
    total = tl.where(factor == 0.0, 0.0, total).to(T)
    block_ptr = out_ptr + b * o_batch + i.to(tl.int64)[:, None] * o_p + c.to(tl.int64)[None, :] * o_q
    tl.store(block_ptr, total.to(out_ptr.dtype.element_ty), (i < p)[:, None] & (c < q)[None, :])


def truncated_svd_backward(
    grad_u: Tensor | None,
    grad_s: Tensor | None,
    grad_v: Tensor | None,
    x: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    state: Tensor,
    gap_eps: float,
) -> Tensor:
    """Implements kdkernels::truncated_svd_backward_triton."""
    gradient, k = torch.empty_like(x), s.shape[-1]
    if x.numel() == 0:
        return gradient
    dtype = compute_dtype(x)
    double = dtype == torch.float64
    m, tall, strides = one_batch(x)
    gradient_batch, _, out_strides = one_batch(gradient)
    batch, p, q = m.shape[0], min(m.shape[1:]), max(m.shape[1:])
    check_fits(p, k)

    def rows(t: Tensor | None, n: int) -> Tensor | None:
        """Convert [..., n, k] to contiguous [B, k, n]. Return None for missing tensors."""
        return None if t is None or t.dim() != x.dim() else t.to(dtype).mT.reshape(batch, k, n).contiguous()

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=x.device)

    a, ga, gb = rows(v if tall else u, p), rows(grad_v if tall else grad_u, p), rows(grad_u if tall else grad_v, q)
    b = rows(u if tall else v, q) if gb is not None else None
    s = s.to(dtype).reshape(batch, k).contiguous()
    gs = None if grad_s is None else grad_s.to(dtype).reshape(batch, k).contiguous()
    size = state_size(p, k)
    has_state = state.numel() > 0
    if has_state and (state.numel() != batch * size or state.dtype != dtype):
        raise ValueError("state must be that of the forward, or empty")
    sizes = block_sizes(p, q, k, double)
    z, coefficients = empty(batch, k, p), empty(batch, 2 * k + k * k + 2, dtype=torch.float64)
    mg = empty(batch, k, p, dtype=torch.float64) if gb is not None else z
    columns, compute = column_block(p, double), as_tl(dtype)
    pointer = {name: z if t is None else t for name, t in {"b": b, "ga": ga, "gs": gs, "gb": gb}.items()}  # z: not read
    with device_of(x):
        if gb is not None:
            rows_together = min(sizes["PB"], 32)
            _product_kernel[(batch * triton.cdiv(p, rows_together),)](
                m, gb, mg, *strides, p, q, k, T=compute, BP=rows_together, BQ=64, **compile_options(4)
            )
        _solve_kernel[(batch,)](
            m, empty(batch, p, p), a, pointer["b"], s, pointer["ga"], pointer["gs"], pointer["gb"], mg, state if has_state else z,
            empty(batch, size), empty(batch, 3 * sizes["PB"]), empty(batch, 8 * p * sizes["KB"], dtype=torch.float64), z, coefficients,
            *strides, size, p, q, k, gap_eps, HAS_A=ga is not None, HAS_S=gs is not None, HAS_B=gb is not None, HAS_STATE=has_state,
            T=compute, **sizes, PRECISION=precision(double), BLOCK=512, **compile_options(warps_for(p)),
        )  # fmt: skip
        _update_kernel[(batch * triton.cdiv(q, columns),)](
            m, gradient_batch, a, pointer["b"], z, pointer["gb"], coefficients, *strides, *out_strides, p, q, k,
            HAS_B=gb is not None, T=compute, PB=sizes["PB"], BQ=columns, **compile_options(4),
        )  # fmt: skip
    if gradient_batch.data_ptr() != gradient.data_ptr():
        gradient.copy_(gradient_batch.view(gradient.shape))
    return gradient
