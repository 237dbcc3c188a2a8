"""Feature distillation: a student imitates a feature of the teacher, then learns the labels."""

from __future__ import annotations

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from .checks import check_weights
from .network_checks import unchanged
from .two_stage import TwoStage

__all__ = ["FeatureDistillation"]


class FeatureDistillation(TwoStage):
    """Imitate a feature of the teacher by the mean squared error.

    With ``first_stage_epochs``, this is the protocol of Cheng et al. (CVPR 2020): the first epochs
    train the layers up to the tap on the feature alone, and the remaining epochs train the other
    layers on the labels, while the layers up to the tap do not change. With
    ``first_stage_epochs=0``, all layers are trained on the sum of all terms, as by FitNets without
    a regressor (Romero et al. 2015, with one stage).

    Args:
        student, teacher: networks that map images [B, C, H, W] to logits in the shape of ``task``.
        student_tap, teacher_tap: name of a layer of each; their outputs have the same shape. By
            default the teacher's is named as the student's.
        first_stage_epochs: epochs of the first stage.
        beta: weight of the mean squared error, a mean over all elements.
        gamma: weight of the loss on the labels.
        alpha: weight of T^2 KL; 0 omits it.
        temperature: T.
        **options: the other arguments of :class:`Distiller`.

    References:
        X. Cheng, Z. Rao, Y. Chen, Q. Zhang. Explaining Knowledge Distillation by Quantifying the
        Knowledge. CVPR 2020.
    """

    can_be_sharded = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_tap: str,
        teacher_tap: str | None = None,
        first_stage_epochs: int = 0,
        beta: float = 1.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        **options,
    ):
        for name, tap in {"student_tap": student_tap, "teacher_tap": teacher_tap}.items():
            if not isinstance(tap, str) and not (tap is None and name == "teacher_tap"):
                raise TypeError(f"{name} must be the name of a layer, got {tap!r}")
        if teacher is None:
            raise ValueError("FeatureDistillation needs a teacher, got teacher=None")
        check_weights(beta=beta, gamma=gamma, alpha=alpha)
        taps = {"student_taps": (student_tap,), "teacher_taps": (teacher_tap or student_tap,)}
        super().__init__(student, teacher, first_stage_epochs, **taps, **options)
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature
        self._frozen: list[nn.Parameter] | None = None  # in the second stage; None before its first step

    def check_features(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        (s,), (t,) = student.values(), teacher.values()
        if s.shape != t.shape:
            raise ValueError(f"student_tap and teacher_tap must have outputs of the same shape, got {list(s.shape)} and {list(t.shape)}")

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        in_second_stage = self.first_stage_epochs > 0 and not self.first_stage
        if in_second_stage and self._frozen is None and torch.is_grad_enabled():
            parameters = self._parameters_before_tap(batch)
            if len(parameters) == sum(p.requires_grad for p in self.student.parameters()):
                rank_zero_warn("the second stage has nothing to train, because no layer with weights is behind student_tap")
            self._freeze(parameters)
        target, teacher_features = self.teacher_outputs(batch)
        logits, features = self.student_outputs(batch)
        (feature,), (teacher_feature,) = features.values(), teacher_features.values()
        losses = {}
        if not in_second_stage:
            losses["feature"] = self.beta * torch.nn.functional.mse_loss(feature, teacher_feature)
        return logits, losses | self.main_losses(logits, target, batch)

    def _parameters_before_tap(self, batch: dict) -> list[nn.Parameter]:
        """Return the parameters on which the tapped output depends."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        with unchanged(self.student):
            (feature,) = self.student_outputs(batch)[1].values()
            gradients = torch.autograd.grad(feature.sum(), parameters, allow_unused=True)
        return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]

    def _freeze(self, parameters: list[nn.Parameter]) -> None:
        """Keep these parameters, and the statistics of batch norms that have them."""
        self._frozen = parameters
        frozen = {id(p) for p in parameters}
        for module in self.student.modules():
            own = [id(p) for p in module.parameters(recurse=False)]
            if own and frozen.issuperset(own):
                module.eval()

    def on_train_epoch_start(self) -> None:
        if self._frozen is not None:  # Lightning puts all layers into training mode after validation
            self._freeze(self._frozen)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        for parameter in self._frozen or []:
            parameter.grad = None
