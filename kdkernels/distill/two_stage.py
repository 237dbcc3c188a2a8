"""Training in two stages: features first, then labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Distiller


class TwoStage(Distiller):
    """A first stage of ``first_stage_epochs`` epochs trains features alone: the layers up to the last tap. What lies behind gets no step, not even
    one of weight decay or momentum. A subclass takes its other losses from
    :meth:`main_losses`, and has the attributes ``gamma``, ``alpha`` and ``temperature``.

    Args:
        first_stage_epochs: epochs of the first stage; 0 for one stage.
        **options: the other arguments of :class:`Distiller`.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, first_stage_epochs: int = 0, **options):
        super().__init__(student, teacher, **options)
        if first_stage_epochs < 0:
            raise ValueError(f"first_stage_epochs must be >= 0, got {first_stage_epochs}")
        self.first_stage_epochs = first_stage_epochs
        self._idle: list[nn.Parameter] | None = None  # parameters that the first stage has not trained so far, once it has begun

    @property
    def first_stage(self) -> bool:
        return self.current_epoch < self.first_stage_epochs

    def main_losses(self, logits: Tensor, teacher_logits: Tensor, batch: dict) -> dict[str, Tensor]:
        """The loss on the labels with the weight ``gamma``, and ``alpha`` T^2 KL. In the first stage their weight is 0: DDP waits for a
        gradient of every parameter."""
        losses = self.label_losses(logits, batch, 0.0 if self.first_stage else self.gamma)
        if self.first_stage:
            return losses or {"cross_entropy": 0.0 * logits.sum()}
        if self.alpha:
            losses["kl"] = self.alpha * self.task.divergence(logits, teacher_logits, self.temperature, batch)
        return losses

    def check_unlabelled(self) -> None:
        if not self.alpha:
            raise ValueError(f"without labels {type(self).__name__} would train the tapped layers alone: give alpha > 0, the weight of T^2 KL")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.first_stage:
            return
        if self._idle is None:
            self._idle = [p for p in self.student.parameters() if p.grad is not None]
        # Behind the last tap the losses of weight 0 leave zeros, always. Before it a layer may begin with them: a branch whose last scale is zero.
        self._idle = [p for p in self._idle if p.grad is None or not bool(p.grad.any())]
        for parameter in self._idle:
            parameter.grad = None
