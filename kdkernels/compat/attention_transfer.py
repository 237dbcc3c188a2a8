"""The losses of szagoruyko/attention-transfer: ``utils.py``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..ops.attention_pool import attention_pool, attention_transfer_loss
from .functional import kl_div_of_logits


def distillation(y: Tensor, teacher_scores: Tensor, labels: Tensor, T: float, alpha: float) -> Tensor:
    """``alpha * T^2 KL / B + (1 - alpha) * cross_entropy(y, labels)``, for logits [B, K]."""
    kl = kl_div_of_logits(y, teacher_scores, T, dim=1, reduction="batchmean", scale_by_t2=True)
    return kl * alpha + F.cross_entropy(y.to(kl.dtype), labels) * (1.0 - alpha)


def at(x: Tensor) -> Tensor:
    """Attention map [B, H * W] of a feature map [B, C, H, W]: mean of squares, of norm 1."""
    return attention_pool(x, normalize="l2").flatten(1)


def at_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference of the attention maps of two feature maps of one spatial size."""
    require_one_size(x, y)
    return attention_transfer_loss(x, y)


def require_one_size(x: Tensor, y: Tensor) -> None:
    """Raise ValueError if two feature maps differ in their spatial sizes."""
    if x.shape[2:] != y.shape[2:]:
        raise ValueError(
            f"the feature maps must have one spatial size, got {list(x.shape[2:])} and {list(y.shape[2:])}; "
            "kdkernels.attention_transfer_loss averages the larger one"
        )
