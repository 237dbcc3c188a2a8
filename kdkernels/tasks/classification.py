"""The task with one class per image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Task

if TYPE_CHECKING:
    from torchmetrics import Metric


class Classification(Task):
    """One class per image: logits [B, K], and labels [B] int64 or probabilities [B, K] float.

    The loss on the labels is the cross-entropy. Images that mixup or cutmix has mixed have two
    labels: ``label`` with the weight ``mix`` [B], and ``mixed_label`` with the weight 1 - ``mix``.
    The metric is ``accuracy``, the fraction of images whose most probable class is the label. If
    labels are probabilities, it compares with their most probable class.
    """

    main_metric = "accuracy"
    rows = "images"
    logits_shape = "[B, K]"

    def check_logits(self, logits: Tensor, image: Tensor) -> bool:
        return logits.dim() == 2 and len(logits) == len(image)

    def check_labels(self, label: Tensor, image: Tensor, num_classes: int, stage: str, values: bool = True) -> None:
        if label.is_floating_point():
            if label.shape[1:] != (num_classes,):
                raise ValueError(
                    f"labels that are probabilities must have the shape [B, {num_classes}], for the classes of the networks; got {list(label.shape)}"
                )
            if values and not bool(((label >= 0).all(1) & ((label.sum(1) - 1).abs() <= 1e-2)).all()):
                raise ValueError(f"labels that are probabilities must be >= 0 and have the sum 1 for each image; those of a {stage} batch do not")
            return
        if label.dim() != 1:
            hint = "; for label maps, use the task Segmentation" if label.dim() == 3 else ""
            raise ValueError(
                f"labels must be class indices [B], or probabilities [B, K] of a floating-point dtype; a {stage} batch has the shape "
                f"{list(label.shape)}{hint}"
            )
        if not values or not label.numel():
            return
        low, high = int(label.min()), int(label.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must lie in [0, {num_classes - 1}], the classes of the networks; a {stage} batch has {low} to {high}")

    def label_loss(self, logits: Tensor, batch: dict, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if "mix" not in batch:
            return F.cross_entropy(logits, batch["label"], reduction=reduction)
        first, second = (F.cross_entropy(logits, batch[name], reduction="none") for name in ("label", "mixed_label"))
        mixed = batch["mix"] * first + (1 - batch["mix"]) * second
        return mixed.mean() if reduction == "mean" else mixed.sum()

    def metrics(self, num_classes: int) -> dict[str, Metric]:
        from torchmetrics.classification import MulticlassAccuracy

        return {"accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False)}

    def metric_inputs(self, logits: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        label = batch["label"]
        return logits.argmax(1), label.argmax(1) if label.is_floating_point() else label
