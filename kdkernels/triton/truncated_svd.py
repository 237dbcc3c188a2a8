"""Triton kernels of truncated_svd: the portable route for GPUs. The stages are in svd_stages.py, the mathematics in docs/truncated_svd.md.

Forward: Gram matrices block by block, one program each; a program per matrix for its eigenvectors, which squares again what is left of a matrix
whose kept values span orders of magnitude (no host asks which those are); and for vectors of the larger side a product with M and a program per
matrix that brings them to length 1. Backward: a program per matrix for the projected solve, then one pass over M. The state is that of the CUDA
kernels: the reflectors of Q in a packed triangle, tau, the diagonals of T, lambda in two parts, scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import Sign
from .align_singular_vectors import align_singular_vectors, align_singular_vectors_backward  # noqa: F401  the same set of ops
from .launch import as_tl, compile_options, device_of
from .svd_backward import truncated_svd_backward  # noqa: F401  the same set of ops
from .svd_sizes import (
    ILL_CONDITIONED,
    SIGN_TIES,
    block_sizes,
    check_fits,
    column_block,
    gram_sizes,
    one_batch,
    precision,
    search_sizes,
    state_size,
    warps_for,
)
from .svd_stages import (
    apply_q,
    eigenvectors,
    exponent_of,
    gram_block,
    largest_eigenvalues,
    multiply,
    orthonormalize,
    power_of_two,
    residual_gram,
    store_block,
    tile_of,
    trace,
    tridiagonalize,
    unit_for,
)


@triton.jit
def _gram_kernel(
    x_ptr, matrix_ptr, x_batch, x_p, x_q, p, q, T: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    side = tl.cdiv(p, BP)
    blocks = side * (side + 1) // 2
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block, row = tl.program_id(0) % blocks, 0
    while block > row:
        row += 1
        block -= row
    scale = tl.full([], 1.0, T)
    values = gram_block(x_ptr + b * x_batch, x_p, x_q, p, q, scale, matrix_ptr, 0, row * BP, block * BP, T, BP, BQ, PRECISION, False)
    store_block(matrix_ptr + b * p * p, p, row * BP, block * BP, values, BP)


@triton.jit
def _normalize(matrix_ptr, total, own, p, T: tl.constexpr, PB: tl.constexpr, RB: tl.constexpr):
    """matrix times the square of the power of two that is returned: its trace comes into [1/4, 1), or as near as leaves own times that power a
    normal number of T."""
    most: tl.constexpr = 1022 if tl.float64 == T else 126
    exponent, held = exponent_of(total) + 1, exponent_of(own)
    half = tl.where(exponent > 0, (exponent + 1) // 2, -((-exponent) // 2))
    half = tl.minimum(tl.maximum(half, held - most), held + most)
    multiply(matrix_ptr, p, power_of_two(-2 * half).to(T), T, PB, RB)
    return power_of_two(-half)


@triton.jit(do_not_specialize=["state_size"])
def _decompose_kernel(
    x_ptr, matrix_ptr, a_ptr, s_ptr, sigma_ptr, scale_ptr, state_ptr, residual_ptr, work_ptr, rows_ptr,
    x_batch, x_p, x_q, state_size, p, q, k,
    FIX_SIGN: tl.constexpr, WRITE_S: tl.constexpr, T: tl.constexpr, PB: tl.constexpr, KB: tl.constexpr, RB: tl.constexpr, BP: tl.constexpr,
    BQ: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """a [B, k, p], and s where no larger side is wanted, which otherwise takes sigma [B, k] in units of 1 / scale [B]: 0 for a broken matrix."""
    low: tl.constexpr = 1e-200 if tl.float64 == T else 1e-24
    high: tl.constexpr = 1e290 if tl.float64 == T else 1e34
    eps: tl.constexpr = 2.220446049250313e-16 if tl.float64 == T else 1.1920929e-7
    b = tl.program_id(0).to(tl.int64)
    x_ptr += b * x_batch
    matrix_ptr += b * p * p
    a_ptr += b * k * p
    s_ptr += b * k
    sigma_ptr += b * k
    reflectors_ptr = state_ptr + b * state_size
    residual_ptr += b * state_size
    lambda_ptr = reflectors_ptr + p * (p + 1) // 2 + 3 * p
    work_ptr += b * 3 * PB
    rows_ptr += b * 8 * p * KB
    c, j = tl.arange(0, PB), tl.arange(0, KB)

    # G of scale M. Squares may leave their range, then M is scaled first; a matrix that holds no numbers is told by its largest.
    scale = tl.full([], 1.0, tl.float64)
    total = trace(matrix_ptr, p, PB)
    finite = total == total
    if (total > low) & (total < high):
        scale *= _normalize(matrix_ptr, total, scale, p, T, PB, RB)
    else:
        largest = tl.full([], 0.0, T)
        broken = 0
        lane = tl.arange(0, BQ)
        for r0 in range(0, p, BP):
            for first in range(0, q, BQ):
                m = tile_of(x_ptr, r0 + tl.arange(0, BP), first + lane, x_p, x_q, p, q, tl.full([], 1.0, T), T)
                off = (m - m) != 0.0
                broken += tl.sum(tl.sum(off.to(tl.int32), 1), 0)
                largest = tl.maximum(largest, tl.max(tl.max(tl.where(off, 0.0, tl.abs(m)), 1), 0))
        finite = broken == 0
        if (largest > 0.0) & finite:
            scale = unit_for(largest.to(tl.float64), T)
            residual_gram(matrix_ptr, x_ptr, x_p, x_q, p, q, scale.to(T), a_ptr, 0, T, BP, BQ, PRECISION)
            total = trace(matrix_ptr, p, PB)
            scale *= _normalize(matrix_ptr, total, scale, p, T, PB, RB)
        else:
            multiply(matrix_ptr, p, tl.full([], 0.0, T), T, PB, RB)

    found, unit = 0, tl.full([], 1.0, tl.float64)
    while found < k:
        wanted = k - found
        if found > 0:  # what is left of M without the vectors that were found
            residual_gram(matrix_ptr, x_ptr, x_p, x_q, p, q, scale.to(T), a_ptr, found, T, BP, BQ, PRECISION)
            total = trace(matrix_ptr, p, PB)
            if total > low:
                unit = _normalize(matrix_ptr, total, tl.full([], 1.0, tl.float64), p, T, PB, RB)
            else:
                unit = tl.full([], 1.0, tl.float64)
                multiply(matrix_ptr, p, tl.full([], 0.0, T), T, PB, RB)
        # The first round's form of G is what the backward takes; later ones have a place of their own.
        own_ptr = reflectors_ptr
        if found > 0:
            own_ptr = residual_ptr
        tau = own_ptr + p * (p + 1) // 2
        tridiagonalize(matrix_ptr, own_ptr, tau, tau + p, tau + 2 * p, work_ptr, p, T, PB, RB)
        values = largest_eigenvalues(tau + p, tau + 2 * p, p, T, PB, KB, PARTS, ROUNDS)
        values = eigenvectors(tau + p, tau + 2 * p, values, rows_ptr, p, wanted, PB, KB)
        values = tl.where(j < wanted, tl.maximum(values, 0.0), -1.0)
        # Rayleigh quotients of equal eigenvalues may come out of order by a rounding.
        ahead = (values[None, :] > values[:, None]) | ((values[None, :] == values[:, None]) & (j[None, :] < j[:, None]))
        rank = tl.sum(ahead.to(tl.int32), 1)
        if found == 0:
            main = values.to(T)
            tl.store(lambda_ptr + rank, main, j < k)
            tl.store(lambda_ptr + k + rank, (values - main.to(tl.float64)).to(T), j < k)
            tl.store(lambda_ptr + 2 * k, scale.to(T))
        vectors = tl.load(rows_ptr + 5 * p * KB + c[:, None] * KB + j[None, :], (c < p)[:, None] & (j < wanted)[None, :], other=0.0).to(T)
        vectors = apply_q(vectors, own_ptr, tau, p, PB, False)
        own = found + rank
        tl.store(a_ptr + own[None, :] * p + c[:, None], vectors, (c < p)[:, None] & (j < wanted)[None, :])
        tl.debug_barrier()
        orthonormalize(a_ptr, 1, p, found, k, p, PB)
        tl.store(sigma_ptr + own, tl.sqrt(tl.maximum(values, 0.0)) / unit, j < wanted)
        tl.debug_barrier()
        # Values near the round's largest are exact, or all where that is a rounding of the first.
        first, all_first = tl.sqrt(tl.maximum(tl.max(values, 0), 0.0)), tl.load(sigma_ptr)
        exact = tl.sum(((j < wanted) & (tl.sqrt(tl.maximum(values, 0.0)) >= first * ILL_CONDITIONED)).to(tl.int32), 0)
        done = (first == 0.0) | ((found > 0) & (first / unit <= 4 * eps * all_first))
        found += tl.where(done, wanted, exact)
    tl.store(scale_ptr + b, tl.where(finite, scale, 0.0))
    if finite:
        if FIX_SIGN:
            _fix_signs(a_ptr, a_ptr, p, p, k, False, 1024)
    else:
        tl.store(a_ptr + j[None, :] * p + c[:, None], tl.full([PB, KB], float("nan"), T), (c < p)[:, None] & (j < k)[None, :])
    if WRITE_S:
        _write_s(s_ptr, sigma_ptr, tl.where(finite, scale, 0.0), k, KB)


@triton.jit
def _write_s(s_ptr, sigma_ptr, scale, k, KB: tl.constexpr):
    """s, descending: rounds and norms may leave equal ones out of order by a rounding."""
    j = tl.arange(0, KB)
    sigma = tl.load(sigma_ptr + j, j < k, other=-1.0)
    ahead = (sigma[None, :] > sigma[:, None]) | ((sigma[None, :] == sigma[:, None]) & (j[None, :] < j[:, None]))
    rank = tl.sum(ahead.to(tl.int32), 1)
    s = tl.where(scale > 0.0, sigma / tl.where(scale > 0.0, scale, 1.0), float("nan"))
    tl.store(s_ptr + tl.where(scale > 0.0, rank, j), s.to(s_ptr.dtype.element_ty), j < k)


@triton.jit
def _fix_signs(own_ptr, other_ptr, n, others, k, BOTH: tl.constexpr, BLOCK: tl.constexpr):
    """The entry of largest magnitude of every vector of `own`, the first of equals (see kSignTies), is made positive."""
    lane = tl.arange(0, BLOCK)
    n, others = tl.cast(n, tl.int64), tl.cast(others, tl.int64)  # k of them may exceed 32 bits; both, for their loops share a counter
    for j in range(0, k):
        best = tl.full([], 0.0, own_ptr.dtype.element_ty)
        for first in range(0, n, BLOCK):
            best = tl.maximum(best, tl.max(tl.abs(tl.load(own_ptr + j * n + first + lane, first + lane < n, other=0.0)), 0))
        value, found = tl.full([], 0.0, own_ptr.dtype.element_ty), 0
        for first in range(0, n, BLOCK):
            inside = first + lane < n
            x = tl.load(own_ptr + j * n + first + lane, inside, other=0.0)
            place = tl.min(tl.where(inside & (tl.abs(x) >= best * (1 - SIGN_TIES)), lane, BLOCK), 0)
            value = tl.where(found == 0, tl.sum(tl.where(lane == place, x, 0.0), 0), value)
            found += (place < BLOCK).to(tl.int32)
        tl.debug_barrier()
        if value < 0.0:
            for first in range(0, n, BLOCK):
                inside = first + lane < n
                x = tl.load(own_ptr + j * n + first + lane, inside, other=0.0)
                tl.debug_barrier()
                tl.store(own_ptr + j * n + first + lane, -x, inside)
            if BOTH:
                for first in range(0, others, BLOCK):
                    inside = first + lane < others
                    x = tl.load(other_ptr + j * others + first + lane, inside, other=0.0)
                    tl.debug_barrier()
                    tl.store(other_ptr + j * others + first + lane, -x, inside)


@triton.jit
def _project_kernel(
    x_ptr, a_ptr, b_ptr, scale_ptr, x_batch, x_p, x_q, p, q, k, T: tl.constexpr, PB: tl.constexpr, BQ: tl.constexpr
):  # fmt: skip
    """b = (scale M)^T a, columns shared out over programs."""
    blocks = tl.cdiv(q, BQ)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c, i = (tl.program_id(0) % blocks) * BQ + tl.arange(0, BQ), tl.arange(0, PB)
    m = tile_of(x_ptr + b * x_batch, i, c, x_p, x_q, p, q, tl.load(scale_ptr + b).to(T), T)
    for j in range(0, k):
        a = tl.load(a_ptr + (b * k + j) * p + i, i < p, other=0.0)
        tl.store(b_ptr + (b * k + j) * q + c, tl.sum(a[:, None] * m, 0), c < q)


@triton.jit
def _squares(x_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, n, BLOCK):
        x = tl.load(x_ptr + first + lane, first + lane < n, other=0.0).to(tl.float64)
        total += x * x
    return tl.sum(total, 0)


@triton.jit
def _scale_to_one(x_ptr, norm, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    for first in range(0, n, BLOCK):
        inside = first + lane < n
        x = tl.load(x_ptr + first + lane, inside, other=0.0).to(tl.float64)
        tl.debug_barrier()
        tl.store(x_ptr + first + lane, (x / norm).to(x_ptr.dtype.element_ty), inside)
    tl.debug_barrier()


@triton.jit
def _remove_before(b_ptr, j, q, BLOCK: tl.constexpr):
    """Vector j minus its parts along those before, one after another, and its length then."""
    lane = tl.arange(0, BLOCK)
    for before in range(0, j):
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, q, BLOCK):
            inside = first + lane < q
            own = tl.load(b_ptr + j * q + first + lane, inside, other=0.0).to(tl.float64)
            total += own * tl.load(b_ptr + before * q + first + lane, inside, other=0.0).to(tl.float64)
        along = tl.sum(total, 0)
        tl.debug_barrier()
        for first in range(0, q, BLOCK):
            inside = first + lane < q
            own = tl.load(b_ptr + j * q + first + lane, inside, other=0.0).to(tl.float64)
            own -= along * tl.load(b_ptr + before * q + first + lane, inside, other=0.0).to(tl.float64)
            tl.debug_barrier()
            tl.store(b_ptr + j * q + first + lane, own.to(b_ptr.dtype.element_ty), inside)
        tl.debug_barrier()
    return tl.sqrt(_squares(b_ptr + j * q, q, BLOCK))


@triton.jit
def _finish_kernel(
    a_ptr, b_ptr, s_ptr, sigma_ptr, scale_ptr, p, q, k, SIGN: tl.constexpr, SIGN_ON_A: tl.constexpr, T: tl.constexpr, KB: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """b_j and sigma_j from W_j = M^T a_j. Where sigma_j is small, roundings of sigma_1 spoil the angles to the vectors before: those are made right
    again, and a vector of which little is left becomes the first unit vector that has a part of its own."""
    tiny: tl.constexpr = 2.2250738585072014e-305 if tl.float64 == T else 1.1754944e-35
    b = tl.program_id(0).to(tl.int64)
    a_ptr += b * k * p
    b_ptr += b * k * q
    sigma_ptr += b * k
    lane = tl.arange(0, BLOCK)
    wide_q = tl.cast(q, tl.int64)  # k q may exceed 32 bits
    scale = tl.load(scale_ptr + b)
    if scale > 0.0:
        largest = tl.full([], 0.0, tl.float64)
        for j in range(0, k):
            sigma = tl.sqrt(_squares(b_ptr + j * wide_q, q, BLOCK))
            tl.store(sigma_ptr + j, sigma)
            largest = tl.where(j == 0, sigma, largest)
            exact = ((sigma > 0.5 * largest) & (sigma > tiny)).to(tl.int32)
            if sigma > tiny:
                _scale_to_one(b_ptr + j * wide_q, sigma, q, BLOCK)
            place = -1
            while exact == 0:
                if place >= 0:
                    for first in range(0, q, BLOCK):
                        tl.store(b_ptr + j * wide_q + first + lane, (first + lane == place).to(T), first + lane < q)
                    tl.debug_barrier()
                left = tl.full([], 1.0, tl.float64)
                for _ in range(0, 3):
                    norm = _remove_before(b_ptr, j, wide_q, BLOCK)
                    left *= norm
                    _scale_to_one(b_ptr + j * wide_q, tl.where(norm > 0.0, norm, 1.0), q, BLOCK)
                enough = tl.where(place < 0, 1e-4, 0.5 / tl.sqrt(tl.cast(q, tl.float64)))
                place += 1
                exact = ((left > enough) | (place >= q)).to(tl.int32)
        tl.debug_barrier()
        if SIGN:
            if SIGN_ON_A:
                _fix_signs(a_ptr, b_ptr, p, q, k, True, BLOCK)
            else:
                _fix_signs(b_ptr, a_ptr, q, p, k, True, BLOCK)
    else:
        for first in range(0, k * wide_q, BLOCK):
            tl.store(b_ptr + first + lane, tl.full([BLOCK], float("nan"), T), first + lane < k * wide_q)
    tl.debug_barrier()
    _write_s(s_ptr + b * k, sigma_ptr, scale, k, KB)


def truncated_svd(x: Tensor, k: int, sign: int, return_u: bool, gap_eps: float, save_state: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements kdkernels::truncated_svd_triton."""
    shape = x.shape[:-2]
    x, tall, strides = one_batch(x)
    batch, p, q = x.shape[0], min(x.shape[1:]), max(x.shape[1:])
    check_fits(p, k)
    dtype = compute_dtype(x)
    double = dtype == torch.float64
    wants_b, fix_sign = return_u or not tall, sign == Sign.MAX_ABS

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=x.device)

    a, s = empty(batch, k, p), empty(batch, k)
    b = empty(batch, k, q) if wants_b else empty(0)
    state = empty(batch, state_size(p, k))
    if batch > 0:
        sizes = block_sizes(p, q, k, double)
        gram = gram_sizes(p, double)
        blocks = triton.cdiv(p, gram["BP"])
        matrix, sigma, scale = empty(batch, p, p), empty(batch, k, dtype=torch.float64), empty(batch, dtype=torch.float64)
        residual, work = torch.empty_like(state), empty(batch, 3 * sizes["PB"])
        rows = empty(batch, 8 * p * sizes["KB"], dtype=torch.float64)
        common = {"T": as_tl(dtype), "PRECISION": precision(double)}
        with device_of(x):
            _gram_kernel[(batch * blocks * (blocks + 1) // 2,)](x, matrix, *strides, p, q, **gram, **common)
            _decompose_kernel[(batch,)](
                x, matrix, a, s, sigma, scale, state, residual, work, rows, *strides, state.shape[1], p, q, k,
                FIX_SIGN=fix_sign and not wants_b, WRITE_S=not wants_b, **common, **sizes, **search_sizes(double), **compile_options(warps_for(p)),
            )  # fmt: skip
            if wants_b:
                columns = column_block(p, double)
                _project_kernel[(batch * triton.cdiv(q, columns),)](
                    x, a, b, scale, *strides, p, q, k, T=as_tl(dtype), PB=sizes["PB"], BQ=columns, **compile_options(4)
                )
                _finish_kernel[(batch,)](
                    a, b, s, sigma, scale, p, q, k, SIGN=fix_sign, SIGN_ON_A=tall, T=as_tl(dtype), KB=sizes["KB"], BLOCK=1024, **compile_options(4)
                )
    a = a.view(*shape, k, p).mT
    b = b.view(*shape, k, q).mT if wants_b else b
    return b if tall else a, s.view(*shape, k), a if tall else b, state.flatten() if save_state else s.new_empty(0)
