"""Training on labels alone."""

from __future__ import annotations

import os

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from ..tasks import Task
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
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
        scheduler: LRSchedulerCallable | None = None,
        check_finite: bool = True,
        task: Task | None = None,
    ):
        super().__init__(student, student_weights=student_weights, optimizer=optimizer, scheduler=scheduler, check_finite=check_finite, task=task)

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _ = self.student_outputs(batch)
        return logits, self.label_losses(logits, batch)

    def check_unlabelled(self) -> None:
        raise ValueError("Supervised trains on labels alone, and the training data have none: give labels, or use KD, which can train without them")
