"""Checks of lists of features, one tensor for each layer, and of labels; and the cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import checks


def features_of_layers(name: str, features: object, contents: str = "features") -> list[Tensor]:
    """Return a list of feature maps as a list. Raise TypeError for any other value."""
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"{name} must be a list of {contents}, one tensor for each layer, got {checks.kind(features)}")
    for i, x in enumerate(features):
        checks.tensor(f"{name}[{i}]", x, contents)
    return list(features)


def check_batch_size(name: str, features: Sequence[Tensor], logits: Tensor) -> None:
    """Raise ValueError unless all features have the batch size of the logits."""
    for i, x in enumerate(features):
        if x.dim() < 1 or len(x) != len(logits):
            raise ValueError(f"{name}[{i}] must have the batch size {len(logits)} of the logits, got the shape {tuple(x.shape)}")


def check_labels(labels: object, name: str, logits: Tensor, dim: int) -> None:
    """Check that labels are class indices or class probabilities that F.cross_entropy accepts.

    ``name`` is the name of the logits in messages, and ``dim`` their dimension of the classes.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.uint8, *checks.FLOATING):
        raise TypeError(f"labels must be a tensor of int64 class indices or of probabilities, got {checks.kind(labels)}")
    rows = (*logits.shape[:dim], *logits.shape[dim:][1:])
    expected = tuple(logits.shape) if labels.is_floating_point() else tuple(rows)
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels must have the shape {expected} for {name} {tuple(logits.shape)} with the classes in dim={dim}, got {tuple(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels must be on the logits' device {logits.device}, got {labels.device}")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return F.cross_entropy of logits [B, K, ...], computed in float32 or float64.

    It is 0 for an empty batch. Rows with the label -100 are left out of the mean.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = labels if labels.is_floating_point() else labels.long()
    return F.cross_entropy(logits, labels) if logits.numel() else logits.sum()
