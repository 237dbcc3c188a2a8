"""Training in two stages: first on the features alone, then on the labels."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from .base import Distiller
from .checks import check_layers_behind_taps


class TwoStage(Distiller):
    """Base class of methods that train in two stages: on features alone, then on the labels.

    The first stage lasts ``first_stage_epochs`` epochs and trains the layers up to the last tap.
    The layers behind the last tap do not change, not even by weight decay or momentum. A subclass
    gets the losses of the second stage from :meth:`main_losses`, and has the attributes ``beta``,
    the weight of the loss on features, ``gamma``, ``alpha`` and ``temperature``.

    Args:
        first_stage_epochs: epochs of the first stage; 0 trains in one stage.
        **options: the other arguments of :class:`Distiller`.
    """

    beta: float
    gamma: float
    alpha: float
    temperature: float

    def __init__(self, student: nn.Module, teacher: nn.Module, first_stage_epochs: int = 0, **options):
        if isinstance(first_stage_epochs, bool) or not isinstance(first_stage_epochs, int):
            raise TypeError(f"first_stage_epochs must be an integer, got {first_stage_epochs!r}")
        super().__init__(student, teacher, **options)
        if first_stage_epochs < 0:
            raise ValueError(f"first_stage_epochs must be >= 0, got {first_stage_epochs}")
        self.first_stage_epochs = first_stage_epochs
        # Parameters that the first stage has not trained so far; None before its first step.
        self._untrained: list[nn.Parameter] | None = None

    @property
    def first_stage(self) -> bool:
        return self.current_epoch < self.first_stage_epochs

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self.first_stage_epochs:
            return
        if not self.beta:
            raise ValueError("beta is 0, so that the first stage has nothing to train: give a beta > 0, or first_stage_epochs=0")
        last = self.trainer.max_epochs
        if last is not None and 0 <= last <= self.first_stage_epochs and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"the layers behind the last tap are not trained: the first stage has {self.first_stage_epochs} epochs, the training only {last}"
            )

    def main_losses(self, logits: Tensor, teacher_logits: Tensor, batch: dict) -> dict[str, Tensor]:
        """Return the loss on the labels, multiplied by ``gamma``, and ``alpha`` T^2 KL.

        In the first stage the losses have the weight 0. They are not omitted, because DDP waits for
        a gradient of every parameter.
        """
        losses = self.label_losses(logits, batch, 0.0 if self.first_stage else self.gamma)
        if self.first_stage:
            return losses or {"cross_entropy": 0.0 * logits.sum()}
        if self.alpha:
            losses["kl"] = self.alpha * self.task.divergence(logits, teacher_logits, self.temperature, batch)
        return losses

    def check_labelled(self) -> None:
        check_layers_behind_taps(type(self).__name__, self.alpha, self.gamma)

    def check_unlabelled(self) -> None:
        check_layers_behind_taps(type(self).__name__, self.alpha)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.first_stage:
            return
        if self._untrained is None:
            self._untrained = [p for p in self.student.parameters() if p.grad is not None]
        # Behind the last tap, the losses of weight 0 give zero gradients in every step. Before it,
        # the gradient of a layer can be zero in the first steps, for example in a residual branch
        # whose last scale is initialised with zeros. Such a layer is removed from the list as soon
        # as its gradient is not zero.
        self._untrained = [p for p in self._untrained if p.grad is None or not bool(p.grad.any())]
        for parameter in self._untrained:
            parameter.grad = None
