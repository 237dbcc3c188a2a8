"""Distillation from unlabelled images, DFND (Chen et al., CVPR 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn.dfnd import dfnd_loss, noise_adaptation_matrix
from ..ops import checks
from ..tasks import Classification
from .base import Distiller
from .checks import check_weights
from .optimization import JointOptimizer

__all__ = ["DFND", "NoiseAdaptation"]


class NoiseAdaptation(nn.Module):
    """The noise adaptation matrix Q, whose diagonal is fixed and whose other elements are learned.

    Args:
        num_classes: K.
        diagonal: see :func:`kdkernels.nn.noise_adaptation_matrix`.
    """

    def __init__(self, num_classes: int, diagonal: float | Sequence[float]):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, num_classes - 1))
        # No buffer, which half precision would round.
        self._diagonal = diagonal if isinstance(diagonal, (int, float)) else torch.tensor(diagonal, dtype=torch.float64)
        self.matrix()  # raises for a diagonal of another length

    @property
    def diagonal(self) -> float | Tensor:
        """The diagonal: a number or [K] float64 on the device of the weight."""
        if isinstance(self._diagonal, Tensor):
            self._diagonal = self._diagonal.to(self.weight.device)
        return self._diagonal

    def matrix(self) -> Tensor:
        """Return Q [K, K]."""
        return noise_adaptation_matrix(self.weight, self.diagonal)

    def forward(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return the cross-entropy of the student's noisy predictions with the teacher's labels."""
        return dfnd_loss(logits, teacher_logits, self.weight, self.diagonal, alpha=0.0)


class DFND(Distiller):
    r"""Train a student on images without labels, whose content the teacher may not know.

    The loss is :func:`kdkernels.nn.dfnd_loss`. The noise adaptation matrix Q is trained with the
    student, with an optimizer of its own: Adam with a constant learning rate. Its parameters are
    the last group of the optimizer, for schedules with one value for each group. Labels of the
    training images are not used. The images are usually those of a large pool that resemble the
    teacher's training data: :class:`kdkernels.data.SelectedImages`.

    Args:
        student, teacher: networks that map images [B, C, H, W] to logits [B, K].
        diagonal: diagonal of Q, one number or one for each class: the probability that the
            teacher's label is right. The authors take the accuracy of the teacher. ``None`` trains
            without Q, on the cross-entropy with the teacher's labels.
        temperature: T of the divergence.
        alpha: weight of T^2 KL.
        matrix_lr: learning rate of the learned elements of Q.
        num_classes: K, if the data module does not give it.
        **options: the other arguments of :class:`Distiller`.

    References:
        H. Chen et al. Learning Student Networks in the Wild. CVPR 2021.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        diagonal: float | list[float] | None = 0.95,
        temperature: float = 4.0,
        alpha: float = 1.0,
        matrix_lr: float = 1e-3,
        num_classes: int | None = None,
        **options,
    ):
        checks.positive("temperature", temperature)
        check_weights(alpha=alpha)
        checks.positive("matrix_lr", matrix_lr)
        _check_diagonal(diagonal)
        if num_classes is not None and (isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2):
            raise ValueError(f"num_classes must be an integer >= 2, got {num_classes!r}")
        super().__init__(student, teacher, **options)
        if not self.teachers:
            raise ValueError("DFND needs a teacher, got teacher=None")
        if not isinstance(self.task, Classification):
            raise ValueError(f"DFND needs the task Classification, got {type(self.task).__name__}")
        self.diagonal, self.temperature, self.alpha, self.matrix_lr = diagonal, temperature, alpha, matrix_lr
        self.noise: NoiseAdaptation | None = None
        if num_classes is None and isinstance(diagonal, Sequence):
            num_classes = len(diagonal)
        if num_classes is not None:
            self.build_matrix(num_classes)

    def build_matrix(self, num_classes: int) -> None:
        """Construct the matrix Q for ``num_classes`` classes, unless it exists.

        Raises:
            ValueError: ``diagonal`` has another length.
        """
        if self.noise is None and self.diagonal is not None:
            parameter = next(self.student.parameters(), torch.empty(0))
            self.noise = NoiseAdaptation(num_classes, self.diagonal).to(parameter.device, parameter.dtype)

    def trained_modules(self) -> dict[str, nn.Module]:
        noise: dict[str, nn.Module] = {} if self.noise is None else {"noise adaptation matrix": self.noise}
        return super().trained_modules() | noise

    def new_optimizer(self) -> torch.optim.Optimizer:
        if self.noise is None:
            return super().new_optimizer()
        return JointOptimizer(self.make_optimizer(self.student.parameters()), torch.optim.Adam(self.noise.parameters(), lr=self.matrix_lr))

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        target, _ = self.teacher_outputs(batch)
        logits, _ = self.student_outputs(batch)
        losses = {"noisy_cross_entropy": dfnd_loss(logits, target, alpha=0.0) if self.noise is None else self.noise(logits, target)}
        if self.alpha:
            losses["kl"] = self.alpha * self.task.divergence(logits, [target], self.temperature, batch)
        return logits, losses

    def check_labelled(self) -> None:
        """The labels are not used."""

    def check_unlabelled(self) -> None:
        """No labels are needed."""

    def check_method(self, image: Tensor) -> None:
        if self.noise is None:
            return
        classes = self.task.logits(cast(nn.Module, self.teacher)(image)).shape[1]
        if classes != len(self.noise.weight):
            source = "num_classes" if not isinstance(self.diagonal, Sequence) else "diagonal"
            raise ValueError(f"{source} gives {len(self.noise.weight)} classes, but the teacher ({type(self.teacher).__name__}) has {classes}")

    def build_modules(self, data: Any) -> None:
        classes = getattr(data, "num_classes", None)
        if classes is not None:
            self.build_matrix(classes)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.noise is None and self.diagonal is not None:
            self.check_not_copied("num_classes")
            self.build_modules(cast(Any, self.trainer).datamodule)
            if self.noise is None and stage == "fit":
                raise ValueError("DFND needs num_classes, the number of classes of the teacher, because the data do not give it")

    # The optimizer undoes at each step what a schedule has changed. Here it does so for monitors,
    # which show the learning rate between the steps.

    def on_train_start(self) -> None:
        self._restore_constant()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        super().lr_scheduler_step(scheduler, metric)
        self._restore_constant()

    def _restore_constant(self) -> None:
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, JointOptimizer):
                optimizer.restore_constant()

    def restore_modules(self, image_shape: list[int], weights: dict[str, Tensor]) -> None:
        if "noise.weight" in weights:
            self.build_matrix(len(weights["noise.weight"]))
            cast(nn.Module, self.noise).load_state_dict({"weight": weights["noise.weight"]})

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get("state_dict")
        if not stored:  # a checkpoint of FSDP
            return
        weight = stored.get("noise.weight")
        if (weight is None) != (self.diagonal is None):
            has, needs = ("no", "trains") if weight is None else ("a", "has diagonal=None and trains without")
            raise ValueError(f"the checkpoint has {has} noise adaptation matrix, but this method {needs} one: give the options of that run")
        if weight is not None:
            self.build_matrix(len(weight))
            if self.noise is not None and len(self.noise.weight) != len(weight):
                raise ValueError(f"the checkpoint has {len(weight)} classes, but num_classes or diagonal gives {len(self.noise.weight)}")


def _check_diagonal(diagonal: object) -> None:
    if diagonal is None:
        return
    values: Sequence[Any] = diagonal if isinstance(diagonal, Sequence) and not isinstance(diagonal, str) else [diagonal]
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in values):
        raise TypeError(f"diagonal must be a number, a list of numbers, or None, got {diagonal!r}")
    if not values or any(not 0 <= x <= 1 or math.isnan(x) for x in values):
        raise ValueError(f"diagonal must lie in [0, 1], got {diagonal!r}")
    if isinstance(diagonal, Sequence) and len(diagonal) < 2:
        raise ValueError(f"diagonal must be one number, or one for each of at least two classes, got {diagonal!r}")
