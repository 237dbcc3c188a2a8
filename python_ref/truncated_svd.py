"""Truncated singular value decomposition and the alignment of singular vectors, in plain PyTorch: what the fused ops are tested against.

S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular Value Decomposition. ECCV 2018.
"""

import torch
from torch import Tensor


def truncated_svd(
    x: Tensor,  # [..., M, N]
    k: int,
    *,
    sign: str | None = "max_abs",
    return_u: bool = False,
    gap_eps: float | None = None,  # of the fused derivative; this one is torch's
) -> tuple[Tensor | None, Tensor, Tensor]:  # [..., M, k], [..., k], [..., N, k]
    """The k largest singular triplets, by :func:`torch.linalg.svd` and with its derivative. See :func:`kdkernels.truncated_svd`."""
    x = x if x.dtype == torch.float64 else x.float()
    broken = ~x.isfinite().flatten(-2).all(-1)[..., None, None]
    u, s, vh = torch.linalg.svd(torch.where(broken, torch.zeros_like(x), x), full_matrices=False)
    u, s, v = u[..., :k], s[..., :k], vh.mT[..., :k]
    if sign == "max_abs" and v.numel() > 0:
        size = v.detach().abs()
        first = (size >= (1 - 1e-4) * size.amax(-2, keepdim=True)).int().argmax(-2, keepdim=True)  # of those that count as largest
        flip = torch.where(v.detach().gather(-2, first) < 0, -1.0, 1.0).to(v.dtype)
        u, v = u * flip, v * flip
    u, s, v = (t.masked_fill(b, float("nan")) for t, b in ((u, broken), (s, broken[..., 0]), (v, broken)))
    return u if return_u else None, s, v


def align_singular_vectors(
    student: Tensor,  # [..., N, K]
    teacher: Tensor,  # [..., N, k]
    weight: Tensor | None = None,  # [..., k]
    *,
    flip: str = "teacher",
) -> tuple[Tensor, Tensor]:  # [..., N, k] each
    """For each teacher vector the student's of largest |cosine|, one of the two flipped to agree. See :func:`kdkernels.align_singular_vectors`."""
    student, teacher = (t if t.dtype == torch.float64 else t.float() for t in (student, teacher))
    match, flips = match_singular_vectors(student, teacher)
    chosen = student.gather(-1, match.expand(*student.shape[:-1], match.shape[-1]))
    chosen, teacher = (chosen, teacher * flips) if flip == "teacher" else (chosen * flips, teacher)
    return (chosen, teacher) if weight is None else (chosen * weight[..., None, :], teacher * weight[..., None, :])


def match_singular_vectors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:  # [..., 1, k] each
    """The student's vector of largest |cosine| for each teacher vector, and 1 or -1, the sign of that cosine."""
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        cosine = student.mT @ teacher  # [..., K, k]
        size = cosine.abs()
        match = (size >= (1 - 1e-6) * size.amax(-2, keepdim=True)).int().argmax(-2, keepdim=True)  # the first of equals
        return match, torch.where(cosine.gather(-2, match) < 0, -1.0, 1.0).to(student.dtype)
