"""Triton kernels of truncated_svd, the portable implementation for GPUs.

docs/truncated_svd.md describes the algorithm; svd_stages.py contains its stages.

1. _gram_kernel computes the Gram matrices, with one program per block.
2. _decompose_kernel computes eigenvectors, with one program per matrix. If the kept singular values
   span orders of magnitude, it repeats the computation for the residual: M without its projections
   onto the vectors found so far. The program decides this itself, so the host does not wait.
3. If the vectors of the larger side are needed, _project_kernel multiplies M by the eigenvectors,
   and _finish_kernel normalises the products, with one program per matrix.

svd_backward.py contains the backward kernels. The state that the forward pass saves is that of the
CUDA kernels: the reflectors of Q in a packed triangle, tau, the two diagonals of T, lambda in two
parts, and scale.
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
def _normalize(matrix_ptr, total, scale_so_far, p, T: tl.constexpr, PB: tl.constexpr, RB: tl.constexpr):
    """Multiply matrix by the square of a power of two, and return this power.

    The trace of the matrix is scaled into [1/4, 1). The power is limited so that its product with
    scale_so_far is a normal number of T.
    """
    max_exponent: tl.constexpr = 1022 if tl.float64 == T else 126
    exponent, exponent_so_far = exponent_of(total) + 1, exponent_of(scale_so_far)
    half = tl.where(exponent > 0, (exponent + 1) // 2, -((-exponent) // 2))
    half = tl.minimum(tl.maximum(half, exponent_so_far - max_exponent), exponent_so_far + max_exponent)
    multiply(matrix_ptr, p, power_of_two(-2 * half).to(T), T, PB, RB)
    return power_of_two(-half)


@triton.jit(do_not_specialize=["state_size"])
def _decompose_kernel(
    x_ptr, matrix_ptr, a_ptr, s_ptr, sigma_ptr, scale_ptr, state_ptr, residual_ptr, work_ptr, rows_ptr,
    x_batch, x_p, x_q, state_size, p, q, k,
    FIX_SIGN: tl.constexpr, WRITE_S: tl.constexpr, T: tl.constexpr, PB: tl.constexpr, KB: tl.constexpr, RB: tl.constexpr, BP: tl.constexpr,
    BQ: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Compute a [B, k, p], scale [B] and sigma [B, k], the singular values of scale * M.

    s is written here if WRITE_S, else by _finish_kernel. scale is 0 for a non-finite matrix.
    """
    min_trace: tl.constexpr = 1e-200 if tl.float64 == T else 1e-24
    max_trace: tl.constexpr = 1e290 if tl.float64 == T else 1e34
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

    # Compute the Gram matrix G of scale * M. If squares are out of range, find the largest entry of
    # M, scale M and compute G again. NaN and infinity are detected in the same pass.
    scale = tl.full([], 1.0, tl.float64)
    total = trace(matrix_ptr, p, PB)
    finite = total == total
    if (total > min_trace) & (total < max_trace):
        scale *= _normalize(matrix_ptr, total, scale, p, T, PB, RB)
    else:
        largest = tl.full([], 0.0, T)
        not_finite_count = 0
        lane = tl.arange(0, BQ)
        for r0 in range(0, p, BP):
            for first in range(0, q, BQ):
                m = tile_of(x_ptr, r0 + tl.arange(0, BP), first + lane, x_p, x_q, p, q, tl.full([], 1.0, T), T)
                not_finite = (m - m) != 0.0
                not_finite_count += tl.sum(tl.sum(not_finite.to(tl.int32), 1), 0)
                largest = tl.maximum(largest, tl.max(tl.max(tl.where(not_finite, 0.0, tl.abs(m)), 1), 0))
        finite = not_finite_count == 0
        if (largest > 0.0) & finite:
            scale = unit_for(largest.to(tl.float64), T)
            residual_gram(matrix_ptr, x_ptr, x_p, x_q, p, q, scale.to(T), a_ptr, 0, T, BP, BQ, PRECISION)
            total = trace(matrix_ptr, p, PB)
            scale *= _normalize(matrix_ptr, total, scale, p, T, PB, RB)
        else:
            multiply(matrix_ptr, p, tl.full([], 0.0, T), T, PB, RB)

    found, residual_scale = 0, tl.full([], 1.0, tl.float64)
    while found < k:
        wanted = k - found
        if found > 0:  # continue with M minus its projections onto the vectors found so far
            residual_gram(matrix_ptr, x_ptr, x_p, x_q, p, q, scale.to(T), a_ptr, found, T, BP, BQ, PRECISION)
            total = trace(matrix_ptr, p, PB)
            if total > min_trace:
                residual_scale = _normalize(matrix_ptr, total, tl.full([], 1.0, tl.float64), p, T, PB, RB)
            else:
                residual_scale = tl.full([], 1.0, tl.float64)
                multiply(matrix_ptr, p, tl.full([], 0.0, T), T, PB, RB)
        # The backward pass uses the tridiagonal form of the first round. Later rounds store theirs
        # elsewhere.
        form_ptr = reflectors_ptr
        if found > 0:
            form_ptr = residual_ptr
        tau = form_ptr + p * (p + 1) // 2
        tridiagonalize(matrix_ptr, form_ptr, tau, tau + p, tau + 2 * p, work_ptr, p, T, PB, RB)
        values = largest_eigenvalues(tau + p, tau + 2 * p, p, T, PB, KB, PARTS, ROUNDS)
        values = eigenvectors(tau + p, tau + 2 * p, values, rows_ptr, p, wanted, PB, KB)
        values = tl.where(j < wanted, tl.maximum(values, 0.0), -1.0)
        # The Rayleigh quotients of equal eigenvalues may be out of order because of rounding.
        comes_before = (values[None, :] > values[:, None]) | ((values[None, :] == values[:, None]) & (j[None, :] < j[:, None]))
        rank = tl.sum(comes_before.to(tl.int32), 1)
        if found == 0:
            rounded = values.to(T)
            tl.store(lambda_ptr + rank, rounded, j < k)
            tl.store(lambda_ptr + k + rank, (values - rounded.to(tl.float64)).to(T), j < k)
            tl.store(lambda_ptr + 2 * k, scale.to(T))
        vectors = tl.load(rows_ptr + 5 * p * KB + c[:, None] * KB + j[None, :], (c < p)[:, None] & (j < wanted)[None, :], other=0.0).to(T)
        vectors = apply_q(vectors, form_ptr, tau, p, PB, False)
        index = found + rank
        tl.store(a_ptr + index[None, :] * p + c[:, None], vectors, (c < p)[:, None] & (j < wanted)[None, :])
        tl.debug_barrier()
        orthonormalize(a_ptr, 1, p, found, k, p, False, PB)
        tl.store(sigma_ptr + index, tl.sqrt(tl.maximum(values, 0.0)) / residual_scale, j < wanted)
        tl.debug_barrier()
        # Accept the values that are close to the largest value of this round. Accept all if it is
        # only a rounding error of the first value.
        first, sigma_1 = tl.sqrt(tl.maximum(tl.max(values, 0), 0.0)), tl.load(sigma_ptr)
        exact = tl.sum(((j < wanted) & (tl.sqrt(tl.maximum(values, 0.0)) >= first * ILL_CONDITIONED)).to(tl.int32), 0)
        done = (first == 0.0) | ((found > 0) & (first / residual_scale <= 4 * eps * sigma_1))
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
    """Write s in descending order. Equal values may be out of order because of rounding."""
    j = tl.arange(0, KB)
    sigma = tl.load(sigma_ptr + j, j < k, other=-1.0)
    comes_before = (sigma[None, :] > sigma[:, None]) | ((sigma[None, :] == sigma[:, None]) & (j[None, :] < j[:, None]))
    rank = tl.sum(comes_before.to(tl.int32), 1)
    s = tl.where(scale > 0.0, sigma / tl.where(scale > 0.0, scale, 1.0), float("nan"))
    tl.store(s_ptr + tl.where(scale > 0.0, rank, j), s.to(s_ptr.dtype.element_ty), j < k)


@triton.jit
def _fix_signs(vector_ptr, other_ptr, n, other_n, k, BOTH: tl.constexpr, BLOCK: tl.constexpr):
    """Make the entry of largest magnitude of every vector positive.

    Of several entries that count as equal (see kSignTies), the first is used. If BOTH, the vector
    of `other` with the same index changes its sign too.
    """
    lane = tl.arange(0, BLOCK)
    n, other_n = tl.cast(n, tl.int64), tl.cast(other_n, tl.int64)  # k n may exceed 32 bits; both in 64 bits, because their loops share a counter
    for j in range(0, k):
        best = tl.full([], 0.0, vector_ptr.dtype.element_ty)
        for first in range(0, n, BLOCK):
            best = tl.maximum(best, tl.max(tl.abs(tl.load(vector_ptr + j * n + first + lane, first + lane < n, other=0.0)), 0))
        value, found = tl.full([], 0.0, vector_ptr.dtype.element_ty), 0
        for first in range(0, n, BLOCK):
            inside = first + lane < n
            x = tl.load(vector_ptr + j * n + first + lane, inside, other=0.0)
            lane_of_best = tl.min(tl.where(inside & (tl.abs(x) >= best * (1 - SIGN_TIES)), lane, BLOCK), 0)
            value = tl.where(found == 0, tl.sum(tl.where(lane == lane_of_best, x, 0.0), 0), value)
            found += (lane_of_best < BLOCK).to(tl.int32)
        tl.debug_barrier()
        if value < 0.0:
            for first in range(0, n, BLOCK):
                inside = first + lane < n
                x = tl.load(vector_ptr + j * n + first + lane, inside, other=0.0)
                tl.debug_barrier()
                tl.store(vector_ptr + j * n + first + lane, -x, inside)
            if BOTH:
                for first in range(0, other_n, BLOCK):
                    inside = first + lane < other_n
                    x = tl.load(other_ptr + j * other_n + first + lane, inside, other=0.0)
                    tl.debug_barrier()
                    tl.store(other_ptr + j * other_n + first + lane, -x, inside)


@triton.jit
def _project_kernel(
    x_ptr, a_ptr, b_ptr, scale_ptr, x_batch, x_p, x_q, p, q, k, T: tl.constexpr, PB: tl.constexpr, BQ: tl.constexpr
):  # fmt: skip
    """Compute b = (scale M)^T a. The columns are divided among the programs."""
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
def _divide(x_ptr, norm, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    for first in range(0, n, BLOCK):
        inside = first + lane < n
        x = tl.load(x_ptr + first + lane, inside, other=0.0).to(tl.float64)
        tl.debug_barrier()
        tl.store(x_ptr + first + lane, (x / norm).to(x_ptr.dtype.element_ty), inside)
    tl.debug_barrier()


@triton.jit
def _orthogonalize(b_ptr, j, q, BLOCK: tl.constexpr):
    """Subtract from vector j its projections onto the vectors before it; return its new length."""
    lane = tl.arange(0, BLOCK)
    for earlier in range(0, j):
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, q, BLOCK):
            inside = first + lane < q
            block = tl.load(b_ptr + j * q + first + lane, inside, other=0.0).to(tl.float64)
            total += block * tl.load(b_ptr + earlier * q + first + lane, inside, other=0.0).to(tl.float64)
        projection = tl.sum(total, 0)
        tl.debug_barrier()
        for first in range(0, q, BLOCK):
            inside = first + lane < q
            block = tl.load(b_ptr + j * q + first + lane, inside, other=0.0).to(tl.float64)
            block -= projection * tl.load(b_ptr + earlier * q + first + lane, inside, other=0.0).to(tl.float64)
            tl.debug_barrier()
            tl.store(b_ptr + j * q + first + lane, block.to(b_ptr.dtype.element_ty), inside)
        tl.debug_barrier()
    return tl.sqrt(_squares(b_ptr + j * q, q, BLOCK))


@triton.jit
def _finish_kernel(
    a_ptr, b_ptr, s_ptr, sigma_ptr, scale_ptr, p, q, k, SIGN: tl.constexpr, SIGN_ON_A: tl.constexpr, T: tl.constexpr, KB: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute b_j and sigma_j from W_j = M^T a_j.

    If sigma_j is small, W_j contains rounding errors of the size of sigma_1, and is not orthogonal
    to the vectors before it. It is then orthogonalized. If little of it remains, it is replaced by
    the first unit vector with a large enough component orthogonal to the vectors before it.
    """
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
            is_done = ((sigma > 0.5 * largest) & (sigma > tiny)).to(tl.int32)
            if sigma > tiny:
                _divide(b_ptr + j * wide_q, sigma, q, BLOCK)
            unit_vector = -1
            while is_done == 0:
                if unit_vector >= 0:
                    for first in range(0, q, BLOCK):
                        tl.store(b_ptr + j * wide_q + first + lane, (first + lane == unit_vector).to(T), first + lane < q)
                    tl.debug_barrier()
                remaining_norm = tl.full([], 1.0, tl.float64)
                for _ in range(0, 3):
                    norm = _orthogonalize(b_ptr, j, wide_q, BLOCK)
                    remaining_norm *= norm
                    _divide(b_ptr + j * wide_q, tl.where(norm > 0.0, norm, 1.0), q, BLOCK)
                threshold = tl.where(unit_vector < 0, 1e-4, 0.5 / tl.sqrt(tl.cast(q, tl.float64)))
                unit_vector += 1
                is_done = ((remaining_norm > threshold) | (unit_vector >= q)).to(tl.int32)
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
