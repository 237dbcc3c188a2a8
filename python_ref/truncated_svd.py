"""Truncated singular value decomposition and alignment of singular vectors in plain PyTorch.

The fused ops are tested against these definitions.

S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular Value
Decomposition. ECCV 2018.
"""

import torch
from torch import Tensor


def truncated_svd(
    x: Tensor,  # [..., M, N]
    k: int,
    *,
    sign: str | None = "max_abs",
    return_u: bool = False,
    gap_eps: float | None = None,  # ignored: an option of the fused derivative
) -> tuple[Tensor | None, Tensor, Tensor]:  # [..., M, k], [..., k], [..., N, k]
    """Compute the k largest singular triplets by :func:`torch.linalg.svd`, with its derivative.

    See :func:`kdkernels.truncated_svd`.
    """
    x = x if x.dtype == torch.float64 else x.float()
    not_finite = ~x.isfinite().flatten(-2).all(-1)[..., None, None]
    u, s, vh = torch.linalg.svd(torch.where(not_finite, torch.zeros_like(x), x), full_matrices=False)
    u, s, v = u[..., :k], s[..., :k], vh.mT[..., :k]
    if sign == "max_abs" and v.numel() > 0:
        magnitude = v.detach().abs()
        first = (
            (magnitude >= (1 - 1e-4) * magnitude.amax(-2, keepdim=True)).int().argmax(-2, keepdim=True)
        )  # the first of those that count as largest
        flip = torch.where(v.detach().gather(-2, first) < 0, -1.0, 1.0).to(v.dtype)
        u, v = u * flip, v * flip
    u, s, v = (t.masked_fill(mask, float("nan")) for t, mask in ((u, not_finite), (s, not_finite[..., 0]), (v, not_finite)))
    return u if return_u else None, s, v


def align_singular_vectors(
    student: Tensor,  # [..., N, K]
    teacher: Tensor,  # [..., N, k]
    weight: Tensor | None = None,  # [..., k]
    *,
    flip: str = "teacher",
) -> tuple[Tensor, Tensor]:  # [..., N, k] each
    """Select the student vector of largest |cosine| for each teacher vector, and flip one of them.

    See :func:`kdkernels.align_singular_vectors`.
    """
    student, teacher = (t if t.dtype == torch.float64 else t.float() for t in (student, teacher))
    match, flips = match_singular_vectors(student, teacher)
    chosen = student.gather(-1, match.expand(*student.shape[:-1], match.shape[-1]))
    chosen, teacher = (chosen, teacher * flips) if flip == "teacher" else (chosen * flips, teacher)
    return (chosen, teacher) if weight is None else (chosen * weight[..., None, :], teacher * weight[..., None, :])


def match_singular_vectors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:  # [..., 1, k] each
    """Return the index of the student vector of largest |cosine| for each teacher vector.

    The second result is the sign of that cosine, 1 or -1.
    """
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        cosine = student.mT @ teacher  # [..., K, k]
        magnitude = cosine.abs()
        match = (
            (magnitude >= (1 - 1e-6) * magnitude.amax(-2, keepdim=True)).int().argmax(-2, keepdim=True)
        )  # the first of those that count as largest
        return match, torch.where(cosine.gather(-2, match) < 0, -1.0, 1.0).to(student.dtype)
