"""Knowledge distillation (Hinton, Vinyals, Dean 2015)."""

from __future__ import annotations

import os

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import kd_loss  # the loss itself needs no trainer
from ..ops.temperature_kl import temperature_kl
from .base import Distiller

__all__ = ["KD", "kd_loss"]


class KD(Distiller):
    """Trains a student on labels and on the softened predictions of a teacher: the terms of :func:`kd_loss`.

    Args:
        student, teacher, teacher_weights, lr, momentum, weight_decay: see :class:`Distiller`.
        temperature: T of both predictions.
        gamma: weight of the cross-entropy.
        alpha: weight of T^2 KL.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        teacher_weights: str | os.PathLike | None = None,
        temperature: float = 4.0,
        gamma: float = 0.1,
        alpha: float = 0.9,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ):
        super().__init__(student, teacher, teacher_weights, lr=lr, momentum=momentum, weight_decay=weight_decay)
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.temperature, self.gamma, self.alpha = temperature, gamma, alpha

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        teacher_logits, _ = self.teacher_outputs(batch["image"])
        logits = self.student(batch["image"])
        cross_entropy = F.cross_entropy(logits.float(), batch["label"])
        kl = temperature_kl(logits, teacher_logits, self.temperature)
        return logits, {"cross_entropy": self.gamma * cross_entropy, "kl": self.alpha * kl}
