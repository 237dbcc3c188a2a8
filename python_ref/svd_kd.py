"""The loss of SVD-KD in plain PyTorch: decomposition, alignment and correlation from this package's definitions, one after another.

S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular Value Decomposition. ECCV 2018.
https://arxiv.org/abs/1807.06819
"""

from collections.abc import Sequence
from itertools import pairwise

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
    """With the exact gradient; for maps that are not all zeros; k is cut to what the maps have. See :func:`kdkernels.nn.svd_kd_loss`."""
    sides, counts = [], []
    for s, t in zip(student, teacher, strict=True):
        x, y = (m.flatten(2).transpose(1, 2) for m in (s, t.detach()))  # [B, places, C]
        counts.append(min(k, *x.shape[1:], y.shape[1]))
        _, _, v = truncated_svd(x, min(counts[-1] + extra, *x.shape[1:]))
        _, sigma, w = truncated_svd(y, counts[-1])
        sides.append(align_singular_vectors(v, w, F.normalize(sigma, dim=1), flip=align))
    total = 0.0
    for i, pair in enumerate(pairwise(sides)):
        n = min(counts[: i + 2])
        (sx, tx), (sy, ty) = ([v[..., :n] for v in side] for side in pair)
        one = rbf_correlation_loss(sx, sy, tx, ty, beta, reduction="sum" if loss == "authors" else "batchmean")
        total = total + one * (n**0.5 / 2 if loss == "authors" else 1)
    return total
