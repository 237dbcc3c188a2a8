"""Pairwise RBF correlation of two feature sets, and the loss between two such correlations.

S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular Value
Decomposition. ECCV 2018.
https://arxiv.org/abs/1807.06819 (section 3.2, the distilled feature vectors)
"""

import torch
from torch import Tensor


def rbf_correlation(
    x: Tensor,  # [B, M, K]
    y: Tensor,  # [B, N, K]
    beta: float = 8.0,
) -> Tensor:  # [B, M, N, K]
    """Compute exp(-(x - y)^2 / beta) of each pair of elements in the same column.

    See :func:`kdkernels.rbf_correlation`.
    """
    x, y = (v if v.dtype == torch.float64 else v.float() for v in (x, y))
    return torch.exp((x[:, :, None] - y[:, None]).square() / -beta)


def rbf_correlation_loss(
    sx: Tensor,  # [B, M, K]
    sy: Tensor,  # [B, N, K]
    tx: Tensor,  # [B, M, K]
    ty: Tensor,  # [B, N, K]
    beta: float = 8.0,
    *,
    reduction: str = "sum",
) -> Tensor:
    """Compute the squared distance between two correlations, using [B, M, N, K] tensors.

    See :func:`kdkernels.rbf_correlation_loss`.
    """
    difference = rbf_correlation(sx, sy, beta) - rbf_correlation(tx, ty, beta)
    per_sample = difference.square().flatten(1).sum(1)
    if reduction == "none":
        return per_sample
    return per_sample.sum() / (max(len(per_sample), 1) if reduction == "batchmean" else 1)
