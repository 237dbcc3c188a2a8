"""The RBF correlation of two sets of features, and the distance of a student's from a teacher's, in plain PyTorch.

S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular Value Decomposition. ECCV 2018.
https://arxiv.org/abs/1807.06819 (section 3.2, the distilled feature vectors)
"""

import torch
from torch import Tensor


def rbf_correlation(
    x: Tensor,  # [B, M, K]
    y: Tensor,  # [B, N, K]
    beta: float = 8.0,
) -> Tensor:  # [B, M, N, K]
    """exp(-(x - y)^2 / beta) of every pair, column by column. See :func:`kdkernels.rbf_correlation`."""
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
    """Squared distance of two correlations; holds [B, M, N, K] tensors. See :func:`kdkernels.rbf_correlation_loss`."""
    difference = rbf_correlation(sx, sy, beta) - rbf_correlation(tx, ty, beta)
    per_sample = difference.square().flatten(1).sum(1)
    if reduction == "none":
        return per_sample
    return per_sample.sum() / (max(len(per_sample), 1) if reduction == "batchmean" else 1)
