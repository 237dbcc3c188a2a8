"""The ops of truncated_svd in plain PyTorch, for devices without kernels.

Schemas and results are those of the other implementations. No tensor is read back to the host.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import NAMES
from ..reference import align_singular_vectors as align_reference
from ..reference import truncated_svd as svd_reference
from ..reference.truncated_svd import match_singular_vectors


def truncated_svd(x: Tensor, k: int, sign: int, return_u: bool, gap_eps: float, save_state: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        # Scale x so that no square overflows or underflows.
        dtype = compute_dtype(x)
        scale_a, scale_b = _scale_factors(x.to(dtype))
        u, s, v = svd_reference(x.to(dtype) * scale_a * scale_b, k, sign=NAMES["sign"][sign], return_u=True)
        s = s / scale_b[..., 0] / scale_a[..., 0]
    m, n = x.shape[-2:]
    u = u.mT.contiguous().mT if return_u or m < n else u.new_empty(0)
    return u, s.contiguous(), v.mT.contiguous().mT, s.new_empty(0)


def _scale_factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the power of two that scales the largest entry of each matrix to about 1.

    It is returned as two factors [..., 1, 1], because the power itself may be out of range.
    """
    largest = x.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest.isfinite() & (largest > 0), largest, torch.ones_like(largest))
    scale_a = torch.ldexp(torch.ones_like(largest), -(torch.frexp(largest).exponent // 2))
    return scale_a, torch.ldexp(torch.ones_like(largest), -torch.frexp(largest * scale_a).exponent)


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
    """Compute the formula of csrc/truncated_svd/derivative.h, in float64 if the device supports it.

    The linear solve uses all eigenvectors of the smaller Gram matrix.
    """
    with torch.no_grad():
        return _gradient(grad_u, grad_s, grad_v, x, s, v, u if u.dim() == x.dim() else None, gap_eps)


def _gradient(
    grad_u: Tensor | None, grad_s: Tensor | None, grad_v: Tensor | None, x: Tensor, s: Tensor, v: Tensor, u: Tensor | None, gap_eps: float
) -> Tensor:
    broken = ~x.isfinite().flatten(-2).all(-1)[..., None, None]
    tall = x.shape[-2] >= x.shape[-1]
    solve_dtype = torch.float64 if x.device.type != "mps" else torch.float32  # MPS devices do not support float64
    m = x.to(solve_dtype).masked_fill(broken, 0)
    m = m.mT if tall else m  # [..., p, q]
    a = cast(Tensor, v if tall else u).to(solve_dtype).nan_to_num()
    ga, gb = (grad_v, grad_u) if tall else (grad_u, grad_v)
    if u is None or gb is None or gb.dim() != x.dim():
        gb = None
    # Scale m so that no square overflows or underflows. The singular values are recomputed from the
    # scaled matrix, because s may be subnormal (inaccurate) or infinite.
    scales = _scale_factors(m)
    m = m * scales[0] * scales[1]
    sigma = (m.mT @ a).norm(dim=-2, keepdim=True)  # [..., 1, k]
    null = (1e-6 if s.dtype == torch.float32 else 1e-13) * sigma[..., :1]
    inverse = torch.where(sigma > null, 1 / sigma, torch.zeros_like(sigma))
    mg = m @ gb.to(solve_dtype) if gb is not None else torch.zeros_like(a)
    g = mg * inverse + (ga.to(solve_dtype) if ga is not None and ga.dim() == x.dim() else 0)
    mu, q = torch.linalg.eigh(m @ m.mT)
    lam = sigma**2
    sigma_1 = sigma[..., :1]
    floor = torch.maximum(sigma, gap_eps * sigma_1)  # [..., 1, k]

    def lorentzian(gap, sigma_floor):
        eps = gap_eps * sigma_1 * sigma_floor
        norm = gap**2 + eps**2
        return torch.where(norm > 0, gap / norm, torch.zeros_like(gap))

    def project(t):
        return t - a @ (a.mT @ t)

    z = project(q @ (lorentzian(lam - mu.unsqueeze(-1), floor) * (q.mT @ project(g))))
    inverse_gaps = lorentzian(lam - lam.mT, torch.maximum(floor, floor.mT))  # [i, j]: function of lambda_j - lambda_i

    def differences(x, cotangent):
        """Return <x_i, g_j> - <x_j, g_i>, minus rounding errors.

        For a function of the span the exact difference is 0. A small gap would amplify rounding
        errors.
        """
        c = x.mT @ cotangent
        norms = cotangent.norm(dim=-2, keepdim=True)
        threshold = (8 * torch.finfo(s.dtype).eps * torch.maximum(norms, norms.mT)).clamp_min(torch.finfo(c.dtype).tiny)
        return torch.nn.functional.softshrink((c - c.mT) / threshold, 1.0) * threshold

    if ga is not None and ga.dim() == x.dim():
        z = z + a @ (0.5 * differences(a, ga.to(solve_dtype)) * inverse_gaps)
    w = m.mT @ a
    y = m.mT @ z
    if gb is not None:
        b = cast(Tensor, u if tall else v).to(solve_dtype).nan_to_num()
        y = (
            y
            + (gb.to(solve_dtype) - b @ (b.mT @ gb.to(solve_dtype))) * inverse
            + b @ (sigma.mT * differences(b, gb.to(solve_dtype)) * inverse_gaps).mT
        )
    gradient = (z @ w.mT + a @ y.mT) * scales[0] * scales[1]
    if grad_s is not None:  # the gradient of s does not depend on the scale
        gradient = gradient + a @ (grad_s.to(solve_dtype).unsqueeze(-2) * inverse * w).mT
    if x.dtype in (torch.float32, torch.float64):  # clamped to finite numbers; half precision may overflow to infinity
        gradient = gradient.clamp(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)
    gradient = (gradient.mT if tall else gradient).masked_fill(broken, float("nan"))
    unused = broken  # a non-finite matrix gets gradient 0 if all upstream gradients of its triplets are 0
    for upstream, rank in ((grad_u, x.dim()), (grad_s, x.dim() - 1), (grad_v, x.dim())):
        if upstream is not None and upstream.dim() == rank:
            unused = unused & (upstream == 0).flatten(x.dim() - 2).all(-1)[..., None, None]
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
        upstream_student, upstream_teacher = (None if g is None else g.to(dtype) for g in (grad_student, grad_teacher))
        index = match.unsqueeze(-2).expand(*teacher.shape[:-2], teacher.shape[-2], -1)
        sign_s, sign_t = (1.0, flips.unsqueeze(-2)) if flip_teacher else (flips.unsqueeze(-2), 1.0)
        weight_factor = 1.0 if weight is None else weight.to(dtype).unsqueeze(-2)
        results = [student.new_empty(0)] * 3
        if wanted[0]:
            grad = torch.zeros(student.shape, dtype=dtype, device=student.device)
            if upstream_student is not None:
                grad.scatter_add_(-1, index, upstream_student * sign_s * weight_factor)
            results[0] = torch.empty_like(student).copy_(grad)
        if wanted[1]:
            results[1] = (
                torch.zeros_like(teacher) if upstream_teacher is None else torch.empty_like(teacher).copy_(upstream_teacher * sign_t * weight_factor)
            )
        if wanted[2] and weight is not None:
            grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            if upstream_student is not None:
                grad_weight += (upstream_student * student.to(dtype).gather(-1, index) * sign_s).sum(-2)
            if upstream_teacher is not None:
                grad_weight += (upstream_teacher * teacher.to(dtype) * sign_t).sum(-2)
            results[2] = torch.empty_like(weight).copy_(grad_weight)
    return tuple(results)
