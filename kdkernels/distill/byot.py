"""Be Your Own Teacher (Zhang et al., ICCV 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, cast

from torch import Tensor, nn

from ..models.exits import Branch
from ..nn import byot_loss  # in kdkernels.nn, because it does not need Lightning
from ..nn.byot import byot_feature_losses, byot_weights
from .exits import ExitDistiller

__all__ = ["BYOT", "byot_loss"]


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
        adapters = variant == "authors" and weights.features > 0
        super().__init__(student, student_taps, {"branch": branch, "adapters": adapters}, image_shape, **options)
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
