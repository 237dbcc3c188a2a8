"""Triton kernels of align_singular_vectors.

The forward kernel has one program for each teacher vector, the backward kernel one for each vector
of the student and of the teacher.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import compute_dtype
from .launch import compile_options, device_of

TIES = tl.constexpr(1e-6)  # kTies in csrc/align_singular_vectors/problem.h


@triton.jit
def _align_kernel(
    student_ptr, teacher_ptr, weight_ptr, out_student_ptr, out_teacher_ptr, match_ptr, flips_ptr, student_count, k, n,
    HAS_WEIGHT: tl.constexpr, FLIP_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    student_ptr += task // k * student_count * n
    largest, cosine_of_match, chosen = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), student_count
    for step in range(0, 2 * student_count):  # find the largest |cosine|, then the first that counts as equal to it
        j = step % student_count
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, n, BLOCK):
            inside = first + lane < n
            teacher_block = tl.load(teacher_ptr + task * n + first + lane, inside, other=0.0).to(tl.float64)
            total += teacher_block * tl.load(student_ptr + tl.cast(j, tl.int64) * n + first + lane, inside, other=0.0).to(tl.float64)
        cosine = tl.sum(total, 0)
        is_match = (step >= student_count) & (chosen == student_count) & (tl.abs(cosine) >= largest * (1 - TIES))
        chosen = tl.where(is_match, j, chosen)
        cosine_of_match = tl.where(is_match, cosine, cosine_of_match)
        largest = tl.where((step < student_count) & (tl.abs(cosine) > largest), tl.abs(cosine), largest)
    chosen = tl.where(chosen == student_count, 0, chosen)  # if the cosines are NaN
    flip = tl.where(cosine_of_match < 0.0, -1.0, 1.0).to(out_student_ptr.dtype.element_ty)
    factor = tl.load(weight_ptr + task) if HAS_WEIGHT else flip * flip
    student_factor, teacher_factor = (factor, factor * flip) if FLIP_TEACHER else (factor * flip, factor)
    tl.store(match_ptr + task, chosen.to(tl.int64))
    tl.store(flips_ptr + task, flip)
    for first in range(0, n, BLOCK):
        inside = first + lane < n
        tl.store(
            out_student_ptr + task * n + first + lane,
            student_factor * tl.load(student_ptr + tl.cast(chosen, tl.int64) * n + first + lane, inside, other=0.0),
            inside,
        )
        tl.store(
            out_teacher_ptr + task * n + first + lane,
            teacher_factor * tl.load(teacher_ptr + task * n + first + lane, inside, other=0.0),
            inside,
        )


@triton.jit
def _align_backward_kernel(
    upstream_student_ptr, upstream_teacher_ptr, student_ptr, teacher_ptr, weight_ptr, match_ptr, flips_ptr,
    grad_student_ptr, grad_teacher_ptr, grad_weight_ptr,
    student_count, k, n,
    HAS_UPSTREAM_STUDENT: tl.constexpr, HAS_UPSTREAM_TEACHER: tl.constexpr, HAS_WEIGHT: tl.constexpr, FLIP_TEACHER: tl.constexpr,
    WANT_STUDENT: tl.constexpr, WANT_TEACHER: tl.constexpr, WANT_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, vector = (tl.program_id(0) // (student_count + k)).to(tl.int64), tl.program_id(0) % (student_count + k)
    lane = tl.arange(0, BLOCK)
    T: tl.constexpr = flips_ptr.dtype.element_ty
    if vector < student_count:
        if WANT_STUDENT:
            for first in range(0, n, BLOCK):
                inside = first + lane < n
                total = tl.zeros([BLOCK], T)
                if HAS_UPSTREAM_STUDENT:
                    for i in range(0, k):  # gather instead of scatter, so that the order of the sum is fixed
                        pair = b * k + i
                        factor = tl.where(tl.load(match_ptr + pair) == vector, 1.0, 0.0).to(T)
                        if HAS_WEIGHT:
                            factor *= tl.load(weight_ptr + pair)
                        if not FLIP_TEACHER:
                            factor *= tl.load(flips_ptr + pair)
                        part = factor * tl.load(upstream_student_ptr + pair * n + first + lane, inside, other=0.0)
                        total += tl.where(tl.load(match_ptr + pair) == vector, part, 0.0)
                tl.store(grad_student_ptr + (b * student_count + vector) * n + first + lane, total, inside)
    else:
        pair = b * k + vector - student_count
        flip = tl.load(flips_ptr + pair)
        sign_s, sign_t = (flip * flip, flip) if FLIP_TEACHER else (flip, flip * flip)
        factor = tl.load(weight_ptr + pair) if HAS_WEIGHT else flip * flip
        if WANT_TEACHER:
            for first in range(0, n, BLOCK):
                inside = first + lane < n
                gradient = tl.zeros([BLOCK], T)
                if HAS_UPSTREAM_TEACHER:
                    gradient = factor * sign_t * tl.load(upstream_teacher_ptr + pair * n + first + lane, inside, other=0.0)
                tl.store(grad_teacher_ptr + pair * n + first + lane, gradient, inside)
        if WANT_WEIGHT:
            match = tl.load(match_ptr + pair)
            in_range = (match >= 0) & (match < student_count)  # true for the indices that the forward pass returns
            total = tl.zeros([BLOCK], tl.float64)
            for first in range(0, n, BLOCK):
                inside = first + lane < tl.where(in_range, n, 0)
                if HAS_UPSTREAM_STUDENT:
                    s = tl.load(student_ptr + (b * student_count + match) * n + first + lane, inside, other=0.0).to(tl.float64)
                    total += (sign_s * tl.load(upstream_student_ptr + pair * n + first + lane, inside, other=0.0)).to(tl.float64) * s
                if HAS_UPSTREAM_TEACHER:
                    t = tl.load(teacher_ptr + pair * n + first + lane, inside, other=0.0).to(tl.float64)
                    total += (sign_t * tl.load(upstream_teacher_ptr + pair * n + first + lane, inside, other=0.0)).to(tl.float64) * t
            tl.store(grad_weight_ptr + pair, tl.where(in_range, tl.sum(total, 0), float("nan")).to(T))


def block_size(n: int) -> int:
    return min(1024, max(128, triton.next_power_of_2(n)))


def _rows(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert [..., n, k] to contiguous [B, k, n]."""
    return None if t is None else t.to(dtype).mT.contiguous().view(-1, t.shape[-1], t.shape[-2])


def align_singular_vectors(student: Tensor, teacher: Tensor, weight: Tensor | None, flip_teacher: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements kdkernels::align_singular_vectors_triton."""
    dtype = compute_dtype(student, teacher)
    (n, k), student_count, batch = teacher.shape[-2:], student.shape[-1], teacher.shape[:-2]
    s, t, w = _rows(student, dtype), _rows(teacher, dtype), None if weight is None else weight.to(dtype).contiguous()
    out_s, out_t = (torch.empty((*batch, k, n), dtype=dtype, device=teacher.device) for _ in range(2))
    match = torch.empty((*batch, k), dtype=torch.int64, device=teacher.device)
    flips = torch.empty((*batch, k), dtype=dtype, device=teacher.device)
    if match.numel() > 0:
        with device_of(teacher):
            _align_kernel[(match.numel(),)](
                s, t, t if w is None else w, out_s, out_t, match, flips, student_count, k, n, HAS_WEIGHT=w is not None, FLIP_TEACHER=flip_teacher,
                BLOCK=block_size(n), **compile_options(4),
            )  # fmt: skip
    return out_s.mT, out_t.mT, match, flips


def align_singular_vectors_backward(
    grad_student: Tensor | None,
    grad_teacher: Tensor | None,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    match: Tensor,
    flips: Tensor,
    flip_teacher: bool,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements kdkernels::align_singular_vectors_backward_triton."""
    dtype = flips.dtype
    (n, k), student_count, batch = teacher.shape[-2:], student.shape[-1], teacher.shape[:-2]
    upstream_s, upstream_t, s, t = (_rows(x, dtype) for x in (grad_student, grad_teacher, student, teacher))
    w = None if weight is None else weight.to(dtype).contiguous()
    match, flips = match.contiguous(), flips.contiguous()
    results = [torch.empty(size if want else 0, dtype=dtype, device=teacher.device)
               for size, want in zip(((*batch, student_count, n), (*batch, k, n), (*batch, k)), wanted, strict=True)]  # fmt: skip
    if match.numel() > 0:
        with device_of(teacher):
            _align_backward_kernel[(match.numel() // k * (student_count + k),)](
                s if upstream_s is None else upstream_s, s if upstream_t is None else upstream_t, s, t, s if w is None else w, match, flips,
                *results, student_count, k, n,
                HAS_UPSTREAM_STUDENT=upstream_s is not None, HAS_UPSTREAM_TEACHER=upstream_t is not None, HAS_WEIGHT=w is not None,
                FLIP_TEACHER=flip_teacher,
                WANT_STUDENT=wanted[0], WANT_TEACHER=wanted[1], WANT_WEIGHT=wanted[2], BLOCK=block_size(n), **compile_options(4),
            )  # fmt: skip
    grad_s, grad_t, grad_w = results
    return (
        torch.empty_like(student).copy_(grad_s.mT) if wanted[0] else student.new_empty(0),
        torch.empty_like(teacher).copy_(grad_t.mT) if wanted[1] else student.new_empty(0),
        torch.empty_like(weight).copy_(grad_w) if wanted[2] and weight is not None else student.new_empty(0),
    )
