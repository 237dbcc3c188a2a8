"""Self-supervised label augmentation with self-distillation (Lee, Hwang, Shin, ICML 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from ..nn.sla import aggregate_rotations, four_rotations, joint_labels
from ..ops import checks
from ..tasks import Classification
from .checks import check_weights
from .self_distiller import SelfDistiller

__all__ = ["SLA", "JointClassifier", "check_rotatable", "joint_batch"]


class JointClassifier(nn.Module):
    """Classifier of class and rotation: the mean over all positions, then a linear layer.

    Args:
        channels: number of channels of the feature map.
        num_classes: number of classes K.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.linear = nn.Linear(channels, 4 * num_classes)

    def forward(self, feature: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 4 K]
        return self.linear(feature.mean((2, 3)))


class SLA(SelfDistiller):
    """Train a network together with a classifier of classes and rotations, which teaches it.

    The loss is :func:`kdkernels.nn.sla_loss`: the student sees each image in four rotations. The
    branches are a second classifier on the tapped layer, which predicts class and rotation. The
    mean of its predictions over the rotations teaches the student's own classifier. Validation
    evaluates the student, and this mean of four predictions (``val/accuracy_aggregated``).

    Images must be square. A training step costs four times the time and memory of plain training.

    Args:
        student: maps images [B, C, H, H] to logits [B, K].
        student_taps: name of one layer, whose feature map the student itself classifies.
        temperature: T.
        alpha: weight of T^2 KL from the aggregated predictions.
        image_shape: see :class:`SelfDistiller`.
        **options: the other arguments of :class:`Distiller`. There is no teacher.

    References:
        H. Lee, S. J. Hwang, J. Shin. Self-supervised Label Augmentation via Input Transformations.
        ICML 2020. https://arxiv.org/abs/1910.05872
    """

    min_taps = 1

    def __init__(
        self,
        student: nn.Module,
        student_taps: Iterable[str],
        temperature: float = 1.0,
        alpha: float = 1.0,
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        checks.positive("temperature", temperature)
        check_weights(alpha=alpha)
        check_rotatable("SLA", options.get("task"), image_shape)
        super().__init__(student, student_taps, _make_joint_classifier, image_shape, **options)
        if len(self.student_taps.names) != 1:
            raise ValueError(f"student_taps must name one layer, whose feature map the student classifies, got {self.student_taps.names}")
        self.temperature, self.alpha = temperature, alpha

    def build_branches(self, image_shape: Sequence[int]) -> None:
        check_rotatable("SLA", self.task, image_shape)
        super().build_branches(image_shape)

    def run_rotations(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's logits [B, K] for the images, and the joint logits [4 B, 4 K]."""
        logits, features = self.student_outputs({"image": four_rotations(image)})
        (feature,) = features.values()
        return logits[::4], cast(nn.Module, self.branches)(feature)

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits, joint = self.run_rotations(batch["image"])
        losses = self.label_losses(logits, batch) | {"joint": self.task.label_loss(joint, joint_batch(batch))}
        if self.alpha:
            losses["kl"] = self.alpha * self.task.divergence(logits, aggregate_rotations(joint).detach(), self.temperature, batch)
        return logits, losses

    def predictions(self, image: Tensor) -> dict[str, Tensor]:
        logits, joint = self.run_rotations(image)
        return {"": logits, "_aggregated": aggregate_rotations(joint)}

    def prediction_names(self) -> list[str]:
        return ["", "_aggregated"]

    def check_unlabelled(self) -> None:
        raise ValueError("SLA trains its classifier of classes and rotations on labels, and the first training batch has none")


def _make_joint_classifier(shapes: dict[str, tuple[int, ...]], logits: Tensor) -> JointClassifier:
    return JointClassifier(list(shapes.values())[-1][0], logits.shape[1])


def check_rotatable(method: str, task: object, image_shape: Sequence[int] | None) -> None:
    """Raise ValueError unless the task is classification (or the default), and images are square.

    The shape of the images may not be known yet (``None``).
    """
    if task is not None and not isinstance(task, Classification):
        raise ValueError(f"{method} predicts how an image is rotated, which needs the task Classification, got {type(task).__name__}")
    if image_shape is not None and len(image_shape) == 3 and image_shape[1] != image_shape[2]:
        raise ValueError(f"{method} rotates images by 90 degrees, so they must be square, got {image_shape[1]}x{image_shape[2]}")


def joint_batch(batch: dict) -> dict:
    """Return the joint labels of the rotated images of a batch, also if it is mixed."""
    joint = {name: joint_labels(batch[name]) for name in ("label", "mixed_label") if name in batch}
    return joint | ({"mix": batch["mix"].repeat_interleave(4)} if "mix" in batch else {})
