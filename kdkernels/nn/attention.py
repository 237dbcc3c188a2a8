"""Attention transfer over several pairs of layers (Zagoruyko, Komodakis, ICLR 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.attention_pool import attention_transfer_loss
from .features import features_of_layers


class AttentionTransferLoss(nn.Module):
    """Sum of :func:`kdkernels.attention_transfer_loss` over pairs of layers.

    Example: ``AttentionTransferLoss()(student_features, teacher_features)``.

    The loss has no weight; multiply it by one. The authors' code uses 1000 with
    ``variant="authors"``. The paper's weight is beta / 2 = 0.05 with ``variant="paper"``.
    RepDistiller's ``Attention`` returns the list of the losses of the pairs, mdistiller's
    ``at_loss`` their sum. Both use ``p=2`` and ``variant="authors"``.

    Args:
        p, reduce: see :func:`kdkernels.attention_transfer_loss`. One value for all pairs, or a list
            with one value for each pair.
        variant: "authors" or "paper".

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or ``p`` and ``reduce`` have different lengths.
    """

    def __init__(self, p: float | Sequence[float] = 2.0, *, reduce: str | Sequence[str] = "mean", variant: str = "authors"):
        super().__init__()
        probe = [torch.ones(1, 1, 1)] * max(len(v) if isinstance(v, (list, tuple)) else 1 for v in (p, reduce))
        attention_transfer_losses(probe, probe, p, reduce=reduce, variant=variant)  # validate the options
        self.p, self.reduce, self.variant = p, reduce, variant

    def forward(
        self,
        student: Tensor | Sequence[Tensor],  # [B, C, *spatial], one tensor or a list
        teacher: Tensor | Sequence[Tensor],
    ) -> Tensor:
        student, teacher = ([x] if isinstance(x, Tensor) else list(x) for x in (student, teacher))
        return cast(Tensor, sum(attention_transfer_losses(student, teacher, self.p, reduce=self.reduce, variant=self.variant)))

    def extra_repr(self) -> str:
        return f"p={self.p}, reduce={self.reduce!r}, variant={self.variant!r}"


def attention_transfer_losses(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    p: float | Sequence[float] = 2.0,
    *,
    reduce: str | Sequence[str] = "mean",
    variant: str = "authors",
) -> list[Tensor]:
    """Compute :func:`kdkernels.attention_transfer_loss` of each pair of feature maps.

    The teacher's feature maps are detached.

    Args:
        student, teacher: feature maps [B, C, *spatial], one of each list per pair.
        p, reduce: see :func:`kdkernels.attention_transfer_loss`. One value for all pairs, or a list
            with one value for each pair.
        variant: "authors" or "paper".

    Returns:
        One 0-dim tensor per pair.

    Raises:
        TypeError: student or teacher is not a list of tensors.
        ValueError: the lists are empty or differ in length.
    """
    student, teacher = (features_of_layers(name, x) for name, x in (("student", student), ("teacher", teacher)))
    if len(student) != len(teacher) or not len(student):
        raise ValueError(f"student and teacher must be lists of the same number of features, at least one, got {len(student)} and {len(teacher)}")
    exponents, reductions = _value_of_each_pair("p", p, len(student)), _value_of_each_pair("reduce", reduce, len(student))
    return [
        attention_transfer_loss(s, t.detach(), exponent, reduce=reduction, variant=variant)
        for s, t, exponent, reduction in zip(student, teacher, exponents, reductions, strict=True)
    ]


def _value_of_each_pair(name: str, value: Any, count: int) -> list:
    """Return the value of an option for each pair of layers, from one value or one for each."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} must be one value, or one for each of the {count} pairs, got {len(values)}")
    return values
