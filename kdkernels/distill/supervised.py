"""Training on labels alone."""

from __future__ import annotations

import os

from torch import Tensor, nn

from .base import Distiller


class Supervised(Distiller):
    """Train on the labels alone, for example a teacher, or a student as a baseline.

    Args:
        student, student_weights, optimizer, scheduler, check_finite, task: see :class:`Distiller`.
    """

    def __init__(
        self,
        student: nn.Module,
        student_weights: str | os.PathLike | None = None,
        **options,
    ):
        # The arguments that are given here are options neither in Python nor on the command line.
        super().__init__(
            student, None, student_weights=student_weights, teacher_weights=None, student_taps=(), teacher_taps=(), teacher_cache=None, **options
        )

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _ = self.student_outputs(batch)
        return logits, self.label_losses(logits, batch)

    def check_unlabelled(self) -> None:
        raise ValueError(
            "Supervised trains on labels alone, and the first training batch has none: give labels, or use KD, which can train without them"
        )
