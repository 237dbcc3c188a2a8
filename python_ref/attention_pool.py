"""Attention maps and the attention transfer loss in plain PyTorch.

The fused ops are tested against these definitions.

S. Zagoruyko, N. Komodakis. Paying More Attention to Attention. ICLR 2017.
https://arxiv.org/abs/1612.03928 (section 3.1)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_pool(
    x: Tensor,  # [B, C, *spatial]
    p: float = 2.0,
    *,
    reduce: str = "mean",
    normalize: str | None = None,
    eps: float = 1e-12,
) -> Tensor:  # [B, *spatial]
    """Compute the sum, mean or maximum of |x|^p over the channels.

    The maps may then be normalised over the spatial positions, by "l2" or "softmax". See
    :func:`kdkernels.attention_pool`.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if reduce == "max":  # on a tie, the lowest channel gets the gradient
        x = x.gather(1, x.abs().argmax(1, keepdim=True))
    if p in (2, 4):
        powers = x**p
    else:  # at 0, value and gradient are 0, also for p < 1
        size = x.abs()
        powers = torch.where(size == 0, size, torch.where(size == 0, torch.ones_like(size), size) ** p)
    maps = powers.mean(1) if reduce == "mean" else powers.sum(1)
    if normalize == "l2":
        return F.normalize(maps.flatten(1), eps=eps).view_as(maps)
    return maps.flatten(1).softmax(1).view_as(maps) if normalize == "softmax" else maps


def attention_transfer_loss(
    student: Tensor,  # [B, C, *spatial]
    teacher: Tensor,  # [B, D, *spatial], with any spatial extents
    p: float = 2.0,
    *,
    variant: str = "authors",
    reduce: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """Compute the distance between the normalised maps of student and teacher.

    It is the mean square of the difference, or the mean over the samples of its norm. See
    :func:`kdkernels.attention_transfer_loss`.
    """
    if student.shape[2:] != teacher.shape[2:]:
        extents = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = average_to(student, extents), average_to(teacher, extents)
    maps = [attention_pool(x, p, reduce=reduce, normalize="l2", eps=eps).flatten(1) for x in (student, teacher)]
    difference = maps[0] - maps[1]
    per_sample = difference.square().mean(1) if variant == "authors" else torch.linalg.vector_norm(difference, dim=1)
    return per_sample.sum() / max(len(per_sample), 1)


def average_to(x: Tensor, extents: list[int]) -> Tensor:
    """Average-pool x [B, C, *spatial] to the spatial extents, if they differ.

    Half precision is pooled in float32 and returned as float32.

    Raises:
        ValueError: the extents differ and there are more than three spatial dimensions.
    """
    if list(x.shape[2:]) == list(extents):
        return x
    x = x if x.dtype == torch.float64 else x.float()
    pools: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    if len(extents) not in pools:
        raise ValueError(f"features with {len(extents)} spatial dimensions must have the same extents, got {tuple(x.shape[2:])} and {tuple(extents)}")
    return pools[len(extents)](x, extents)
