"""Metrics of lane detection: F1 of CULane, scores of TuSimple, and pixel metrics of BDD100K.

Each metric is updated with two :class:`kdkernels.tasks.lane_curves.LaneMaps`, the predicted and the
labelled lanes. The curves of the labelled lanes are extracted from the label maps like those of the
predicted lanes. The published evaluations read the curves at full resolution from text files
instead; compare with published numbers only what their own programs have computed.

All metrics are sums over images and processes, so they do not depend on the batches.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from .lane_curves import LaneMaps, culane_rows, draw_lanes, tusimple_rows

CULANE_WIDTH = 1640  # of an image, in pixels
TUSIMPLE_SIZE = (720, 1280)  # height and width of an image, in pixels


def pairwise_iou(
    predicted: Tensor,  # [B, P, H, W] bool, the drawn lanes of each image
    labelled: Tensor,  # [B, T, H, W] bool
) -> Tensor:  # [B, P, T] float32
    """IoU of each predicted lane with each labelled lane of an image; 0 if a lane has no pixel."""
    p, t = predicted.flatten(2).float(), labelled.flatten(2).float()
    overlap = p @ t.mT  # sums of up to 2^24 ones are exact in float32
    return overlap / (p.sum(2)[:, :, None] + t.sum(2)[:, None] - overlap).clamp(min=1)


def count_matches(
    iou: Tensor,  # [P, T]
    threshold: float = 0.5,
) -> int:
    """Match predicted and labelled lanes one to one, and count the pairs with a sufficient IoU.

    The assignment maximises the sum of the IoUs, as CULane's evaluation does. A pair counts if its
    IoU is at least ``threshold``.
    """
    from scipy.optimize import linear_sum_assignment

    values = iou.numpy(force=True)
    return int((values[linear_sum_assignment(values, maximize=True)] >= threshold).sum())


class CULaneF1(Metric):
    """F1 of CULane: lanes are drawn ``line_width`` pixels wide and matched by their IoU.

    The curves are extracted at :func:`culane_rows`
    (:func:`kdkernels.tasks.lane_curves.extract_columns`). They are drawn as polylines; CULane's
    evaluation draws cubic splines. A predicted lane that is matched with a labelled lane
    (:func:`count_matches`) is a true positive. With precision P and recall R over all images, F1 is
    2 P R / (P + R), that is, 2 TP / (number of predicted + number of labelled lanes).
    F1 is 0 if there is neither a predicted nor a labelled lane in any image, or no image.

    Args:
        iou_threshold: smallest IoU of a match.
        threshold: probability above which a pixel can be a point of a predicted lane.
        line_width: width of the lines in pixels, for images of width 1640. It is scaled to the
            width of the images, and is at least 1.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    matched: Tensor
    predicted: Tensor
    labelled: Tensor

    def __init__(self, iou_threshold: float = 0.5, threshold: float = 0.3, line_width: float = 30.0):
        super().__init__()
        self.iou_threshold, self.threshold, self.line_width = iou_threshold, threshold, line_width
        for name in ("matched", "predicted", "labelled"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: LaneMaps, target: LaneMaps) -> None:
        batch, lanes, height, width = prediction.probability.shape
        rows = culane_rows(height)
        line_width = max(1.0, self.line_width * width / CULANE_WIDTH)
        curves = [maps.curves(rows, self.threshold) for maps in (prediction, target)]
        self.predicted += (~curves[0].isnan()).any(2).sum()
        self.labelled += (~curves[1].isnan()).any(2).sum()
        # Batches of large images are drawn in parts.
        for part in torch.arange(batch).split(max(1, 2**25 // (2 * lanes * height * width))):
            drawn = (draw_lanes(c[part].flatten(0, 1), rows, height, width, line_width).unflatten(0, (len(part), lanes)) for c in curves)
            for iou in pairwise_iou(*drawn).cpu():
                self.matched += count_matches(iou, self.iou_threshold)

    def compute(self) -> Tensor:
        return 2 * self.matched / (self.predicted + self.labelled).clamp(min=1)


def tusimple_scores(
    predicted: Tensor,  # [B, P, R] columns, NaN where a lane has no point
    labelled: Tensor,  # [B, T, R]
    rows: Tensor,  # [R]
    pixels: float = 20.0,
    match: float = 0.85,
    variant: Literal["points", "script"] = "points",
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Accuracy, false positives and false negatives of TuSimple for each image, float32 [B].

    A point of a labelled lane is correct if the horizontal distance of the predicted lane is less
    than ``pixels / cos(angle)`` at its row. The angle is the arctangent of the slope k of the least
    squares line x = k y + c through the points of the labelled lane, so that the threshold is
    ``pixels * sqrt(1 + k^2)``. Each labelled lane is compared with the predicted lane that has the
    largest fraction of correct points, and is found if this fraction is at least ``match``.

    "points" counts the points of the labelled lanes: the accuracy is the number of correct points
    divided by the number of points; the false positives are the fraction of the predicted lanes
    that are not the best one of a labelled lane that is found, so that a second prediction of the
    same lane is a false positive; and the false negatives are the fraction of the labelled lanes
    that are not found. Accuracy and false negatives are NaN for an image without labelled lanes,
    and false positives are 0 for an image without predicted lanes.

    "script" follows the official ``evaluate/lane.py`` of the benchmark: rows at which both lanes
    have no point are correct too, and fractions are of all rows; the accuracy is the mean of the
    fractions of the labelled lanes; of more than four labelled lanes the worst is left out, and one
    that is not found is forgiven; the false positives are (predicted - found) / predicted; more
    than two predicted lanes too many give the scores 0, 0 and 1.
    """
    is_labelled, is_predicted = ~labelled.isnan(), ~predicted.isnan()
    has_label, has_prediction = is_labelled.any(2), is_predicted.any(2)  # [B, T], [B, P]
    points = is_labelled.sum(2)
    y = torch.where(is_labelled, rows, 0)
    mean_x, mean_y = labelled.nansum(2) / points.clamp(min=1), y.sum(2) / points.clamp(min=1)
    y = torch.where(is_labelled, rows - mean_y[..., None], 0)
    slope = (y * (labelled - mean_x[..., None])).nansum(2) / y.square().sum(2).clamp(min=1e-12)
    limit = pixels * (1 + slope.square()).sqrt()
    correct = (predicted[:, :, None] - labelled[:, None]).abs() < limit[:, None, :, None]  # [B, P, T, R]
    total = points
    if variant == "script":
        correct = correct | ~(is_predicted[:, :, None] | is_labelled[:, None])
        total = torch.full_like(points, labelled.shape[2])
    valid = has_prediction[:, :, None] & has_label[:, None]
    # Integers decide whether a lane is found: 17 of 20 points are the fraction 0.85.
    hits = torch.where(valid, correct.sum(3), 0)  # [B, P, T]
    is_match = valid & (hits >= match * total[:, None] - 1e-6)
    best = hits.amax(1) if hits.shape[1] else hits.new_zeros(has_label.shape)  # [B, T]
    found = is_match.any(1)
    num_labels, num_predictions = has_label.sum(1), has_prediction.sum(1)
    missed = (has_label & ~found).sum(1)
    if variant == "points":
        # A found lane makes its best predicted lane right, and no other one.
        is_best = torch.zeros_like(has_prediction)
        if hits.shape[1] and hits.shape[2]:
            number = torch.arange(hits.shape[1], device=hits.device)[None, :, None]
            is_best = ((torch.where(is_match, hits, -1).argmax(1)[:, None] == number) & found[:, None]).any(2)
        false_positives = (has_prediction & ~is_best).sum(1) / num_predictions.clamp(min=1)
        return best.sum(1) / points.sum(1), false_positives, missed / num_labels
    fractions = torch.where(has_label, best / total, torch.inf)
    is_many = num_labels > 4
    worst = torch.where(is_many, fractions.amin(1), 0) if fractions.shape[1] else fractions.new_zeros(len(fractions))
    lanes = num_labels.clamp(1, 4)
    accuracy = (torch.where(has_label, fractions, 0).sum(1) - worst) / lanes
    false_positives = (num_predictions - found.sum(1)) / num_predictions.clamp(min=1)
    false_negatives = (missed - (is_many & (missed > 0)).long()) / lanes
    too_many = num_predictions > num_labels + 2
    return torch.where(too_many, 0, accuracy), torch.where(too_many, 0, false_positives), torch.where(too_many, 1.0, false_negatives)


class TuSimpleScore(Metric):
    """One of the three scores of TuSimple (:func:`tusimple_scores`), as a mean over the images.

    The curves are extracted at :func:`tusimple_rows`
    (:func:`kdkernels.tasks.lane_curves.extract_columns`), and their coordinates are scaled to
    images of 720 x 1280 pixels. With the variant "points", images without
    labelled lanes are left out of the mean of the accuracy and of the false negatives. The score is
    0 if no image counts.

    Args:
        score: "accuracy", "false_positives" or "false_negatives".
        threshold: probability above which a pixel can be a point of a predicted lane.
        variant: "points" or "script", see :func:`tusimple_scores`.
    """

    full_state_update = False
    is_differentiable = False
    total: Tensor
    images: Tensor

    def __init__(
        self,
        score: Literal["accuracy", "false_positives", "false_negatives"] = "accuracy",
        threshold: float = 0.3,
        variant: Literal["points", "script"] = "points",
    ):
        super().__init__()
        names = ("accuracy", "false_positives", "false_negatives")
        if score not in names:
            raise ValueError(f"score must be one of {names}, got {score!r}")
        if variant not in ("points", "script"):
            raise ValueError(f'variant must be "points" or "script", got {variant!r}')
        self.number, self.threshold, self.variant = names.index(score), threshold, variant
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: LaneMaps, target: LaneMaps) -> None:
        height, width = prediction.probability.shape[2:]
        rows = tusimple_rows(height)
        scale_y, scale_x = TUSIMPLE_SIZE[0] / height, TUSIMPLE_SIZE[1] / width
        curves = [maps.curves(rows, self.threshold) * scale_x for maps in (prediction, target)]
        y = torch.tensor(rows, device=curves[0].device, dtype=torch.float32) * scale_y
        values = tusimple_scores(curves[0], curves[1], y, variant=cast(Literal["points", "script"], self.variant))[self.number]
        self.total += values.nansum()
        self.images += (~values.isnan()).sum()

    def compute(self) -> Tensor:
        return self.total / self.images.clamp(min=1)


class LaneIoU(Metric):
    """IoU of the predicted and the labelled lane pixels, of all lanes together.

    Intersection and union are counted over all images, then divided. The IoU is 0 if there is
    neither a predicted nor a labelled lane pixel.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    intersection: Tensor
    union: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("intersection", "union"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: LaneMaps, target: LaneMaps) -> None:
        predicted, labelled = prediction.classes > 0, target.classes > 0
        self.intersection += (predicted & labelled).sum()
        self.union += (predicted | labelled).sum()

    def compute(self) -> Tensor:
        return self.intersection / self.union.clamp(min=1)


class LanePixelAccuracy(Metric):
    """Fraction of the labelled lane pixels that are predicted as a lane, of all lanes together.

    This is the accuracy in the SAD paper's table of BDD100K: its code counts only the pixels of the
    labelled lanes, TP / (TP + FN). It is 0 if no pixel is labelled as a lane.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    labelled: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("correct", "labelled"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: LaneMaps, target: LaneMaps) -> None:
        is_lane = target.classes > 0
        self.correct += ((prediction.classes > 0) & is_lane).sum()
        self.labelled += is_lane.sum()

    def compute(self) -> Tensor:
        return self.correct / self.labelled.clamp(min=1)
