"""Training in two stages: features first, then labels."""

from __future__ import annotations

import torch
from torch import nn

from .base import Distiller


class TwoStage(Distiller):
    """A first stage of ``first_stage_epochs`` epochs trains features alone: the layers up to the last tap. What lies behind gets no step, not even
    one of weight decay or momentum. A subclass gives its other losses the weight 0 there, so that every parameter has a gradient: DDP waits for it.

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

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.first_stage:
            return
        if self._idle is None:
            self._idle = [p for p in self.student.parameters() if p.grad is not None]
        # Behind the last tap the losses of weight 0 leave zeros, always. Before it a layer may begin with them: a branch whose last scale is zero.
        self._idle = [p for p in self._idle if p.grad is None or not bool(p.grad.any())]
        for parameter in self._idle:
            parameter.grad = None
