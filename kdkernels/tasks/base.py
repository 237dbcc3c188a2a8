"""The interface of a task: logits, labels, losses and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from ..nn.outputs import find_logits
from ..ops.temperature_kl import temperature_kl

if TYPE_CHECKING:
    from torchmetrics import Metric

Combine = Literal["probabilities", "divergences"]


class Task:
    """Base class of tasks: the meaning of the labels of a data set.

    The methods of :mod:`kdkernels.distill` use the functions of their task, so every method works
    on every task.

    Classes are in dimension 1 of the logits. A row is one position in all other dimensions, that
    is, one prediction of a class distribution (for an image or a pixel). A batch is a dict with
    ``image`` and, if the data have labels, ``label``.

    Losses are means over the samples of a batch, and over all rows of a sample, including rows
    without a label. Thus every labelled row has the same weight, and the loss does not depend on
    how a batch is split into micro-batches and processes. A mean over the labelled rows of a batch
    would depend on the split.

    Attributes:
        main_metric: key of :meth:`metrics` that selects the best checkpoint; higher is better.
        rows: name of the rows in messages, for example "images".
        logits_shape: shape of the logits in messages.
    """

    main_metric: str
    rows: str
    logits_shape: str

    def logits(self, output: object) -> Tensor:
        """Return the logits in the output of a network (:func:`find_logits`).

        Raises:
            TypeError: no logits were found; lists what the network returned.
        """
        return find_logits(output)

    def check_logits(self, logits: Tensor, image: Tensor) -> bool:
        """Return whether logits of this shape fit these images."""
        raise NotImplementedError

    def check_output(self, output: object, image: Tensor) -> None:
        """Raise ValueError if outputs other than the logits do not fit these images.

        Called before training, after :meth:`check_logits`.
        """

    def check_labels(self, label: Tensor, image: Tensor, num_classes: int, stage: str, values: bool = True) -> None:
        """Check that the labels of a batch fit its images and the networks' classes.

        Args:
            label, image: labels and images of the batch.
            num_classes: number of classes K of the networks.
            stage: name of the stage in messages, such as "training" or "validation".
            values: whether to check the values in addition to the shape. On a GPU, this waits for
                the device.

        Raises:
            ValueError: the labels have another shape, or values that are not classes.
        """
        raise NotImplementedError

    def check_data(self, data: object) -> None:
        """Raise ValueError if the options of a data module do not fit this task.

        Called before training. ``data`` is ``None`` if there is no data module.
        """

    def label_loss(self, logits: Tensor, batch: dict, *, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
        """Compute the loss on the labels: the mean, or the sum, of the losses of the samples.

        Returns:
            0-dim, float32 or float64.
        """
        raise NotImplementedError

    def output_losses(self, output: object, batch: dict) -> dict[str, Tensor]:
        """Return further losses on the labels by name, for which the logits may not be enough.

        Every method adds them to its loss, with the weight of :meth:`label_loss`. Each is a mean
        over the samples of the batch.

        Args:
            output: what the network returned; or the logits alone, if a method does not have the
                rest of the output.
            batch: a batch with labels.

        Returns:
            0-dim tensors, float32 or float64. By default there are none.
        """
        return {}

    def predictions(self, output: object) -> dict[str, Tensor]:
        """Return what ``trainer.predict`` returns of an output: by default the ``logits``."""
        return {"logits": self.logits(output)}

    def mask(self, batch: dict) -> Tensor | None:
        """Return the rows that :meth:`divergence` includes, or ``None`` for all.

        Returns:
            bool, in the shape of the logits without dimension 1.
        """
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
        direction: str = "forward",
        target_eps: float = 0.0,
    ) -> Tensor:
        r"""T^2 KL between the softened predictions of teacher and student, without ignored rows.

        See :func:`kdkernels.temperature_kl`.

        Args:
            student: logits.
            teacher: logits, or a list of the logits of several teachers.
            temperature: T > 0.
            batch: its labels determine the ignored rows. Without labels, no row is ignored.
            combine: "probabilities" compares the student with the mean of the teachers' softened
                probabilities, ``sum_i w_i p_i``; "divergences" is the mean of the divergences from
                each teacher, ``sum_i w_i KL_i``.
            weights: positive weights w_i of the teachers, which are scaled so that their sum is 1.
                By default all are equal.
            direction: "forward" is KL(teacher || student), "reverse" KL(student || teacher).
            target_eps: number added to each of the teacher's probabilities.

        Returns:
            0-dim: the sum over the rows that are not ignored, divided by the number of all rows.

        Raises:
            ValueError: shapes differ, ``combine`` is unknown, or the weights do not fit the
                teachers.
        """
        mask = self.mask(batch)
        normalizer = None if mask is None else float(mask.numel())

        def divergence_from(target: Tensor) -> Tensor:
            return temperature_kl(student, target, temperature, dim=1, direction=direction, target_eps=target_eps, mask=mask, normalizer=normalizer)

        if isinstance(teacher, Tensor):
            return divergence_from(teacher)
        shares = teacher_shares(len(teacher), weights)
        if len(teacher) == 1:
            return divergence_from(teacher[0])
        if combine == "probabilities":
            return divergence_from(mean_teacher(teacher, temperature, shares))
        if combine == "divergences":
            return cast(Tensor, sum(share * divergence_from(t) for share, t in zip(shares, teacher, strict=True)))
        raise ValueError(f"combine must be 'probabilities' or 'divergences', got {combine!r}")

    def metrics(self, num_classes: int) -> dict[str, Metric]:
        """Return new torchmetrics by name; :meth:`output_metric_inputs` returns their inputs."""
        raise NotImplementedError

    def training_metrics(self, num_classes: int) -> dict[str, Metric]:
        """Return the metrics that are updated in each training step.

        By default all :meth:`metrics`. A task leaves out those that cost much, or that wait for the
        device.
        """
        return self.metrics(num_classes)

    def metric_inputs(self, logits: Tensor, batch: dict) -> tuple[Tensor, Tensor]:
        """Return the predicted classes and the labels, both int64 in the shape of the rows."""
        raise NotImplementedError

    def output_metric_inputs(self, output: object, batch: dict) -> tuple[Any, Any]:
        """Return the prediction and the target with which the :meth:`metrics` are updated.

        By default, they are the :meth:`metric_inputs` of the logits.

        Args:
            output: what the network returned, or the logits alone.
            batch: a batch with labels.
        """
        return self.metric_inputs(self.logits(output), batch)

    def count_correct(self, logits: Tensor, batch: dict) -> tuple[float, int]:
        """Count the labelled rows that are predicted correctly, and all labelled rows."""
        prediction, target = self.metric_inputs(logits, batch)
        mask = self.mask(batch)
        correct = prediction == target
        if mask is None:
            return float(correct.sum()), correct.numel()
        return float((correct & mask).sum()), int(mask.sum())

    def mirrored_label(self, label: Tensor) -> Tensor:
        """Return the label of the image mirrored left to right."""
        return label


def teacher_shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """Return the weights of ``count`` teachers, scaled so that their sum is 1.

    Raises:
        TypeError: ``weights`` is not a list of numbers.
        ValueError: the number of weights is not ``count``, or a weight is not positive and finite.
    """
    weights = [1.0] * count if weights is None else weights
    if isinstance(weights, str) or not isinstance(weights, Sequence) or not all(isinstance(weight, (int, float)) for weight in weights):
        raise TypeError(f"combine_weights must be a list of numbers, got {weights!r}")
    if len(weights) != count:
        raise ValueError(f"combine_weights must have one weight for each of the {count} teachers, got {len(weights)}")
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"combine_weights must be > 0 and finite, got {list(weights)}")
    return [weight / sum(weights) for weight in weights]


def mean_teacher(
    teachers: Sequence[Tensor],  # [B, K, ...] each
    temperature: float,
    shares: Sequence[float],  # sum 1
) -> Tensor:  # [B, K, ...]
    r"""Return logits whose softened probabilities are the mean of those of the teachers.

    :math:`T \log \sum_i w_i \mathrm{softmax}(t_i / T)`
    """
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in teachers) else torch.float32
    weighted = [torch.log_softmax(t.to(dtype) / temperature, 1) + math.log(share) for t, share in zip(teachers, shares, strict=True)]
    return torch.stack(weighted).logsumexp(0) * temperature
