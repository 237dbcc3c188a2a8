"""Training of a network together with exits: deep supervision and Be Your Own Teacher."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..models.exits import Branch, ExitOutputs, Exits
from ..nn.byot import byot_feature_losses, byot_weights
from .checks import check_weights
from .self_distiller import SelfDistiller

__all__ = ["BYOT", "DeepSupervision", "ExitDistiller"]


class ExitDistiller(SelfDistiller):
    """Base class of methods that train a network together with exits at its inner layers.

    The branches are :class:`kdkernels.models.Exits`. Validation evaluates the student, each exit
    (``val/accuracy_exit_1``, ...) and the mean of all logits (``val/accuracy_ensemble``).

    Args:
        student: maps images [B, C, H, W] to logits in the shape of ``task``.
        student_taps: names of the layers of the exits, from the front to the back, and last the
            layer whose feature map the student itself classifies.
        branch: "bottleneck" or "separable", see :class:`kdkernels.models.Exits`.
        image_shape: see :class:`SelfDistiller`.
        adapters: whether the exits have a linear layer for their features.
        **options: the other arguments of :class:`Distiller`. There is no teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        student_taps: Iterable[str],
        branch: Branch = "bottleneck",
        image_shape: Sequence[int] | None = None,
        adapters: bool = False,
        **options,
    ):
        super().__init__(student, student_taps, partial(_make_exits, branch=branch, adapters=adapters), image_shape, **options)

    def run_exits(self, image: Tensor) -> tuple[Tensor, ExitOutputs]:
        """Return the student's logits, and the outputs of the exits."""
        logits, features = self.student_outputs({"image": image})
        return logits, cast(Exits, self.branches)(list(features.values()), image.shape[2:])

    def predictions(self, image: Tensor) -> dict[str, Tensor]:
        logits, outputs = self.run_exits(image)
        exits = {f"_exit_{i}": z for i, z in enumerate(outputs.logits, 1)}
        return {"": logits, **exits, "_ensemble": torch.stack([logits, *outputs.logits]).mean(0)}

    def prediction_names(self) -> list[str]:
        return ["", *(f"_exit_{i}" for i in range(1, len(self.student_taps.names))), "_ensemble"]


def _make_exits(shapes: dict[str, tuple[int, ...]], logits: Tensor, branch: Branch, adapters: bool) -> Exits:
    return Exits(shapes, logits.shape[1], logits.dim() == 4, branch, adapters)


class DeepSupervision(ExitDistiller):
    """Train every exit of a network on the labels (Lee et al., AISTATS 2015).

    The loss is ``CE + exit_weight sum_i CE_i``, where i runs over the exits.

    Args:
        student, student_taps, branch, image_shape: see :class:`ExitDistiller`.
        exit_weight: weight of the losses of the exits, one for all or one for each. With 1 it is
            :class:`BYOT` with ``alpha=0`` and ``beta=0``.
        **options: the other arguments of :class:`Distiller`.

    References:
        C.-Y. Lee, S. Xie, P. Gallagher, Z. Zhang, Z. Tu. Deeply-Supervised Nets. AISTATS 2015.
    """

    def __init__(
        self,
        student: nn.Module,
        student_taps: Iterable[str],
        exit_weight: list[float] | float = 1.0,
        branch: Branch = "bottleneck",
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        super().__init__(student, student_taps, branch, image_shape, **options)
        count = len(self.student_taps.names) - 1
        self.exit_weights = list(exit_weight) if isinstance(exit_weight, (list, tuple)) else [exit_weight] * count
        if len(self.exit_weights) != count:
            raise ValueError(f"exit_weight must be one number, or one for each of the {count} exits, got {len(self.exit_weights)}")
        for weight in self.exit_weights:
            check_weights(exit_weight=weight)

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits, outputs = self.run_exits(batch["image"])
        losses = self.label_losses(logits, batch)
        for i, (z, weight) in enumerate(zip(outputs.logits, self.exit_weights, strict=True), 1):
            losses[f"exit_{i}"] = weight * self.task.label_loss(z, batch)
        return logits, losses

    def check_unlabelled(self) -> None:
        raise ValueError("DeepSupervision trains on labels alone, and the first training batch has none")


class BYOT(ExitDistiller):
    """Be Your Own Teacher: the exits of a network learn from labels and from its last layer.

    The loss is :func:`kdkernels.nn.byot_loss`. The predictions and features of the last layer are
    detached where they are targets, so the student's own classifier is trained by the labels alone,
    and the layers before it by all terms.

    Args:
        student, student_taps, branch, image_shape: see :class:`ExitDistiller`.
        temperature: T of the predictions.
        alpha: weight of the KL from the last layer; the cross-entropy of an exit has the weight 1 -
            alpha. ``None``: the variant's own.
        beta: weight of the feature loss. ``None``: the variant's own.
        variant: "paper", "authors" (code of the journal version) or "luanyunteng". The feature loss
            of "luanyunteng" is a sum over the batch; here it is 128 times the mean over the
            samples, which is the same for the batch size 128 of that code. That of "authors" is the
            square root of a sum over the batch, so it depends on the batch size and on the number
            of micro-batches and processes.
        **options: the other arguments of :class:`Distiller`.

    References:
        L. Zhang et al. Be Your Own Teacher. ICCV 2019. https://arxiv.org/abs/1905.08094
    """

    def __init__(
        self,
        student: nn.Module,
        student_taps: Iterable[str],
        temperature: float = 3.0,
        alpha: float | None = None,
        beta: float | None = None,
        variant: Literal["paper", "authors", "luanyunteng"] = "paper",
        branch: Branch = "bottleneck",
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        weights = byot_weights(variant, temperature, alpha, beta)
        super().__init__(student, student_taps, branch, image_shape, adapters=variant == "authors" and weights.features > 0, **options)
        self.weights, self.temperature, self.variant = weights, temperature, variant

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits, outputs = self.run_exits(batch["image"])
        weights, target, scale = self.weights, logits.detach(), self.temperature**2
        losses = self.label_losses(logits, batch, weights.last_cross_entropy)
        for i, z in enumerate(outputs.logits, 1):
            if "label" in batch:
                losses[f"exit_{i}"] = weights.cross_entropy * self.task.label_loss(z, batch)
            losses[f"kl_{i}"] = weights.divergence / scale * self.task.divergence(z, target, self.temperature, batch)
        if weights.features:
            features = cast(Tensor, sum(byot_feature_losses(outputs.features, self.variant)))
            losses["features"] = weights.features * features * (128 / len(logits) if self.variant == "luanyunteng" else 1.0)
        return logits, losses

    def check_unlabelled(self) -> None:
        raise ValueError("BYOT trains the last layer on labels alone, and the first training batch has none")
