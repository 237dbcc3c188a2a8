"""Knowledge distillation (Hinton, Vinyals, Dean 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ..nn import kd_loss  # in kdkernels.nn, because it does not need Lightning
from ..tasks.base import Combine, teacher_shares
from .base import Distiller
from .checks import check_weights

__all__ = ["KD", "kd_loss"]


class KD(Distiller):
    """Train a student on labels and on the softened predictions of one or several teachers.

    For classification with one teacher, the loss is :func:`kd_loss`. On data without labels the
    student learns from the teachers alone.

    Args:
        student, teacher: networks that map images [B, C, H, W] to logits in the shape of the task.
            ``teacher`` may be a list of networks.
        temperature: T for all predictions.
        gamma: weight of the loss on the labels.
        alpha: weight of T^2 KL.
        combine: the loss for several teachers: "probabilities" is the divergence from the mean of
            their softened probabilities, "divergences" the mean of the divergences from each of
            them. Both means are weighted with ``combine_weights``.
        combine_weights: weights of the teachers, of which only the ratios matter; by default all
            are equal.
        **options: the other arguments of :class:`Distiller`.
    """

    takes_several_teachers = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | list[nn.Module],
        temperature: float = 4.0,
        gamma: float = 0.1,
        alpha: float = 0.9,
        combine: Combine = "probabilities",
        combine_weights: Sequence[float] | None = None,
        **options,
    ):
        super().__init__(student, teacher, **options)
        if not self.teachers:
            raise ValueError("KD needs a teacher, got teacher=None")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        if combine not in ("probabilities", "divergences"):
            raise ValueError(f"combine must be 'probabilities' or 'divergences', got {combine!r}")
        check_weights(gamma=gamma, alpha=alpha)
        teacher_shares(len(self.teachers), combine_weights)
        self.temperature, self.gamma, self.alpha = temperature, gamma, alpha
        self.combine, self.combine_weights = combine, combine_weights

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        teachers = self.teacher_logits(batch)
        logits, _ = self.student_outputs(batch)
        divergence = self.task.divergence(logits, teachers, self.temperature, batch, combine=self.combine, weights=self.combine_weights)
        return logits, self.label_losses(logits, batch, self.gamma) | {"kl": self.alpha * divergence}

    def check_labelled(self) -> None:
        if not self.alpha and not self.gamma:
            raise ValueError("the loss of KD is always 0: gamma, the weight of the loss on the labels, and alpha, the weight of T^2 KL, are both 0")

    def check_unlabelled(self) -> None:
        if not self.alpha:
            raise ValueError("the first training batch has no labels, and KD without labels trains on T^2 KL alone: set alpha, its weight, to > 0")
