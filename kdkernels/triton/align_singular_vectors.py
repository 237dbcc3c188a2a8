"""Triton kernels of align_singular_vectors: a program for each vector of the teacher forwards, for each vector of either side backwards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compile_options, compute_dtype, device_of

TIES = tl.constexpr(1e-6)  # see csrc/align_singular_vectors.h


@triton.jit
def _align_kernel(
    student_ptr, teacher_ptr, weight_ptr, out_student_ptr, out_teacher_ptr, match_ptr, flips_ptr, many, k, n,
    HAS_WEIGHT: tl.constexpr, FLIP_TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    student_ptr += task // k * many * n
    most, best, chosen = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64), many
    for task_of_vector in range(0, 2 * many):  # the largest cosine, then the first that counts as equal to it
        j = task_of_vector % many
        total = tl.zeros([BLOCK], tl.float64)
        for first in range(0, n, BLOCK):
            inside = first + lane < n
            own = tl.load(teacher_ptr + task * n + first + lane, inside, other=0.0).to(tl.float64)
            total += own * tl.load(student_ptr + tl.cast(j, tl.int64) * n + first + lane, inside, other=0.0).to(tl.float64)
        cosine = tl.sum(total, 0)
        better = (task_of_vector >= many) & (chosen == many) & (tl.abs(cosine) >= (1 - TIES) * most)
        chosen = tl.where(better, j, chosen)
        best = tl.where(better, cosine, best)
        most = tl.where((task_of_vector < many) & (tl.abs(cosine) > most), tl.abs(cosine), most)
    chosen = tl.where(chosen == many, 0, chosen)  # of NaN
    flip = tl.where(best < 0.0, -1.0, 1.0).to(out_student_ptr.dtype.element_ty)
    factor = tl.load(weight_ptr + task) if HAS_WEIGHT else flip * flip
    of_student, of_teacher = (factor, factor * flip) if FLIP_TEACHER else (factor * flip, factor)
    tl.store(match_ptr + task, chosen.to(tl.int64))
    tl.store(flips_ptr + task, flip)
    for first in range(0, n, BLOCK):
        inside = first + lane < n
        tl.store(
            out_student_ptr + task * n + first + lane,
            of_student * tl.load(student_ptr + tl.cast(chosen, tl.int64) * n + first + lane, inside, other=0.0),
            inside,
        )
        tl.store(
            out_teacher_ptr + task * n + first + lane,
            of_teacher * tl.load(teacher_ptr + task * n + first + lane, inside, other=0.0),
            inside,
        )


@triton.jit
def _align_backward_kernel(
    up_student_ptr, up_teacher_ptr, student_ptr, teacher_ptr, weight_ptr, match_ptr, flips_ptr, to_student_ptr, to_teacher_ptr, to_weight_ptr,
    many, k, n,
    HAS_UP_STUDENT: tl.constexpr, HAS_UP_TEACHER: tl.constexpr, HAS_WEIGHT: tl.constexpr, FLIP_TEACHER: tl.constexpr, WANT_STUDENT: tl.constexpr,
    WANT_TEACHER: tl.constexpr, WANT_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, own = (tl.program_id(0) // (many + k)).to(tl.int64), tl.program_id(0) % (many + k)
    lane = tl.arange(0, BLOCK)
    T: tl.constexpr = flips_ptr.dtype.element_ty
    if own < many:
        if WANT_STUDENT:
            for first in range(0, n, BLOCK):
                inside = first + lane < n
                total = tl.zeros([BLOCK], T)
                if HAS_UP_STUDENT:
                    for i in range(0, k):  # gathered, so that the order of sums is fixed
                        at = b * k + i
                        factor = tl.where(tl.load(match_ptr + at) == own, 1.0, 0.0).to(T)
                        if HAS_WEIGHT:
                            factor *= tl.load(weight_ptr + at)
                        if not FLIP_TEACHER:
                            factor *= tl.load(flips_ptr + at)
                        part = factor * tl.load(up_student_ptr + at * n + first + lane, inside, other=0.0)
                        total += tl.where(tl.load(match_ptr + at) == own, part, 0.0)
                tl.store(to_student_ptr + (b * many + own) * n + first + lane, total, inside)
    else:
        at = b * k + own - many
        flip = tl.load(flips_ptr + at)
        sign_s, sign_t = (flip * flip, flip) if FLIP_TEACHER else (flip, flip * flip)
        factor = tl.load(weight_ptr + at) if HAS_WEIGHT else flip * flip
        if WANT_TEACHER:
            for first in range(0, n, BLOCK):
                inside = first + lane < n
                up = tl.zeros([BLOCK], T)
                if HAS_UP_TEACHER:
                    up = factor * sign_t * tl.load(up_teacher_ptr + at * n + first + lane, inside, other=0.0)
                tl.store(to_teacher_ptr + at * n + first + lane, up, inside)
        if WANT_WEIGHT:
            match = tl.load(match_ptr + at)
            known = (match >= 0) & (match < many)  # the forward's are
            total = tl.zeros([BLOCK], tl.float64)
            for first in range(0, n, BLOCK):
                inside = first + lane < tl.where(known, n, 0)
                if HAS_UP_STUDENT:
                    s = tl.load(student_ptr + (b * many + match) * n + first + lane, inside, other=0.0).to(tl.float64)
                    total += (sign_s * tl.load(up_student_ptr + at * n + first + lane, inside, other=0.0)).to(tl.float64) * s
                if HAS_UP_TEACHER:
                    t = tl.load(teacher_ptr + at * n + first + lane, inside, other=0.0).to(tl.float64)
                    total += (sign_t * tl.load(up_teacher_ptr + at * n + first + lane, inside, other=0.0)).to(tl.float64) * t
            tl.store(to_weight_ptr + at, tl.where(known, tl.sum(total, 0), float("nan")).to(T))


def block_size(n: int) -> int:
    return min(1024, max(128, triton.next_power_of_2(n)))


def _rows(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[..., n, k] as contiguous [B, k, n]."""
    return None if t is None else t.to(dtype).mT.contiguous().view(-1, t.shape[-1], t.shape[-2])


def align_singular_vectors(student: Tensor, teacher: Tensor, weight: Tensor | None, flip_teacher: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Implements kdkernels::align_singular_vectors_triton."""
    dtype = compute_dtype(student, teacher)
    (n, k), many, batch = teacher.shape[-2:], student.shape[-1], teacher.shape[:-2]
    s, t, w = _rows(student, dtype), _rows(teacher, dtype), None if weight is None else weight.to(dtype).contiguous()
    out_s, out_t = (torch.empty((*batch, k, n), dtype=dtype, device=teacher.device) for _ in range(2))
    match = torch.empty((*batch, k), dtype=torch.int64, device=teacher.device)
    flips = torch.empty((*batch, k), dtype=dtype, device=teacher.device)
    if match.numel() > 0:
        with device_of(teacher):
            _align_kernel[(match.numel(),)](
                s, t, t if w is None else w, out_s, out_t, match, flips, many, k, n, HAS_WEIGHT=w is not None, FLIP_TEACHER=flip_teacher,
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
    (n, k), many, batch = teacher.shape[-2:], student.shape[-1], teacher.shape[:-2]
    up_s, up_t, s, t = (_rows(x, dtype) for x in (grad_student, grad_teacher, student, teacher))
    w = None if weight is None else weight.to(dtype).contiguous()
    match, flips = match.contiguous(), flips.contiguous()
    results = [torch.empty(size if want else 0, dtype=dtype, device=teacher.device)
               for size, want in zip(((*batch, many, n), (*batch, k, n), (*batch, k)), wanted, strict=True)]  # fmt: skip
    if match.numel() > 0:
        with device_of(teacher):
            _align_backward_kernel[(match.numel() // k * (many + k),)](
                s if up_s is None else up_s, s if up_t is None else up_t, s, t, s if w is None else w, match, flips, *results, many, k, n,
                HAS_UP_STUDENT=up_s is not None, HAS_UP_TEACHER=up_t is not None, HAS_WEIGHT=w is not None, FLIP_TEACHER=flip_teacher,
                WANT_STUDENT=wanted[0], WANT_TEACHER=wanted[1], WANT_WEIGHT=wanted[2], BLOCK=block_size(n), **compile_options(4),
            )  # fmt: skip
    to_s, to_t, to_w = results
    return (
        torch.empty_like(student).copy_(to_s.mT) if wanted[0] else student.new_empty(0),
        torch.empty_like(teacher).copy_(to_t.mT) if wanted[1] else student.new_empty(0),
        torch.empty_like(weight).copy_(to_w) if wanted[2] else student.new_empty(0),
    )
