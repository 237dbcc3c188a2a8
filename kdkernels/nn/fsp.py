"""FSP, the flow of the solution procedure (Yim, Joo, Bae, Kim, CVPR 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_POOLING: dict[str, Literal["max", "avg"]] = {"paper": "max", "sskd": "max", "torchdistill": "max", "repdistiller": "avg"}
_POOLS: dict[str, dict[int, Callable[..., Tensor]]] = {
    "max": {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d},
    "avg": {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d},
}


def fsp_matrix(
    first: Tensor,  # [B, C1, *spatial]
    second: Tensor,  # [B, C2, *spatial]
    *,
    pooling: Literal["max", "avg"] = "max",
) -> Tensor:  # [B, C1, C2]
    r"""Inner products of the channels of two layers, as a mean over the spatial positions.

    :math:`G_{ij} = \frac{1}{hw} \sum_{s} F^1_{i,s} F^2_{j,s}` (equation 1 of the paper). If the
    spatial sizes differ, both maps are first pooled to the smaller size of each dimension: by
    maximum in the paper, by average in RepDistiller.

    Raises:
        ValueError: batch sizes or numbers of dimensions differ, or the pooling is unknown.
    """
    if pooling not in _POOLS:
        raise ValueError(f"pooling must be 'max' or 'avg', got {pooling!r}")
    if first.dim() != second.dim() or first.dim() < 3 or len(first) != len(second):
        raise ValueError(f"first and second must be features [B, C, *spatial] of one batch, got {tuple(first.shape)} and {tuple(second.shape)}")
    if first.shape[2:] != second.shape[2:]:
        sizes = [min(a, b) for a, b in zip(first.shape[2:], second.shape[2:], strict=True)]
        pool = _POOLS[pooling][len(sizes)]
        first, second = (x if list(x.shape[2:]) == sizes else pool(x, sizes) for x in (first, second))
    # At least float32, also under autocast: half precision is too inaccurate for sums over
    # thousands of spatial positions.
    dtype = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
    first, second = first.flatten(2).to(dtype), second.flatten(2).to(dtype)
    with torch.autocast(first.device.type, enabled=False):
        return (first / first.shape[2]) @ second.mT


def fsp_loss(
    student: Sequence[tuple[Tensor, Tensor]],
    teacher: Sequence[tuple[Tensor, Tensor]],
    *,
    variant: Literal["paper", "repdistiller", "sskd", "torchdistill"] = "paper",
) -> Tensor:
    r"""Distance between the FSP matrices of student and teacher. The teacher's are detached.

    With :math:`\Delta = G^T - G^S` of shape [B, C1, C2]:

    ==============  =======  =====================================================================
    ``variant``     pooling  loss
    ==============  =======  =====================================================================
    "paper"         max      :math:`\frac{1}{B} \sum_b \sum_{pairs} \|\Delta_b\|_F^2` (equation 2,
                             equal weights)
    "repdistiller"  average  sum over pairs of the mean of :math:`\Delta^2` over B, C1 and C2
    "sskd"          max      :math:`\frac{1}{B} \sum_b \sum_{pairs} \|\Delta_b\|_F^2 / 2`, divided
                             by the sum of C1 C2 over pairs (SSKD_SVD)
    "torchdistill"  max      :math:`\frac{1}{B} \sum_b \sum_{pairs} \sum_j \|\Delta_{b,:,j}\|_2`
    ==============  =======  =====================================================================

    Args:
        student, teacher: for each pair the features [B, C1, *spatial] and [B, C2, *spatial] of two
            layers.

    Raises:
        ValueError: the numbers of pairs differ, the channels of student and teacher differ, or the
            variant is unknown.
    """
    if variant not in _POOLING:
        raise ValueError(f"variant must be one of {tuple(_POOLING)}, got {variant!r}")
    if len(student) != len(teacher) or not len(student):
        raise ValueError(f"student and teacher must have the same number of pairs, at least one, got {len(student)} and {len(teacher)}")
    total: float | Tensor = 0.0
    elements = 0
    for i, pairs in enumerate(zip(student, teacher, strict=True)):
        s, t = (fsp_matrix(*pair, pooling=_POOLING[variant]) for pair in pairs)
        if s.shape != t.shape:
            raise ValueError(
                f"pair {i}: student and teacher must have the same numbers of channels, got {tuple(s.shape[1:])} and {tuple(t.shape[1:])}"
            )
        difference = t.detach() - s
        elements += s.shape[1:].numel()
        if variant == "torchdistill":
            total = total + torch.linalg.vector_norm(difference, dim=1).sum() / max(len(s), 1)
        elif variant == "repdistiller":
            total = total + difference.square().sum() / max(s.numel(), 1)
        else:
            total = total + difference.square().sum() / max(len(s), 1)
    return cast(Tensor, total / (2 * elements) if variant == "sskd" else total)
