"""Knowledge distillation (Hinton, Vinyals, Dean 2015)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..nn import kd_loss  # the loss itself needs no trainer
from ..ops.temperature_kl import temperature_kl
from .base import Distiller

__all__ = ["KD", "kd_loss"]


class KD(Distiller):
    """Trains a student on labels and on the softened predictions of a teacher: the terms of :func:`kd_loss`.

    Args:
        student, teacher: networks from images [B, C, H, W] to logits [B, K].
        temperature: T of both predictions.
        gamma: weight of the cross-entropy.
        alpha: weight of T^2 KL.
        **options: the other arguments of :class:`Distiller`.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, temperature: float = 4.0, gamma: float = 0.1, alpha: float = 0.9, **options):
        super().__init__(student, teacher, **options)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        self.temperature, self.gamma, self.alpha = temperature, gamma, alpha

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        teacher_logits, _ = self.teacher_outputs(batch)
        logits, _ = self.student_outputs(batch)
        kl = temperature_kl(logits, teacher_logits, self.temperature)
        return logits, {"cross_entropy": self.gamma * self.cross_entropy(logits, batch), "kl": self.alpha * kl}
