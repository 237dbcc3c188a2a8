"""The SVD-KD loss in plain PyTorch: decomposition, alignment and correlation.

S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular Value
Decomposition. ECCV 2018.
https://arxiv.org/abs/1807.06819
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from .rbf_correlation import rbf_correlation_loss
from .truncated_svd import align_singular_vectors, truncated_svd


def svd_kd_loss(
    student: Sequence[Tensor],  # [B, C_i, *spatial_i] each
    teacher: Sequence[Tensor],  # [B, C_i, *spatial_i] each
    k: int = 1,
    *,
    align: str = "teacher",
    loss: str = "authors",
    extra: int = 1,
    beta: float = 8.0,
) -> Tensor:
    """Compute the SVD-KD loss with the exact gradient, for feature maps that are not all zeros.

    k is reduced if feature maps have fewer vectors. See :func:`kdkernels.nn.svd_kd_loss`.
    """
    aligned, counts = [], []
    for s, t in zip(student, teacher, strict=True):
        x, y = (maps.flatten(2).transpose(1, 2) for maps in (s, t.detach()))  # [B, positions, C]
        counts.append(min(k, *x.shape[1:], y.shape[1]))
        _, _, v = truncated_svd(x, min(counts[-1] + extra, *x.shape[1:]))
        _, sigma, w = truncated_svd(y, counts[-1])
        aligned.append(align_singular_vectors(v, w, F.normalize(sigma, dim=1), flip=align))
    total: float | Tensor = 0.0
    for i, pair in enumerate(pairwise(aligned)):
        n = min(counts[: i + 2])
        (sx, tx), (sy, ty) = ([v[..., :n] for v in vectors] for vectors in pair)
        pair_loss = rbf_correlation_loss(sx, sy, tx, ty, beta, reduction="sum" if loss == "authors" else "batchmean")
        total = total + pair_loss * (n**0.5 / 2 if loss == "authors" else 1)
    return cast(Tensor, total)
