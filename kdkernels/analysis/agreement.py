"""How far a student agrees with its teacher: predictions, calibration, and features (CKA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import checks

__all__ = ["MinibatchCKA", "calibration_error", "fidelity"]


def fidelity(logits: Tensor, teacher_logits: Tensor) -> Tensor:  # [N, K] each -> []
    """Share of samples for which student and teacher predict the same class, in [0, 1].

    Stanton et al., Does Knowledge Distillation Really Work? (NeurIPS 2021), call this the average
    top-1 agreement.

    Raises:
        TypeError: an argument is not a tensor of a supported dtype.
        ValueError: the shapes differ or are not [N, K] with N >= 1, or there is a NaN.
    """
    checks.tensor("logits", logits, "logits")
    checks.tensor("teacher_logits", teacher_logits, "logits")
    if logits.dim() != 2 or logits.shape != teacher_logits.shape or not logits.numel():
        raise ValueError(f"logits and teacher_logits must have the same shape [N, K], got {list(logits.shape)} and {list(teacher_logits.shape)}")
    _require_numbers("logits", logits)
    _require_numbers("teacher_logits", teacher_logits)
    return (logits.argmax(1) == teacher_logits.argmax(1)).double().mean()


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> Tensor:  # [N, K], [N] -> []
    """Expected calibration error: mean distance of confidence and accuracy over bins, in [0, 1].

    The confidence is the largest probability. This is ``multiclass_calibration_error`` of
    torchmetrics with the l1 norm (Guo et al., On Calibration of Modern Neural Networks, ICML 2017).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the shapes do not fit, a label is no class in [0, K), there is a NaN, or
            ``bins`` < 1.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    checks.tensor("logits", logits, "logits")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be a tensor of integers, got {checks.kind(labels)}")
    checks.integer("bins", bins)
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not logits.numel():
        raise ValueError(f"logits must have the shape [N, K] and labels [N], got {list(logits.shape)} and {list(labels.shape)}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if not (labels.ge(0) & labels.lt(logits.shape[1])).all():
        raise ValueError(f"labels must lie in [0, {logits.shape[1]}): leave out samples without a label")
    _require_numbers("logits", logits)
    return multiclass_calibration_error(logits.float().softmax(1), labels, logits.shape[1], n_bins=bins, norm="l1")


def _require_numbers(name: str, logits: Tensor) -> None:
    if logits.isnan().any():
        raise ValueError(f"{name} must not have NaN")


class MinibatchCKA(nn.Module):
    r"""Linear centered kernel alignment of two layers, from minibatches.

    The similarity :math:`HSIC(K, L) / \sqrt{HSIC(K, K) HSIC(L, L)}` of the Gram matrices K and L of
    the features, with the unbiased estimator HSIC_1 (Song et al. 2012), averaged over batches
    (Nguyen, Raghu, Kornblith, ICLR 2021). It is 1 for features that are equal up to rotation and
    scale, and about 0 for independent ones; because it is unbiased, it may be slightly negative. It
    is NaN if the features of a layer are the same for all samples. Sums are in float64, also after
    ``half()``.

    A batch needs 4 samples: use a loader with ``drop_last=True``.

    >>> cka = MinibatchCKA()
    >>> for images in batches:
    ...     cka.update(student_features(images), teacher_features(images))
    >>> cka.compute()
    """

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # of HSIC(K, L), HSIC(K, K) and HSIC(L, L)
        self.batches = 0

    def _apply(self, fn: Any, recurse: bool = True) -> MinibatchCKA:
        sums = self.sums
        super()._apply(fn, recurse)
        self.sums = sums.to(self.sums.device)  # in float64, also after half()
        return self

    @torch.no_grad()
    def update(self, first: Tensor, second: Tensor) -> None:
        """Add a batch of features [B, ...] each, B >= 4.

        Raises:
            TypeError: the features are no tensors.
            ValueError: the batches differ in length or have fewer than 4 samples.
        """
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            raise TypeError(f"features must be tensors, got {checks.kind(first)} and {checks.kind(second)}")
        if first.dim() < 2 or second.dim() < 2 or len(first) != len(second) or len(first) < 4:
            raise ValueError(f"features must be two batches [B, ...] of the same B >= 4, got {list(first.shape)} and {list(second.shape)}")
        one, two = (_gram(x) for x in (first, second))
        values = torch.stack([_hsic(one, two), _hsic(one, one), _hsic(two, two)])
        self.sums += values.to(self.sums.device)
        self.batches += 1

    def compute(self) -> Tensor:
        """Return the similarity [] of all batches so far.

        Raises:
            RuntimeError: there was no batch.
        """
        if not self.batches:
            raise RuntimeError("MinibatchCKA has no batch yet: call update first")
        return self.sums[0] / (self.sums[1] * self.sums[2]).sqrt()

    def reset(self) -> None:
        """Forget all batches."""
        self.sums.zero_()
        self.batches = 0


def _gram(features: Tensor) -> Tensor:
    """Return the Gram matrix [B, B] of the features with a zero diagonal."""
    rows = features.detach().flatten(1).double()
    rows = rows - rows.mean(0)  # changes nothing but the rounding: HSIC_1 does not depend on it
    return (rows @ rows.T).fill_diagonal_(0)


def _hsic(one: Tensor, two: Tensor) -> Tensor:
    """Return the unbiased estimate HSIC_1 of two Gram matrices with zero diagonals."""
    n = len(one)
    total = (one * two).sum() + one.sum() * two.sum() / ((n - 1) * (n - 2)) - 2 * (one.sum(0) @ two.sum(1)) / (n - 2)
    return total / (n * (n - 3))
