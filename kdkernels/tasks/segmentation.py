"""The task with one class per pixel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Task

if TYPE_CHECKING:
    from torchmetrics import Metric


class Segmentation(Task):
    """One class per pixel: logits [B, K, H, W], and label maps [B, H, W] of class indices.

    H and W are height and width of the images. Pixels with the label ``ignore_index`` contribute
    nothing to the cross-entropy, the divergence from the teacher and the metrics. Both losses are
    sums over the other pixels, divided by the number of all pixels (see :class:`Task`). The metrics
    are

    - ``mean_iou``: for each class, the intersection of predicted and labelled pixels divided by
      their union, both counted over all images of an epoch; then the mean over the classes that
      occur in a label or in a prediction;
    - ``pixel_accuracy``: the fraction of labelled pixels whose predicted class is the label.

    Args:
        ignore_index: the label of pixels without a class. Augmentation gives the label 255 to
            pixels from outside the image.
    """

    main_metric = "mean_iou"
    rows = "pixels"
    logits_shape = "[B, K, H, W]"

    def __init__(self, ignore_index: int = 255):
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
        self.ignore_index = ignore_index

    def check_logits(self, logits: Tensor, image: Tensor) -> bool:
        return logits.dim() == 4 and len(logits) == len(image) and logits.shape[2:] == image.shape[2:]

    def check_labels(self, label: Tensor, image: Tensor, num_classes: int, stage: str, values: bool = True) -> None:
        expected = [len(image), *image.shape[2:]]
        if label.is_floating_point() or list(label.shape) != expected:
            kind = "floating point" if label.is_floating_point() else "integers"
            raise ValueError(f"labels must be label maps {expected} of class indices; a {stage} batch has {kind} of shape {list(label.shape)}")
        if not values:
            return
        classes = label[label != self.ignore_index]
        if not classes.numel():
            return
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"labels must lie in [0, {num_classes - 1}], the classes of the networks, or be ignore_index ({self.ignore_index}); "
                f"a {stage} batch has {low} to {high}"
            )

    def check_data(self, data: object) -> None:
        augment: Any = getattr(data, "augment", None)
        fill: Any = getattr(augment, "label_fill", None)
        classes = getattr(data, "num_classes", None)
        is_used = fill is not None and (augment.crop or augment.rotate)
        if is_used and fill != self.ignore_index and not (classes and 0 <= fill < classes):
            raise ValueError(
                f"label_fill of Augment, the label of pixels from outside the image, must be a class or ignore_index of Segmentation "
                f"({self.ignore_index}), got {fill}"
            )

    def label_loss(self, logits: Tensor, batch: dict, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        logits, label = logits if logits.dtype == torch.float64 else logits.float(), batch["label"]
        total = F.cross_entropy(logits, label, ignore_index=self.ignore_index, reduction="sum")
        return total / (label.numel() if reduction == "mean" else label[0].numel())

    def mask(self, batch: dict) -> Tensor | None:
        return batch["label"] != self.ignore_index if "label" in batch else None

    def metrics(self, num_classes: int) -> dict[str, Metric]:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

        ignored = self.ignore_index
        return {
            "mean_iou": MulticlassJaccardIndex(num_classes, average="macro", ignore_index=ignored, validate_args=False),
            "pixel_accuracy": MulticlassAccuracy(num_classes, average="micro", ignore_index=ignored, validate_args=False),
        }

    def metric_inputs(self, logits: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        return logits.argmax(1), batch["label"]

    def mirrored_label(self, label: Tensor) -> Tensor:
        return label.flip(-1)
