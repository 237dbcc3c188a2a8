"""The task of lane detection: label maps of lanes, and which lanes exist."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Task
from .lane_curves import LaneMaps

if TYPE_CHECKING:
    from torchmetrics import Metric


def lane_cross_entropy(
    logits: Tensor,  # [B, L + 1, H, W]
    label: Tensor,  # [B, H, W] int64
    background_weight: float = 0.4,
    *,
    ignore_index: int = 255,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Cross-entropy of each pixel, with the weight ``background_weight`` for the background.

    The weighted cross-entropies are summed over the pixels that are not ignored, and divided by the
    number of all pixels. The usual weighted mean divides by the sum of the weights, which depends
    on how a batch is split into micro-batches and processes.

    Returns:
        0-dim, float32 or float64: the mean over the samples, or with ``reduction="sum"`` their sum.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weight = torch.ones(logits.shape[1], dtype=logits.dtype, device=logits.device)
    weight[0] = background_weight
    label = label.long()
    total = F.cross_entropy(logits, label, weight, ignore_index=ignore_index, reduction="sum")
    return total / max(label.numel() if reduction == "mean" else label[0].numel(), 1)


def lane_iou_loss(
    logits: Tensor,  # [B, L + 1, H, W]
    label: Tensor,  # [B, H, W] int64
    *,
    ignore_index: int = 255,
) -> Tensor:
    r"""Mean over the samples of :math:`1 - N_o / (N_p + N_g - N_o)`, with soft counts of pixels.

    For the pixels of one sample that are not ignored, with the probabilities p of the classes:
    :math:`N_p` is the sum of :math:`1 - p_0`, the predicted lane pixels; :math:`N_g` is the number
    of labelled lane pixels; :math:`N_o` is the sum of :math:`p_{label}` over the labelled lane
    pixels, so that a pixel overlaps only if its lane is the right one. The counts are made per
    sample, because counts over a batch would depend on how the batch is split into micro-batches.
    A sample without labelled lane pixels adds 0: its loss would be 1 for any prediction, with the
    gradient 0.

    Returns:
        0-dim, float32 or float64, in [0, 1].
    """
    probability = (logits if logits.dtype == torch.float64 else logits.float()).softmax(1)
    label = label.long()
    valid = label != ignore_index
    is_lane = valid & (label > 0)
    lanes = 1 - probability[:, 0]
    right = probability.gather(1, torch.where(valid, label, 0)[:, None])[:, 0]
    predicted = torch.where(valid, lanes, 0).sum((1, 2))
    labelled = is_lane.sum((1, 2)).to(predicted.dtype)
    overlap = torch.where(is_lane, right, 0).sum((1, 2))
    iou = overlap / (predicted + labelled - overlap).clamp(min=torch.finfo(predicted.dtype).tiny)
    return torch.where(labelled > 0, 1 - iou, 0).sum() / max(len(label), 1)


def lane_existence(label: Tensor, lanes: int) -> Tensor:  # [B, H, W] int64 -> [B, lanes] bool
    """Return which of the lanes 1, ..., ``lanes`` have at least one pixel in each label map."""
    return torch.stack([(label == lane).any(2).any(1) for lane in range(1, lanes + 1)], 1)


class Lanes(Task):
    """Lane detection (Pan et al. 2018, SCNN; Hou et al. 2019, Self Attention Distillation).

    Labels are label maps [B, H, W] of integers: 0 is the background, and 1 to ``lanes`` are the
    lanes from left to right. Pixels with the label ``ignore_index`` contribute nothing. The batch
    field ``existence`` [B, lanes], bool or float, says which lanes exist. If it is missing, a lane
    exists if it has a pixel in the label map.

    A network returns a dict with ``logits`` [B, lanes + 1, H, W] and ``existence`` [B, lanes], the
    logits of the probability that a lane exists; or an object with these attributes; or a tuple of
    both, in this order. A network that returns only logits has no loss on the existence, and all
    its lanes exist that have enough points.

    The loss on the labels is

    - ``cross_entropy``: :func:`lane_cross_entropy`, with ``background_weight``;
    - ``iou``: ``iou_weight`` times :func:`lane_iou_loss`;
    - ``existence``: ``existence_weight`` times the binary cross-entropy of the existence, as a mean
      over samples and lanes.

    The default weights are those of the SAD paper and of its code. All three are means over the
    samples, so the loss does not depend on how a batch is split (see :class:`Task`).

    The metrics are described in :mod:`kdkernels.tasks.lane_metrics`: ``f1`` of CULane,
    ``tusimple_accuracy``, ``tusimple_false_positives`` and ``tusimple_false_negatives``, and of
    BDD100K ``lane_iou`` and ``pixel_accuracy``. With ``lanes=1``, class 1 stands for all lanes of
    an image, as in BDD100K. Curves of single lanes cannot be extracted then, and the metrics are
    only ``lane_iou``, which selects the best checkpoint, and ``pixel_accuracy``.

    Args:
        lanes: number of lanes L.
        background_weight: weight of background pixels in the cross-entropy.
        iou_weight, existence_weight: weights of the two other terms; 0 omits a term.
        ignore_index: label of pixels without a class. Augmentation gives the label 255 to pixels
            from outside the image.
        tusimple_variant: how the scores of TuSimple are counted, see
            :func:`kdkernels.tasks.lane_metrics.tusimple_scores`.

    Raises:
        TypeError: ``lanes`` or ``ignore_index`` is not an integer.
        ValueError: ``lanes`` is not in [1, 254], a weight is negative or not finite,
            ``background_weight`` is 0, ``ignore_index`` is a class, or ``tusimple_variant`` is
            unknown.
    """

    rows = "pixels"

    def __init__(
        self,
        lanes: int = 4,
        background_weight: float = 0.4,
        iou_weight: float = 0.1,
        existence_weight: float = 0.1,
        ignore_index: int = 255,
        tusimple_variant: Literal["points", "script"] = "points",
    ):
        for name, value in {"lanes": lanes, "ignore_index": ignore_index}.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if not 1 <= lanes <= 254:
            raise ValueError(f"lanes must lie in [1, 254], got {lanes}")
        if 0 <= ignore_index <= lanes:
            raise ValueError(f"ignore_index must not be one of the classes 0 to {lanes}, got {ignore_index}")
        for name, weight in {"background_weight": background_weight, "iou_weight": iou_weight, "existence_weight": existence_weight}.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"{name} must be a number, got {weight!r}")
            if not 0 <= weight < math.inf or (name == "background_weight" and weight == 0):
                raise ValueError(f"{name} must be finite and {'> 0' if name == 'background_weight' else '>= 0'}, got {weight}")
        if tusimple_variant not in ("points", "script"):
            raise ValueError(f'tusimple_variant must be "points" or "script", got {tusimple_variant!r}')
        self.lanes, self.ignore_index, self.tusimple_variant = lanes, ignore_index, tusimple_variant
        self.background_weight, self.iou_weight, self.existence_weight = background_weight, iou_weight, existence_weight
        self.main_metric = "f1" if lanes > 1 else "lane_iou"
        self.logits_shape = f"[B, {lanes + 1}, H, W]"

    def check_logits(self, logits: Tensor, image: Tensor) -> bool:
        return tuple(logits.shape) == (len(image), self.lanes + 1, *image.shape[2:])

    def check_output(self, output: object, image: Tensor) -> None:
        existence = self.existence_logits(output)
        if existence is None and self.existence_weight:
            self._warn_of_other_names(output, image)
        expected = [len(image), self.lanes]
        if existence is not None and (not isinstance(existence, Tensor) or list(existence.shape) != expected):
            given = list(existence.shape) if isinstance(existence, Tensor) else type(existence).__name__
            raise ValueError(f"the output 'existence' must be a tensor {expected}, the logits of the existence of {self.lanes} lanes; got {given}")

    def _warn_of_other_names(self, output: object, image: Tensor) -> None:
        named = output.items() if isinstance(output, dict) else vars(output).items() if hasattr(output, "__dict__") else ()
        for name, value in named:
            if isinstance(value, Tensor) and list(value.shape) == [len(image), self.lanes]:
                warnings.warn(
                    f"the network's output {name!r} is a tensor [B, {self.lanes}] like the existence of the lanes, but only an output with the name "
                    "'existence' is trained and evaluated as such",
                    stacklevel=2,
                )

    def existence_logits(self, output: object) -> Any:
        """Return the logits of the existence in an output of a network, or ``None``."""
        if isinstance(output, (tuple, list)) and not hasattr(output, "existence"):
            logits = self.logits(output)
            shape = [len(logits), self.lanes]
            return next((x for x in output if isinstance(x, Tensor) and x is not logits and list(x.shape) == shape), None)
        return output.get("existence") if isinstance(output, dict) else getattr(output, "existence", None)

    def check_labels(self, label: Tensor, image: Tensor, num_classes: int, stage: str, values: bool = True) -> None:
        expected = [len(image), *image.shape[2:]]
        if label.is_floating_point() or list(label.shape) != expected:
            kind = "floating point" if label.is_floating_point() else "integers"
            raise ValueError(f"labels must be label maps {expected} of lanes; a {stage} batch has {kind} of shape {list(label.shape)}")
        known = label[label != self.ignore_index] if values else label[:0]
        if known.numel() and (int(known.min()) < 0 or int(known.max()) > self.lanes):
            raise ValueError(
                f"labels must be 0 (background), a lane from 1 to {self.lanes}, or ignore_index ({self.ignore_index}); a {stage} batch has "
                f"{int(known.min())} to {int(known.max())}"
            )

    def check_data(self, data: object) -> None:
        augment: Any = getattr(data, "augment", None)
        if augment is None:
            return
        if augment.flip and self.lanes > 1:
            raise ValueError("Augment(flip=True) cannot be used with Lanes: a mirrored label map would number the lanes from right to left")
        if augment.cutmix:
            raise ValueError("Augment(cutmix=...) cannot be used with Lanes: it pastes a part of another image, whose lanes end at the box")
        if (augment.crop or augment.rotate) and augment.label_fill != self.ignore_index and not 0 <= augment.label_fill <= self.lanes:
            raise ValueError(
                f"label_fill of Augment, the label of pixels from outside the image, must be a class or ignore_index of Lanes ({self.ignore_index}), "
                f"got {augment.label_fill}"
            )

    def label_loss(self, logits: Tensor, batch: dict, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        return lane_cross_entropy(logits, batch["label"], self.background_weight, ignore_index=self.ignore_index, reduction=reduction)

    def output_losses(self, output: object, batch: dict) -> dict[str, Tensor]:
        logits, existence = self.logits(output), self.existence_logits(output)
        losses = {}
        if self.iou_weight:
            losses["iou"] = self.iou_weight * lane_iou_loss(logits, batch["label"], ignore_index=self.ignore_index)
        if existence is not None:
            existence = existence if existence.dtype == torch.float64 else existence.float()
            # With the weight 0 the term is kept, because DDP waits for a gradient of every
            # parameter.
            entropy = F.binary_cross_entropy_with_logits(existence, self.existence(batch).to(existence.dtype), reduction="sum")
            losses["existence"] = self.existence_weight * entropy / max(existence.numel(), 1)
        return losses

    def existence(self, batch: dict) -> Tensor:
        """Return which lanes exist, [B, lanes] bool or float.

        Raises:
            ValueError: the field ``existence`` of the batch has another shape, or on the CPU values
                outside [0, 1].
        """
        if batch.get("existence") is None:
            return lane_existence(batch["label"], self.lanes)
        field, expected = batch["existence"], [len(batch["label"]), self.lanes]
        if not isinstance(field, Tensor) or list(field.shape) != expected:
            given = list(field.shape) if isinstance(field, Tensor) else type(field).__name__
            raise ValueError(f"the field 'existence' of a batch must be a tensor {expected}, got {given}")
        # On a GPU, reading the values would wait for the device.
        if field.device.type == "cpu" and not bool(((field >= 0) & (field <= 1)).all()):
            raise ValueError(f"the field 'existence' of a batch must lie in [0, 1], got {float(field.min()):.4g} to {float(field.max()):.4g}")
        return field

    def predictions(self, output: object) -> dict[str, Tensor]:
        """Return the ``logits`` and, if the network has it, ``existence`` [B, lanes]."""
        existence = self.existence_logits(output)
        return super().predictions(output) | ({} if existence is None else {"existence": existence})

    def mask(self, batch: dict) -> Tensor | None:
        return batch["label"] != self.ignore_index if "label" in batch else None

    def metrics(self, num_classes: int) -> dict[str, Metric]:
        from .lane_metrics import CULaneF1, TuSimpleScore

        pixels = self.training_metrics(num_classes)
        if self.lanes == 1:
            return pixels
        names: tuple[Literal["accuracy", "false_positives", "false_negatives"], ...] = ("accuracy", "false_positives", "false_negatives")
        return {"f1": CULaneF1(), **{f"tusimple_{name}": TuSimpleScore(name, variant=self.tusimple_variant) for name in names}, **pixels}

    def training_metrics(self, num_classes: int) -> dict[str, Metric]:
        """Return the metrics of pixels: those of curves are computed on the CPU, image by image."""
        from .lane_metrics import LaneIoU, LanePixelAccuracy

        return {"lane_iou": LaneIoU(), "pixel_accuracy": LanePixelAccuracy()}

    def metric_inputs(self, logits: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        return logits.argmax(1), batch["label"]

    def output_metric_inputs(self, output: object, batch: dict) -> tuple[LaneMaps, LaneMaps]:
        """Return the predicted lanes and the labelled lanes, without the ignored pixels."""
        logits, label, existence = self.logits(output), batch["label"], self.existence_logits(output)
        valid = label != self.ignore_index
        label = torch.where(valid, label, 0)
        exists = None if existence is None else existence > 0
        probability = torch.where(valid[:, None], logits.float().softmax(1)[:, 1:], 0)
        predicted = LaneMaps(probability, exists, torch.where(valid, logits.argmax(1), 0))
        lanes = torch.stack([label == lane for lane in range(1, self.lanes + 1)], 1).to(probability.dtype)
        return predicted, LaneMaps(lanes, None, label)

    def mirrored_label(self, label: Tensor) -> Tensor:
        mirrored = label.flip(-1)
        is_lane = (mirrored > 0) & (mirrored != self.ignore_index)
        return torch.where(is_lane, self.lanes + 1 - mirrored, mirrored)
