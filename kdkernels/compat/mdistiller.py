"""The losses of megvii-research/mdistiller: ``mdistiller/distillers/KD.py`` and ``AT.py``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from ..ops.temperature_kl import temperature_kl
from .repdistiller import Attention


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL as a mean over rows. For logits [B, K, ...], every position of a sample is a row."""
    return temperature_kl(logits_student, logits_teacher, temperature, dim=1)


def single_stage_at_loss(f_s: Tensor, f_t: Tensor, p: float) -> Tensor:
    """Attention transfer loss of one pair of layers, as ``Attention(p)`` of RepDistiller."""
    return Attention(p).at_loss(f_s, f_t)


def at_loss(g_s: Sequence[Tensor], g_t: Sequence[Tensor], p: float) -> Tensor:
    """Sum of :func:`single_stage_at_loss` over the pairs of layers."""
    return cast(Tensor, sum(single_stage_at_loss(f_s, f_t, p) for f_s, f_t in zip(g_s, g_t, strict=False)))
