"""The ops of truncated_svd in plain PyTorch, for devices without kernels: same schemas, same results, no host round trip."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import NAMES
from ..reference import align_singular_vectors as align_reference
from ..reference import truncated_svd as svd_reference
from ..reference.truncated_svd import match_singular_vectors


def truncated_svd(x: Tensor, k: int, sign: int, return_u: bool, gap_eps: float, save_state: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        # In units in which no square leaves its range.
        dtype = compute_dtype(x)
        first, second = _units(x.to(dtype))
        u, s, v = svd_reference(x.to(dtype) * first * second, k, sign=NAMES["sign"][sign], return_u=True)
        s = s / second[..., 0] / first[..., 0]
    m, n = x.shape[-2:]
    u = u.mT.contiguous().mT if return_u or m < n else u.new_empty(0)
    return u, s.contiguous(), v.mT.contiguous().mT, s.new_empty(0)


def _units(x: Tensor) -> tuple[Tensor, Tensor]:
    """The power of two that brings the largest number of each matrix near 1, as two factors [..., 1, 1], for it may be out of range itself."""
    largest = x.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest.isfinite() & (largest > 0), largest, torch.ones_like(largest))
    first = torch.ldexp(torch.ones_like(largest), -(torch.frexp(largest).exponent // 2))
    return first, torch.ldexp(torch.ones_like(largest), -torch.frexp(largest * first).exponent)


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
    """The formula of csrc/truncated_svd/derivative.h, in float64 if the device has it, with all
    eigenvectors of the smaller Gram matrix for its solve."""
    with torch.no_grad():
        return _gradient(grad_u, grad_s, grad_v, x, s, v, u if u.dim() == x.dim() else None, gap_eps)


def _gradient(grad_u, grad_s, grad_v, x: Tensor, s: Tensor, v: Tensor, u: Tensor | None, gap_eps: float) -> Tensor:
    broken = ~x.isfinite().flatten(-2).all(-1)[..., None, None]
    tall = x.shape[-2] >= x.shape[-1]
    wide = torch.float64 if x.device.type != "mps" else torch.float32  # Apple's GPUs have no float64
    m = x.to(wide).masked_fill(broken, 0)
    m = m.mT if tall else m  # [..., p, q]
    a = (v if tall else u).to(wide).nan_to_num()
    ga, gb = (grad_v, grad_u) if tall else (grad_u, grad_v)
    if u is None or gb is None or gb.dim() != x.dim():
        gb = None
    # Units in which no square leaves its range. Singular values are measured in them: s may have rounded to a few digits, or to an infinity.
    units = _units(m)
    m = m * units[0] * units[1]
    sigma = (m.mT @ a).norm(dim=-2, keepdim=True)  # [..., 1, k]
    null = (1e-6 if s.dtype == torch.float32 else 1e-13) * sigma[..., :1]
    inverse = torch.where(sigma > null, 1 / sigma, torch.zeros_like(sigma))
    mg = m @ gb.to(wide) if gb is not None else torch.zeros_like(a)
    g = mg * inverse + (ga.to(wide) if ga is not None and ga.dim() == x.dim() else 0)
    mu, q = torch.linalg.eigh(m @ m.mT)
    lam = sigma**2
    first = sigma[..., :1]
    floor = torch.maximum(sigma, gap_eps * first)  # [..., 1, k]

    def lorentzian(gap, own):
        eps = gap_eps * first * own
        norm = gap**2 + eps**2
        return torch.where(norm > 0, gap / norm, torch.zeros_like(gap))

    def project(t):
        return t - a @ (a.mT @ t)

    z = project(q @ (lorentzian(lam - mu.unsqueeze(-1), floor) * (q.mT @ project(g))))
    turn = lorentzian(lam - lam.mT, torch.maximum(floor, floor.mT))  # [i, j]: of lambda_j - lambda_i

    def differences(x, cotangent):
        """<x_i, g_j> - <x_j, g_i>; that of a function of the span is rounding, which a small gap would blow up."""
        c = x.mT @ cotangent
        size = cotangent.norm(dim=-2, keepdim=True)
        noise = (8 * torch.finfo(s.dtype).eps * torch.maximum(size, size.mT)).clamp_min(torch.finfo(c.dtype).tiny)
        return torch.nn.functional.softshrink((c - c.mT) / noise, 1.0) * noise

    if ga is not None and ga.dim() == x.dim():
        z = z + a @ (0.5 * differences(a, ga.to(wide)) * turn)
    w = m.mT @ a
    y = m.mT @ z
    if gb is not None:
        b = (u if tall else v).to(wide).nan_to_num()
        y = y + (gb.to(wide) - b @ (b.mT @ gb.to(wide))) * inverse + b @ (sigma.mT * differences(b, gb.to(wide)) * turn).mT
    gradient = (z @ w.mT + a @ y.mT) * units[0] * units[1]
    if grad_s is not None:  # the derivative of values knows no unit
        gradient = gradient + a @ (grad_s.to(wide).unsqueeze(-2) * inverse * w).mT
    if x.dtype in (torch.float32, torch.float64):  # held at the largest number; half types say with an infinity that they have none
        gradient = gradient.clamp(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)
    gradient = (gradient.mT if tall else gradient).masked_fill(broken, float("nan"))
    unused = broken  # a matrix that holds no numbers was left out of the loss where nothing of its triplets was used
    for g, rank in ((grad_u, x.dim()), (grad_s, x.dim() - 1), (grad_v, x.dim())):
        if g is not None and g.dim() == rank:
            unused = unused & (g == 0).flatten(x.dim() - 2).all(-1)[..., None, None]
    gradient = gradient.masked_fill(unused, 0).to(x.dtype)
    return torch.empty_like(x).copy_(gradient)


def align_singular_vectors(student: Tensor, teacher: Tensor, weight: Tensor | None, flip_teacher: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        dtype = compute_dtype(student, teacher)
        s, t = student.to(dtype), teacher.to(dtype)
        outputs = align_reference(s, t, None if weight is None else weight.to(dtype), flip="teacher" if flip_teacher else "student")
        match, flips = match_singular_vectors(s, t)
    return *(t.mT.contiguous().mT for t in outputs), match.squeeze(-2), flips.squeeze(-2)


def align_singular_vectors_backward(grad_student, grad_teacher, student, teacher, weight, match, flips, flip_teacher, wanted):
    with torch.no_grad():
        dtype = flips.dtype
        to_student, to_teacher = (None if g is None else g.to(dtype) for g in (grad_student, grad_teacher))
        index = match.unsqueeze(-2).expand(*teacher.shape[:-2], teacher.shape[-2], -1)
        sign_s, sign_t = (1.0, flips.unsqueeze(-2)) if flip_teacher else (flips.unsqueeze(-2), 1.0)
        factor = 1.0 if weight is None else weight.to(dtype).unsqueeze(-2)
        results = [student.new_empty(0)] * 3
        if wanted[0]:
            full = torch.zeros(student.shape, dtype=dtype, device=student.device)
            if to_student is not None:
                full.scatter_add_(-1, index, to_student * sign_s * factor)
            results[0] = torch.empty_like(student).copy_(full)
        if wanted[1]:
            results[1] = torch.zeros_like(teacher) if to_teacher is None else torch.empty_like(teacher).copy_(to_teacher * sign_t * factor)
        if wanted[2] and weight is not None:
            total = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            if to_student is not None:
                total += (to_student * student.to(dtype).gather(-1, index) * sign_s).sum(-2)
            if to_teacher is not None:
                total += (to_teacher * teacher.to(dtype) * sign_t).sum(-2)
            results[2] = torch.empty_like(weight).copy_(total)
    return tuple(results)
