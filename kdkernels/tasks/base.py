"""The interface of a task: logits, labels, losses and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..ops.temperature_kl import temperature_kl
from .outputs import find_logits

if TYPE_CHECKING:
    from torchmetrics import Metric

Combine = Literal["probabilities", "divergences"]


class Task:
    """What the labels of a data set mean. Methods of :mod:`kdkernels.distill` ask their task, so each method works on every task.

    Classes lie in dimension 1 of the logits; every other position is a row: one prediction of a class distribution (an image, a pixel).
    A batch is a dict with ``image`` and, if the data have labels, ``label``.

    Losses are means over the samples of a batch, and within a sample over all its rows, whether they have a label or not. So every
    labelled row has the same weight, and the loss does not depend on how a batch is split into micro-batches and processes. The mean
    over the labelled rows of a batch would depend on it.

    Attributes:
        main_metric: the metric, among the keys of :meth:`metrics`, by which the best checkpoint is chosen; higher is better.
        rows: what a row is, for messages.
        logits_shape: the shape of the logits, for messages.
    """

    main_metric: str
    rows: str
    logits_shape: str

    def logits(self, output: object) -> Tensor:
        """The logits in what a network returned (:func:`find_logits`).

        Raises:
            TypeError: no logits were found; lists what the network returned.
        """
        return find_logits(output)

    def check_logits(self, logits: Tensor, image: Tensor) -> bool:
        """Returns whether logits of this shape fit these images."""
        raise NotImplementedError

    def check_labels(self, label: Tensor, image: Tensor, num_classes: int, stage: str, values: bool = True) -> None:
        """Check the labels of a batch against its images and the networks' classes.

        Args:
            label, image: of the batch.
            num_classes: K of the networks.
            stage: what the batch is for ("training", "validation"), for the message.
            values: whether to check the values too, not only the shape. On a GPU this waits for the device.

        Raises:
            ValueError: labels of another shape, or outside the classes.
        """
        raise NotImplementedError

    def label_loss(self, logits: Tensor, batch: dict, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """The loss on the labels: the mean over the samples of the batch, or the sum of the samples' losses. 0-dim, float32 or float64."""
        raise NotImplementedError

    def mask(self, batch: dict) -> Tensor | None:
        """bool, the shape of the logits without dimension 1: rows that count in :meth:`divergence`. ``None``: all."""
        return None

    def divergence(
        self,
        student: Tensor,  # [B, K, ...]
        teacher: Tensor | Sequence[Tensor],  # [B, K, ...] each
        temperature: float,
        batch: dict,
        *,
        combine: Combine = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> Tensor:
        r"""T^2 KL of the softened predictions of teacher and student (:func:`kdkernels.temperature_kl`), without ignored rows.

        Args:
            student: logits.
            teacher: logits, or those of several teachers. Not differentiated where there are several.
            temperature: T > 0.
            batch: holds the labels, which say which rows are ignored; a batch without labels ignores none.
            combine: "probabilities" compares the student with the mean of the teachers' softened probabilities, ``sum_i w_i p_i``;
                "divergences" is the mean of the divergences from each teacher, ``sum_i w_i KL_i``.
            weights: w_i of the teachers, positive; their sum is scaled to 1. By default all are equal.

        Returns:
            0-dim: the sum over the rows that count, divided by the number of all rows.

        Raises:
            ValueError: shapes that differ, an unknown ``combine``, or weights that do not fit the teachers.
        """
        mask = self.mask(batch)
        options = {"dim": 1, "mask": mask, "normalizer": None if mask is None else float(mask.numel())}
        if isinstance(teacher, Tensor):
            return temperature_kl(student, teacher, temperature, **options)
        shares = teacher_shares(len(teacher), weights)
        if len(teacher) == 1:
            return temperature_kl(student, teacher[0], temperature, **options)
        if combine == "probabilities":
            return temperature_kl(student, mean_teacher(teacher, temperature, shares), temperature, **options)
        if combine == "divergences":
            return sum(share * temperature_kl(student, t, temperature, **options) for share, t in zip(shares, teacher, strict=True))
        raise ValueError(f"combine must be 'probabilities' or 'divergences', got {combine!r}")

    def metrics(self, num_classes: int) -> dict[str, Metric]:
        """New torchmetrics by name; each is updated with what :meth:`metric_inputs` returns."""
        raise NotImplementedError

    def metric_inputs(self, logits: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        """Predicted and labelled classes, both int64 of the shape of the rows."""
        raise NotImplementedError

    def count_correct(self, logits: Tensor, batch: dict) -> tuple[float, int]:
        """The number of labelled rows whose predicted class is the label's, and the number of labelled rows."""
        prediction, target = self.metric_inputs(logits, batch)
        mask = self.mask(batch)
        correct = prediction == target
        if mask is None:
            return float(correct.sum()), correct.numel()
        return float((correct & mask).sum()), int(mask.sum())

    def mirrored_label(self, label: Tensor) -> Tensor:
        """The label of an image that was mirrored left to right."""
        return label


def teacher_shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """The weights of ``count`` teachers, scaled so that their sum is 1.

    Raises:
        ValueError: another number of weights, or one that is not positive and finite.
    """
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ValueError(f"there must be one weight for each of the {count} teachers, got {len(weights)}")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"the teachers' weights must be > 0 and finite, got {weights}")
    return [weight / sum(weights) for weight in weights]


def mean_teacher(
    teachers: Sequence[Tensor],  # [B, K, ...] each
    temperature: float,
    shares: Sequence[float],  # sum 1
) -> Tensor:  # [B, K, ...]
    r"""Logits whose softened probabilities are the mean of the teachers': :math:`T \log \sum_i w_i \mathrm{softmax}(t_i / T)`."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in teachers) else torch.float32
    weighted = [torch.log_softmax(t.to(dtype) / temperature, 1) + math.log(share) for t, share in zip(teachers, shares, strict=True)]
    return torch.stack(weighted).logsumexp(0) * temperature
