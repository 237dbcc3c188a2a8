"""Stages of truncated_svd, for programs that process one matrix each.

The stages are those of csrc/truncated_svd/cta/ (CTA: cooperative thread array, a block of threads).
A program keeps vectors in registers and matrices in its part of a workspace. Threads see the stores
of other threads only after a barrier. If a vector has fewer elements than the program has threads,
several threads hold the same element. A loop must therefore not store to the array that it reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .svd_sizes import TINY_SOLVE_PIVOT


@triton.jit
def tile_of(x_ptr, rows, columns, stride_p, stride_q, p, q, scale, T: tl.constexpr):
    """Load scale * M[rows, columns], with 0 outside the matrix."""
    inside = (rows < p)[:, None] & (columns < q)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_p + columns.to(tl.int64)[None, :] * stride_q, inside, other=0.0)
    return x.to(T) * scale


@triton.jit
def gram_block(
    x_ptr, stride_p, stride_q, p, q, scale, known_ptr, count, i0, j0,
    T: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Compute block (i0, j0) of the Gram matrix M M^T.

    If RESIDUAL, M is replaced by scale * M minus its projections onto `count` known vectors
    [count, p].
    """
    i, j, lane = i0 + tl.arange(0, BP), j0 + tl.arange(0, BP), tl.arange(0, BQ)
    total = tl.zeros([BP, BP], T)
    for first in range(0, q, BQ):
        c = first + lane
        left = tile_of(x_ptr, i, c, stride_p, stride_q, p, q, scale, T)
        right = tile_of(x_ptr, j, c, stride_p, stride_q, p, q, scale, T)
        if RESIDUAL:
            for v in range(0, count):
                projection = tl.zeros([BQ], T)
                for r0 in range(0, p, BP):
                    r = r0 + tl.arange(0, BP)
                    known = tl.load(known_ptr + v * p + r, r < p, other=0.0)
                    projection += tl.sum(tile_of(x_ptr, r, c, stride_p, stride_q, p, q, scale, T) * known[:, None], 0)
                left -= tl.load(known_ptr + v * p + i, i < p, other=0.0)[:, None] * projection[None, :]
                right -= tl.load(known_ptr + v * p + j, j < p, other=0.0)[:, None] * projection[None, :]
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION, out_dtype=T)
    return total


@triton.jit
def store_block(matrix_ptr, p, i0, j0, block, BP: tl.constexpr):
    """Store a block of the lower triangle, and its transpose in the upper triangle."""
    i, j = i0 + tl.arange(0, BP), j0 + tl.arange(0, BP)
    inside = (i < p)[:, None] & (j < p)[None, :]
    tl.store(matrix_ptr + i[:, None] * p + j[None, :], block, inside & (j[None, :] <= i[:, None]))
    tl.store(matrix_ptr + j[None, :] * p + i[:, None], block, inside & (j[None, :] < i[:, None]))


@triton.jit
def residual_gram(
    matrix_ptr, x_ptr, stride_p, stride_q, p, q, scale, known_ptr, count,
    T: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for i0 in range(0, p, BP):
        for j0 in range(0, i0 + 1, BP):
            block = gram_block(x_ptr, stride_p, stride_q, p, q, scale, known_ptr, count, i0, j0, T, BP, BQ, PRECISION, True)
            store_block(matrix_ptr, p, i0, j0, block, BP)
    tl.debug_barrier()


@triton.jit
def trace(matrix_ptr, p, PB: tl.constexpr):
    i = tl.arange(0, PB)
    total = tl.sum(tl.load(matrix_ptr + i * (p + 1), i < p, other=0.0).to(tl.float64), 0)
    tl.debug_barrier()  # several threads load an element if p is small; none may store before all have loaded
    return total


@triton.jit
def multiply(matrix_ptr, p, factor, T: tl.constexpr, PB: tl.constexpr, RB: tl.constexpr):
    """Compute matrix *= factor. A factor of 0 sets all entries to 0, even NaN and infinity."""
    c = tl.arange(0, PB)
    for r0 in range(0, p, RB):
        r = r0 + tl.arange(0, RB)
        block_ptr = matrix_ptr + r[:, None] * p + c[None, :]
        inside = (r < p)[:, None] & (c < p)[None, :]
        block = tl.load(block_ptr, inside, other=0.0)
        tl.store(block_ptr, tl.where(factor == 0.0, 0.0, block * factor).to(T), inside)
    tl.debug_barrier()


@triton.jit
def power_of_two(exponent):
    """Return 2^exponent as float64, if it is a normal number."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponent_of(x):
    """Return floor(log2 x) for a normal float64 > 0."""
    return (((x.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023).to(tl.int32)


@triton.jit
def unit_for(x, T: tl.constexpr):
    """Return the power of two that scales x > 0 into [1/2, 1).

    The exponent is limited to the range of T.
    """
    most: tl.constexpr = 1022 if tl.float64 == T else 126
    exponent = tl.where(x < 2.2250738585072014e-308, most, -exponent_of(x) - 1)
    return power_of_two(tl.minimum(tl.maximum(exponent, -most), most))


@triton.jit
def tridiagonalize(
    matrix_ptr, reflectors_ptr, tau_ptr, d_ptr, e_ptr, work_ptr, p, T: tl.constexpr, PB: tl.constexpr, RB: tl.constexpr
):  # fmt: skip
    """Compute the tridiagonal form G = Q T Q^T, see csrc/truncated_svd/tridiagonal.h.

    reflectors is a packed triangle; its row i is the Householder vector of row i. work has 3 PB
    elements.
    """
    negligible: tl.constexpr = 2.4308653429145085e-63 if tl.float64 == T else 2.0194839173657902e-28  # eps^4
    v_ptr, w_ptr, y_ptr = work_ptr, work_ptr + PB, work_ptr + 2 * PB
    c = tl.arange(0, PB)
    v, w = tl.zeros([PB], T), tl.zeros([PB], T)  # vectors of the pending update A -= v w^T + w v^T
    tl.store(v_ptr + c, v)
    tl.store(w_ptr + c, w)
    tl.debug_barrier()
    for step in range(0, p):
        i = p - 1 - step
        row = tl.load(matrix_ptr + i * p + c, c <= i, other=0.0)
        v_i, w_i = tl.sum(tl.where(c == i, v, 0.0), 0), tl.sum(tl.where(c == i, w, 0.0), 0)
        row -= v_i * w + w_i * v
        last = tl.sum(tl.where(c == i - 1, row, 0.0), 0)
        squares = tl.sum(tl.where(c < i - 1, row * row, 0.0), 0)
        reflect = squares > negligible
        norm = tl.sqrt(squares + last * last)
        off_diagonal = tl.where(last > 0.0, -norm, norm)
        pivot = last - off_diagonal
        tau = tl.where(reflect, 2.0 / tl.where(reflect, squares + pivot * pivot, 1.0), 0.0).to(T)
        x = tl.where(i >= 2, tl.where(c == i - 1, pivot, tl.where(c < i - 1, row, 0.0)), 0.0).to(T)
        tl.store(d_ptr + i, tl.sum(tl.where(c == i, row, 0.0), 0))
        tl.store(e_ptr + i - 1, tl.where(reflect, off_diagonal, last), i >= 1)
        tl.store(tau_ptr + i, tau)
        tl.store(reflectors_ptr + i * (i + 1) // 2 + c, x, c < i)
        for r0 in range(0, i, RB):
            r = r0 + tl.arange(0, RB)
            block_ptr = matrix_ptr + r[:, None] * p + c[None, :]
            inside = (r < i)[:, None] & (c < i)[None, :]
            block = tl.load(block_ptr, inside, other=0.0)
            block -= tl.load(v_ptr + r)[:, None] * w[None, :] + tl.load(w_ptr + r)[:, None] * v[None, :]
            block = tl.where(inside, block, 0.0)
            tl.store(block_ptr, block, inside)
            tl.store(y_ptr + r, tl.sum(block * x[None, :], 1))
        tl.debug_barrier()
        y = tl.load(y_ptr + c, c < i, other=0.0)
        half_product = tau * (tau * (0.5 * tl.sum(x * y, 0)))  # multiply in this order, because tau is large if v is small
        v, w = x, tl.where(c < i, tau * y - half_product * x, 0.0).to(T)
        tl.store(v_ptr + c, v)
        tl.store(w_ptr + c, w)
        tl.debug_barrier()
    tl.store(e_ptr + p - 1, 0.0)
    tl.debug_barrier()


@triton.jit
def apply_q(z, reflectors_ptr, tau_ptr, p, PB: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Compute Q z, or Q^T z if TRANSPOSED, for vectors z [PB, k]."""
    c = tl.arange(0, PB)
    for step in range(2, p):
        i = p + 1 - step if TRANSPOSED else step
        v = tl.load(reflectors_ptr + i * (i + 1) // 2 + c, c < i, other=0.0)
        product = tl.load(tau_ptr + i) * tl.sum(v[:, None] * z, 0)
        z -= v[:, None] * product[None, :]
    return z


@triton.jit
def largest_eigenvalues(d_ptr, e_ptr, p, T: tl.constexpr, PB: tl.constexpr, KB: tl.constexpr, PARTS: tl.constexpr, ROUNDS: tl.constexpr):
    """Compute the KB largest eigenvalues of the tridiagonal matrix, descending, as float64.

    Each round evaluates Sturm counts at PARTS points of each interval and keeps one part.
    """
    tiny: tl.constexpr = 1e-200 if tl.float64 == T else 1e-30
    eps: tl.constexpr = 2.220446049250313e-16 if tl.float64 == T else 1.1920929e-7
    c = tl.arange(0, PB)
    before = tl.load(e_ptr + c - 1, (c > 0) & (c < p), other=0.0)
    radius = tl.abs(before) + tl.abs(tl.load(e_ptr + c, c < p, other=0.0))
    bound = tl.max(tl.where(c < p, tl.load(d_ptr + c, c < p, other=0.0) + radius, 0.0), 0)  # Gershgorin
    j, part = tl.arange(0, KB), tl.arange(0, PARTS)
    low = tl.zeros([KB], T)
    high = tl.zeros([KB], T) + tl.maximum(bound, 0.0) * (1 + 4 * eps)
    for _ in range(0, ROUNDS):
        step = (high - low) * (1.0 / (PARTS + 1))
        x = low[:, None] + step[:, None] * (part + 1).to(T)[None, :]
        pivot = tl.full([KB, PARTS], 1.0, T)
        count = tl.zeros([KB, PARTS], tl.int32)
        square = tl.sum(low * 0.0, 0)
        for i in range(0, p):
            pivot = tl.load(d_ptr + i) - x - square / pivot
            pivot = tl.where(pivot == 0.0, -tiny, pivot).to(T)
            count += (pivot > 0.0).to(tl.int32)
            e = tl.load(e_ptr + i)
            square = e * e
        parts_below = tl.sum((count > j[:, None]).to(tl.int32), 1)
        high = tl.where(parts_below < PARTS, low + step * (parts_below + 1).to(T), high)
        low = low + step * parts_below.to(T)
    return 0.5 * (low.to(tl.float64) + high.to(tl.float64))


@triton.jit
def _reciprocal(pivot):
    return 1.0 / tl.where(tl.abs(pivot) < TINY_SOLVE_PIVOT, TINY_SOLVE_PIVOT, pivot)


@triton.jit
def _subtract_projections(vector, x_ptr, entry_stride, vector_stride, count, p, PB: tl.constexpr):
    c = tl.arange(0, PB)
    for index in range(0, count):
        other_vector = tl.load(x_ptr + index * vector_stride + c * entry_stride, c < p, other=0.0).to(tl.float64)
        vector -= other_vector * tl.sum(other_vector * vector, 0)
    return vector


@triton.jit
def orthonormalize(x_ptr, entry_stride, vector_stride, begin, end, p, RANDOM: tl.constexpr, PB: tl.constexpr):
    """Orthonormalize vectors [begin, end) of x, also against the vectors before them.

    entry_stride and vector_stride are the strides of x. A vector that depends linearly on the
    vectors before it is replaced: with RANDOM by a random vector, otherwise by the unit vector with
    the largest component orthogonal to them.

    Returns:
        The number of vectors that were replaced.
    """
    c = tl.arange(0, PB)
    replaced = 0
    for column in range(begin, end):
        vector = tl.load(x_ptr + column * vector_stride + c * entry_stride, c < p, other=0.0).to(tl.float64)
        longest = tl.max(tl.abs(vector), 0)  # the norm may be as large as 1e20
        vector = vector / tl.where(longest > 0.0, longest, 1.0)
        norm = tl.sqrt(tl.sum(vector * vector, 0))
        vector = vector / tl.where(norm > 0.0, norm, 1.0)
        remaining_norm = tl.where(norm > 0.0, 1.0, 0.0).to(tl.float64)
        for _ in range(0, 3):
            vector = _subtract_projections(vector, x_ptr, entry_stride, vector_stride, column, p, PB)
            norm = tl.sqrt(tl.sum(vector * vector, 0))
            remaining_norm *= norm
            vector = vector / tl.where(norm > 0.0, norm, 1.0)
        if remaining_norm < 1e-4:
            replaced += 1
            if RANDOM:
                vector = tl.where(c < p, 2.0 * tl.rand(2, column * PB + c).to(tl.float64) - 1.0, 0.0)
            else:
                orthogonal_parts = tl.where(c < p, 1.0, -1.0).to(tl.float64)
                for other in range(0, column):
                    other_vector = tl.load(x_ptr + other * vector_stride + c * entry_stride, c < p, other=0.0).to(tl.float64)
                    orthogonal_parts -= other_vector * other_vector
                vector = (c == tl.argmax(orthogonal_parts, 0)).to(tl.float64)
            for _ in range(0, 2):
                vector = _subtract_projections(vector, x_ptr, entry_stride, vector_stride, column, p, PB)
                vector = vector / tl.sqrt(tl.sum(vector * vector, 0))
        tl.debug_barrier()
        tl.store(x_ptr + column * vector_stride + c * entry_stride, vector.to(x_ptr.dtype.element_ty), c < p)
        tl.debug_barrier()
    return replaced


@triton.jit
def eigenvectors(d_ptr, e_ptr, values, rows_ptr, p, wanted, PB: tl.constexpr, KB: tl.constexpr):
    """Compute orthonormal eigenvectors of the tridiagonal matrix by inverse iteration in float64.

    See csrc/truncated_svd/spectrum.h. rows has 7 arrays [p, KB]; the eigenvectors are stored in
    array 5.

    Returns:
        The Rayleigh quotients of the eigenvectors.
    """
    c, j = tl.arange(0, PB), tl.arange(0, KB)
    size = p * KB
    inverse_ptr, first_ptr, second_ptr = rows_ptr + j, rows_ptr + size + j, rows_ptr + 2 * size + j
    multiplier_ptr, swapped_ptr, x_ptr, y_ptr = rows_ptr + 3 * size + j, rows_ptr + 4 * size + j, rows_ptr + 5 * size, rows_ptr + 6 * size
    # Shift the values slightly, by 2^-52 of the largest. At exactly a multiple eigenvalue, all
    # starting vectors would give the same solution.
    shift = values + tl.where(j > 0, 2.220446049250313e-16, 0.0) * tl.max(values, 0)
    diagonal = tl.load(d_ptr).to(tl.float64) - shift
    upper = tl.load(e_ptr).to(tl.float64) + tl.zeros([KB], tl.float64)
    for i in range(0, p - 1):
        lower, next_value = tl.load(e_ptr + i).to(tl.float64), tl.load(d_ptr + i + 1).to(tl.float64) - shift
        second_upper = tl.load(e_ptr + i + 1).to(tl.float64)  # e[p - 1] is 0
        swap = tl.abs(lower) > tl.abs(diagonal)
        inverse = _reciprocal(tl.where(swap, lower, diagonal))
        first, second = tl.where(swap, next_value, upper), tl.where(swap, second_upper, 0.0)
        multiplier = tl.where(swap, diagonal, lower) * inverse
        tl.store(inverse_ptr + i * KB, inverse)
        tl.store(first_ptr + i * KB, first)
        tl.store(second_ptr + i * KB, second)
        tl.store(multiplier_ptr + i * KB, multiplier)
        tl.store(swapped_ptr + i * KB, swap.to(tl.float64))
        diagonal = tl.where(swap, upper, next_value) - multiplier * first
        upper = tl.where(swap, 0.0, second_upper) - multiplier * second
    tl.store(inverse_ptr + (p - 1) * KB, _reciprocal(diagonal))
    start = 2.0 * tl.rand(1, c[:, None] * KB + j[None, :]).to(tl.float64) - 1.0
    tl.store(x_ptr + c[:, None] * KB + j[None, :], start, (c < p)[:, None])
    tl.debug_barrier()
    # A vector that replaces another one needs as many solves as the first one.
    left, solves = 3, 0
    while left > 0:
        current = tl.load(x_ptr + j)
        for i in range(0, p - 1):
            swap, next_value = tl.load(swapped_ptr + i * KB) != 0.0, tl.load(x_ptr + (i + 1) * KB + j)
            value = tl.where(swap, next_value, current)
            tl.store(y_ptr + i * KB + j, value)
            current = tl.where(swap, current, next_value) - tl.load(multiplier_ptr + i * KB) * value
        tl.debug_barrier()
        value_1, value_2 = current * tl.load(inverse_ptr + (p - 1) * KB), tl.zeros([KB], tl.float64)
        tl.store(x_ptr + (p - 1) * KB + j, value_1)
        for step in range(1, p):
            i = p - 1 - step
            rest = tl.load(y_ptr + i * KB + j) - tl.load(first_ptr + i * KB) * value_1 - tl.load(second_ptr + i * KB) * value_2
            value_2 = value_1
            value_1 = rest * tl.load(inverse_ptr + i * KB)
            tl.store(x_ptr + i * KB + j, value_1)
        tl.debug_barrier()
        replaced = orthonormalize(x_ptr, KB, 1, 0, wanted, p, True, PB)
        solves += 1
        left = tl.where(solves < 12, tl.where(replaced > 0, 3, left - 1), 0)
    d, e = tl.load(d_ptr + c, c < p, other=0.0).to(tl.float64), tl.load(e_ptr + c, c + 1 < p, other=0.0).to(tl.float64)
    quotients = tl.zeros([KB], tl.float64)
    for column in range(0, wanted):
        vector = tl.load(x_ptr + c * KB + column, c < p, other=0.0)
        lower = tl.load(x_ptr + (c + 1) * KB + column, c + 1 < p, other=0.0)
        quotients = tl.where(j == column, tl.sum(vector * (d * vector + 2.0 * e * lower), 0), quotients)
    return quotients


@triton.jit
def resolvent(r, d_ptr, e_ptr, values, eps, rows_ptr, p, T: tl.constexpr, PB: tl.constexpr, KB: tl.constexpr):
    """Compute Re[(lambda + i eps - T)^-1] r for vectors r [PB, KB].

    See csrc/truncated_svd/spectrum.h. rows has 8 arrays [p, KB].
    """
    c, j = tl.arange(0, PB), tl.arange(0, KB)
    size = p * KB
    inside = (c < p)[:, None]
    in_ptr, rows_ptr = rows_ptr, rows_ptr + size
    tl.store(in_ptr + c[:, None] * KB + j[None, :], r.to(tl.float64), inside)
    tl.debug_barrier()
    zero = tl.zeros([KB], tl.float64)
    d_re, d_im = values - tl.load(d_ptr).to(tl.float64), eps
    u_re, u_im = zero - tl.load(e_ptr).to(tl.float64), zero
    r_re, r_im = tl.load(in_ptr + j), zero
    for i in range(0, p - 1):
        lower = zero - tl.load(e_ptr + i).to(tl.float64)
        next_re = values - tl.load(d_ptr + i + 1).to(tl.float64)
        second_upper = zero - tl.load(e_ptr + i + 1).to(tl.float64)
        right = tl.load(in_ptr + (i + 1) * KB + j)
        swap = tl.abs(lower) > tl.abs(d_re) + tl.abs(d_im)
        p_re, p_im = tl.where(swap, lower, d_re), tl.where(swap, 0.0, d_im)
        norm = p_re * p_re + p_im * p_im
        factor = tl.where(norm > 0.0, 1.0 / tl.where(norm > 0.0, norm, 1.0), 0.0)
        i_re, i_im = p_re * factor, -p_im * factor
        f_re, f_im = tl.where(swap, next_re, u_re), tl.where(swap, eps, u_im)
        second = tl.where(swap, second_upper, 0.0)
        s_re, s_im = tl.where(swap, right, r_re), tl.where(swap, 0.0, r_im)
        o_re, o_im = tl.where(swap, d_re, lower), tl.where(swap, d_im, 0.0)
        m_re, m_im = o_re * i_re - o_im * i_im, o_re * i_im + o_im * i_re
        row_ptr = rows_ptr + i * KB + j
        tl.store(row_ptr, i_re)
        tl.store(row_ptr + size, i_im)
        tl.store(row_ptr + 2 * size, f_re)
        tl.store(row_ptr + 3 * size, f_im)
        tl.store(row_ptr + 4 * size, second)
        tl.store(row_ptr + 5 * size, s_re)
        tl.store(row_ptr + 6 * size, s_im)
        d_re, d_im = tl.where(swap, u_re, next_re) - (m_re * f_re - m_im * f_im), tl.where(swap, u_im, eps) - (m_re * f_im + m_im * f_re)
        u_re, u_im = tl.where(swap, 0.0, second_upper) - m_re * second, zero - m_im * second
        r_re, r_im = tl.where(swap, r_re, right) - (m_re * s_re - m_im * s_im), tl.where(swap, r_im, 0.0) - (m_re * s_im + m_im * s_re)
    tl.debug_barrier()
    norm = d_re * d_re + d_im * d_im
    factor = tl.where(norm > 0.0, 1.0 / tl.where(norm > 0.0, norm, 1.0), 0.0)
    x1_re, x1_im = (r_re * d_re + r_im * d_im) * factor, (r_im * d_re - r_re * d_im) * factor
    x2_re, x2_im = zero, zero
    tl.store(in_ptr + (p - 1) * KB + j, x1_re)
    for step in range(1, p):
        i = p - 1 - step
        row_ptr = rows_ptr + i * KB + j
        i_re, i_im, f_re, f_im = tl.load(row_ptr), tl.load(row_ptr + size), tl.load(row_ptr + 2 * size), tl.load(row_ptr + 3 * size)
        second = tl.load(row_ptr + 4 * size)
        t_re = tl.load(row_ptr + 5 * size) - (f_re * x1_re - f_im * x1_im) - second * x2_re
        t_im = tl.load(row_ptr + 6 * size) - (f_re * x1_im + f_im * x1_re) - second * x2_im
        x2_re, x2_im = x1_re, x1_im
        x1_re, x1_im = t_re * i_re - t_im * i_im, t_re * i_im + t_im * i_re
        tl.store(in_ptr + i * KB + j, x1_re)
    tl.debug_barrier()
    return tl.load(in_ptr + c[:, None] * KB + j[None, :], inside, other=0.0).to(T)
