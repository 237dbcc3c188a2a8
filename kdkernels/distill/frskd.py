"""Feature refinement via self-knowledge distillation, FRSKD (Ji et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..models.bifpn import SelfTeacher, check_laterals, check_sizes, projection
from ..nn.frskd import DIRECTIONS, check_frskd_options, frskd_feature_losses, frskd_ramp
from ..nn.sla import aggregate_rotations, four_rotations
from ..ops.checks import flag
from .checks import check_weights
from .self_distiller import SelfDistiller
from .sla import JointClassifier, check_rotatable, joint_batch

__all__ = ["FRSKD", "FRSKDBranches", "FRSKDOutputs"]

FeatureLoss = Literal["att", "fit", "od"]


class FRSKDOutputs(NamedTuple):
    """What the branches of FRSKD compute; the lists are in the order of the tapped layers."""

    logits: Tensor  # of the self-teacher
    features: list[Tensor]  # of the student, as the feature loss compares them
    teacher_features: list[Tensor]
    margins: list[Tensor]  # for "od"
    joint: list[Tensor]  # logits [B, 4 K] of class and rotation, of student and self-teacher; empty without SLA


class FRSKDBranches(nn.Module):
    """The self-teacher, and what the loss needs besides: adapters of features, and heads for SLA.

    An adapter brings a feature map of the student to the number of channels of the refined map: a
    1x1 convolution with batch norm, and ReLU for "fit".

    Args:
        shapes: shapes [C, H, W] of the features, by the names of their layers.
        num_classes: number of classes K.
        label_maps: whether labels are maps with a class for each pixel.
        feature_loss: "att", "fit", "od" or ``None``, see :func:`kdkernels.nn.frskd_feature_losses`.
        sla: whether to classify class and rotation together.
        width, depth, layers, laterals: see :class:`kdkernels.models.SelfTeacher`.
    """

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        num_classes: int,
        label_maps: bool,
        feature_loss: FeatureLoss | None,
        sla: bool,
        width: int,
        depth: int,
        layers: int | None,
        laterals: bool,
    ):
        super().__init__()
        self.feature_loss = feature_loss
        self.self_teacher = SelfTeacher(shapes, num_classes, label_maps, width, depth, layers, margins=feature_loss == "od", laterals=laterals)
        channels = [shape[0] for shape in shapes.values()]
        self.adapters, self.joint_classifiers = nn.ModuleList(), nn.ModuleList()
        if feature_loss in ("fit", "od"):
            self.adapters.extend(_adapter(c, d, feature_loss) for c, d in zip(channels, self.self_teacher.channels, strict=True))
        if sla:
            self.joint_classifiers.extend(JointClassifier(c, num_classes) for c in (channels[-1], self.self_teacher.channels[-1]))

    def forward(
        self,
        features: Sequence[Tensor],  # [B, C_i, H_i, W_i] each
        size: Sequence[int],  # height and width of the images
    ) -> FRSKDOutputs:
        logits, refined, margins = self.self_teacher(features, size)
        active, active_refined = [F.relu(x) for x in features], [F.relu(x) for x in refined]
        joint = [classifier(maps[-1]) for classifier, maps in zip(self.joint_classifiers, (active, active_refined), strict=False)]
        if self.feature_loss == "od":  # compares the features before their ReLU
            active, active_refined = list(features), refined
        adapted = [adapter(x) for adapter, x in zip(self.adapters, active, strict=False)] or active
        return FRSKDOutputs(logits, adapted, active_refined, margins, joint)


def _adapter(in_channels: int, out_channels: int, feature_loss: FeatureLoss) -> nn.Sequential:
    layers = projection(in_channels, out_channels)
    nn.init.kaiming_normal_(cast(Tensor, layers[0].weight), mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*layers, nn.ReLU()) if feature_loss == "fit" else layers


class FRSKD(SelfDistiller):
    r"""Train a network together with a self-teacher, which refines the network's own features.

    The loss is :func:`kdkernels.nn.frskd_loss`. The student learns from labels, from the
    predictions of the self-teacher (:class:`kdkernels.models.SelfTeacher`), and from its refined
    features. These are detached, so that the self-teacher learns from the labels alone. The
    features that enter the self-teacher are not detached, so that its cross-entropy also trains the
    layers of the student up to the last tap, but not the layers behind.

    The self-teacher is no part of an exported student. Validation evaluates the student and the
    self-teacher (``val/accuracy_teacher``).

    The defaults are those of the authors' code for CIFAR-100. For segmentation, the authors use
    ``alpha=1, beta=50, temperature=1, ramp_start=40, ramp_epochs=20, mask_ignored=False``.

    Args:
        student: maps images [B, C, H, W] to logits in the shape of ``task``.
        student_taps: names of at least two layers, from the finest to the coarsest feature map. For
            "od", they should be outputs before a ReLU.
        alpha: weight of T^2 KL from the self-teacher.
        beta: weight of the feature loss. 100 is made for "att"; "od" is a sum over the elements of
            a map, for which Heo et al. use 0.001.
        temperature: T.
        feature_loss: "att", "fit" or "od", see :func:`kdkernels.nn.frskd_feature_losses`; ``None``
            is FRSKD\F, without a feature loss.
        variant: "authors" or "paper", see :func:`kdkernels.nn.frskd_loss`.
        width, depth, layers, laterals: see :class:`kdkernels.models.SelfTeacher`.
        ramp_start, ramp_epochs: alpha and beta are 0 in the first ``ramp_start`` epochs, and grow
            to their values in the next ``ramp_epochs`` epochs (:func:`kdkernels.nn.frskd_ramp`).
        mask_ignored: whether T^2 KL leaves out the pixels that the task ignores. The authors' code
            for segmentation includes them.
        sla: whether to combine FRSKD with self-supervised label augmentation (:class:`SLA`):
            student and self-teacher have second classifiers of class and rotation, which also teach
            the first ones. Images must be square, and the task Classification.
        sla_alpha: weight of T^2 KL from the aggregated predictions of the second classifiers.
        image_shape: see :class:`SelfDistiller`.
        **options: the other arguments of :class:`Distiller`. There is no teacher.

    References:
        M. Ji, S. Shin, S. Hwang, G. Park, I.-C. Moon. Refine Myself by Teaching Myself: Feature
        Refinement via Self-Knowledge Distillation. CVPR 2021. https://arxiv.org/abs/2103.08273
    """

    def __init__(
        self,
        student: nn.Module,
        student_taps: Iterable[str],
        alpha: float = 2.0,
        beta: float = 100.0,
        temperature: float = 4.0,
        feature_loss: Literal["att", "fit", "od"] | None = "att",
        variant: Literal["authors", "paper"] = "authors",
        width: int = 2,
        depth: int = 2,
        layers: int | None = None,
        laterals: bool = True,
        ramp_start: int = 0,
        ramp_epochs: int = 0,
        mask_ignored: bool = True,
        sla: bool = False,
        sla_alpha: float = 1.0,
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        check_frskd_options(temperature, alpha, beta, feature_loss, variant)
        check_weights(sla_alpha=sla_alpha)
        flag("sla", sla)
        flag("mask_ignored", mask_ignored)
        check_sizes(width=width, depth=depth, layers=1 if layers is None else layers)
        check_laterals(laterals, width)
        frskd_ramp(0, ramp_start, ramp_epochs)  # validate the options
        if sla:
            check_rotatable("FRSKD with sla=True", options.get("task"), image_shape)
        feature_loss = feature_loss if beta else None
        make_branches = partial(_make_branches, feature_loss=feature_loss, sla=sla, width=width, depth=depth, layers=layers, laterals=laterals)
        super().__init__(student, student_taps, make_branches, **options)
        self.alpha, self.beta, self.temperature, self.feature_loss, self.variant = alpha, beta, temperature, feature_loss, variant
        self.ramp_start, self.ramp_epochs, self.mask_ignored = ramp_start, ramp_epochs, mask_ignored
        self.sla, self.sla_alpha = sla, sla_alpha
        if image_shape is not None:
            self.build_branches(image_shape)

    def on_train_start(self) -> None:
        epochs = self.trainer.max_epochs
        if self.ramp_start and epochs is not None and 0 <= epochs <= self.ramp_start and not cast(Any, self.trainer).fast_dev_run:
            raise ValueError(
                f"ramp_start must be below the number of epochs of the run, {epochs}, got {self.ramp_start}: the self-teacher would never teach"
            )

    def build_branches(self, image_shape: Sequence[int]) -> None:
        if self.sla:
            check_rotatable("FRSKD with sla=True", self.task, image_shape)
        super().build_branches(image_shape)

    def run_branches(self, image: Tensor) -> tuple[Tensor, FRSKDOutputs]:
        """Return the student's logits, and the outputs of the branches."""
        logits, features = self.student_outputs({"image": image})
        return logits, cast(FRSKDBranches, self.branches)(list(features.values()), image.shape[2:])

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits, outputs = self.run_branches(four_rotations(batch["image"]) if self.sla else batch["image"])
        teacher_logits = outputs.logits
        if self.sla:  # the first rotation of each image is the image itself
            logits, teacher_logits = logits[::4], teacher_logits[::4]
        losses = self.label_losses(logits, batch) | {"cross_entropy_teacher": self.task.label_loss(teacher_logits, batch)}
        pairs = [(logits, teacher_logits)]
        if self.sla:
            aggregated, aggregated_teacher = (aggregate_rotations(joint) for joint in outputs.joint)
            losses |= self.sla_losses(outputs.joint, [(logits, aggregated), (teacher_logits, aggregated_teacher)], batch)
            pairs.append((aggregated, aggregated_teacher))
        # In epochs in which the ramp is 0, the terms are not omitted, because DDP waits for a
        # gradient of every parameter, also of the adapters.
        ramp = frskd_ramp(self.current_epoch, self.ramp_start, self.ramp_epochs)
        if self.alpha:
            rows = batch if self.mask_ignored else {"image": batch["image"]}  # without labels, no pixel is ignored
            direction = DIRECTIONS[self.variant]
            divergences = [self.task.divergence(z, target.detach(), self.temperature, rows, direction=direction) for z, target in pairs]
            losses["kl"] = ramp * self.alpha * cast(Tensor, sum(divergences)) / len(pairs)
        if self.feature_loss is not None:
            features = frskd_feature_losses(outputs.features, outputs.teacher_features, self.feature_loss, outputs.margins, self.variant)
            losses["features"] = ramp * self.beta * cast(Tensor, sum(features))
        return logits, losses

    def sla_losses(self, joint: list[Tensor], pairs: list[tuple[Tensor, Tensor]], batch: dict) -> dict[str, Tensor]:
        """Return the losses that SLA adds.

        Args:
            joint: logits [4 B, 4 K] of class and rotation, of the student and of the self-teacher.
            pairs: logits and aggregated logits [B, K], of the student and of the self-teacher.
            batch: the batch, whose images are not rotated.
        """
        rotated = joint_batch(batch)
        losses = {name: self.task.label_loss(z, rotated) for name, z in zip(("joint", "joint_teacher"), joint, strict=True)}
        if self.sla_alpha:
            divergences = [self.task.divergence(z, target.detach(), self.temperature, batch) for z, target in pairs]
            losses["kl_aggregated"] = self.sla_alpha * cast(Tensor, sum(divergences))
        return losses

    def predictions(self, image: Tensor) -> dict[str, Tensor]:
        logits, outputs = self.run_branches(image)
        return {"": logits, "_teacher": outputs.logits}

    def prediction_names(self) -> list[str]:
        return ["", "_teacher"]

    def check_unlabelled(self) -> None:
        raise ValueError("FRSKD trains its self-teacher on labels alone, and the first training batch has none")


def _make_branches(
    shapes: dict[str, tuple[int, ...]],
    logits: Tensor,
    feature_loss: FeatureLoss | None,
    sla: bool,
    width: int,
    depth: int,
    layers: int | None,
    laterals: bool,
) -> FRSKDBranches:
    return FRSKDBranches(shapes, logits.shape[1], logits.dim() == 4, feature_loss, sla, width, depth, layers, laterals)
