"""Losses of networks that are trained together: FFL, deep mutual learning and ONE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..ops import checks
from ..ops.registration import clone_inference_tensor
from ..ops.temperature_kl import temperature_kl
from .features import check_labels, cross_entropy
from .loss_module import LossModule

DMLVariant = Literal["paper", "symmetric"]


def ffl_loss(
    logits: Sequence[Tensor],  # [B, K] or [B, K, ...] each, of the sub-networks
    fused_logits: Tensor,  # in the shape of the logits
    labels: Tensor,  # [B] or [B, ...] int64, or probabilities in the shape of the logits
    *,
    temperature: float = 3.0,
    alpha: float = 1.0,
    target_eps: float = 1e-7,
) -> Tensor:
    r"""Loss of feature fusion learning (FFL, Kim, Hyun, Chung, Kwak, ICPR 2020).

    Sub-networks with the logits z_k and a classifier of their fused features, with the logits z_f,
    teach each other. The mean of the logits z_k, the ensemble z_e, teaches the fused classifier,
    and the fused classifier teaches each sub-network:

    .. math::

        \sum_k CE(z_k, y) + CE(z_f, y)
        + \alpha T^2 \big( KL(p_e \| p_f) + \sum_k KL(p_f \| p_k) \big)

    where p are predictions softened by the temperature T. The targets p_e in the first and p_f in
    the other divergences are detached.

    The authors' code adds ``target_eps`` to each target probability, and multiplies alpha by a ramp
    (:func:`ffl_ramp`). Neither is in the paper; ``target_eps=0`` is its formula.

    Args:
        logits: of at least two sub-networks, with the classes in dimension 1.
        fused_logits: of the fused classifier.
        labels: class indices, or probabilities.
        temperature: T > 0.
        alpha: weight of the divergences.
        target_eps: number >= 0, added to each target probability.

    Returns:
        0-dim, float32 or float64.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are fewer than two sub-networks, shapes differ, or an option is out of
            range.

    References:
        J. Kim, M. Hyun, I. Chung, N. Kwak. Feature Fusion for Online Mutual Knowledge Distillation.
        ICPR 2020. https://arxiv.org/abs/1904.09058
    """
    logits = checked_logits(logits, labels, temperature, alpha)
    _check_like("fused_logits", fused_logits, logits[0])
    checks.not_negative("target_eps", target_eps)
    labels = clone_inference_tensor(labels)
    total = cast(Tensor, sum(cross_entropy(z, labels) for z in (*logits, fused_logits)))
    if alpha:
        total = total + alpha * _divergences(*ffl_pairs(logits, fused_logits), temperature, target_eps=target_eps)
    return total


def ffl_pairs(logits: Sequence[Tensor], fused_logits: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits that learn in FFL, and the logits that each of them learns from."""
    ensemble = torch.stack(list(logits)).mean(0)
    return [fused_logits, *logits], [ensemble] + [fused_logits] * len(logits)


def ffl_ramp(epoch: int, ramp_epochs: int = 80) -> float:
    r"""Return the factor of alpha in an epoch, counted from 0: :math:`\exp(-5 (1-t)^2)`.

    Here t = epoch / ramp_epochs; from epoch ``ramp_epochs`` on the factor is 1. FFL and ONE use 80
    of 300 epochs in their code, and no ramp in their papers (``ramp_epochs=0``).

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is negative.
    """
    for name, value in {"epoch": epoch, "ramp_epochs": ramp_epochs}.items():
        checks.integer(name, value)
        checks.not_negative(name, value)
    return math.exp(-5 * (1 - epoch / ramp_epochs) ** 2) if epoch < ramp_epochs else 1.0


def dml_loss(
    logits: Sequence[Tensor],  # [B, K] or [B, K, ...] each
    labels: Tensor,  # [B] or [B, ...] int64, or probabilities in the shape of the logits
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
    variant: DMLVariant = "paper",
) -> Tensor:
    r"""Loss of deep mutual learning (Zhang, Xiang, Hospedales, Lu, CVPR 2018): n networks.

    ``"paper"``: each network learns from the predictions of the others, which are detached:

    .. math:: \sum_k \Big( CE(z_k, y) + \frac{\alpha T^2}{n-1} \sum_{l \ne k} KL(p_l \| p_k) \Big)

    ``"symmetric"``: the mean of both divergences of each pair, with a gradient to both (the public
    TensorFlow code KD_methods_with_TF, for two networks):

    .. math::

        \sum_k CE(z_k, y) + \frac{\alpha T^2}{n-1} \sum_{k < l} \frac{1}{2}
        \big( KL(p_l \| p_k) + KL(p_k \| p_l) \big)

    Args:
        logits: of at least two networks, with the classes in dimension 1.
        labels: class indices, or probabilities.
        temperature: T > 0; 1 in the paper.
        alpha: weight of the divergences.
        variant: "paper" or "symmetric".

    Returns:
        0-dim, float32 or float64.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are fewer than two networks, shapes differ, or an option is out of range.

    References:
        Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu. Deep Mutual Learning. CVPR 2018.
        https://arxiv.org/abs/1706.00384
    """
    logits = checked_logits(logits, labels, temperature, alpha)
    checks.choice("variant", variant, ("paper", "symmetric"))
    labels = clone_inference_tensor(labels)
    total = cast(Tensor, sum(cross_entropy(z, labels) for z in logits))
    if alpha:
        weight = dml_weight(alpha, len(logits), variant)
        total = total + weight * _divergences(*dml_pairs(logits), temperature, detached=variant == "paper")
    return total


def dml_pairs(logits: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits that learn in mutual learning, and the logits that they learn from."""
    pairs = [(learner, target) for i, learner in enumerate(logits) for j, target in enumerate(logits) if i != j]
    return [learner for learner, _ in pairs], [target for _, target in pairs]


def dml_weight(alpha: float, count: int, variant: DMLVariant) -> float:
    """Return the weight of the sum of the divergences of all ordered pairs of networks."""
    return alpha / (count - 1) * (1.0 if variant == "paper" else 0.5)


def one_loss(
    logits: Sequence[Tensor],  # [B, K] or [B, K, ...] each, of the branches
    gated_logits: Tensor,  # in the shape of the logits
    labels: Tensor,  # [B] or [B, ...] int64, or probabilities in the shape of the logits
    *,
    temperature: float = 3.0,
    alpha: float = 1.0,
) -> Tensor:
    r"""Loss of ONE, on-the-fly native ensemble (Lan, Zhu, Gong, NeurIPS 2018).

    Branches with the logits z_k learn from their gated ensemble, the logits
    :math:`z_e = \sum_k g_k z_k` with a gate g for each sample:

    .. math:: \sum_k CE(z_k, y) + CE(z_e, y) + \alpha T^2 \sum_k KL(p_e \| p_k)

    where p_e is detached in the divergences.

    Args:
        logits: of at least two branches, with the classes in dimension 1.
        gated_logits: of the gated ensemble.
        labels: class indices, or probabilities.
        temperature: T > 0; 3 in the paper.
        alpha: weight of the divergences. The authors' code multiplies it by a ramp
            (:func:`ffl_ramp`).

    Returns:
        0-dim, float32 or float64.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are fewer than two branches, shapes differ, or an option is out of range.

    References:
        X. Lan, X. Zhu, S. Gong. Knowledge Distillation by On-the-Fly Native Ensemble. NeurIPS 2018.
        https://arxiv.org/abs/1806.04606
    """
    logits = checked_logits(logits, labels, temperature, alpha)
    _check_like("gated_logits", gated_logits, logits[0])
    labels = clone_inference_tensor(labels)
    total = cast(Tensor, sum(cross_entropy(z, labels) for z in (*logits, gated_logits)))
    if alpha:
        total = total + alpha * _divergences(logits, [gated_logits] * len(logits), temperature)
    return total


def checked_logits(logits: Sequence[Tensor], labels: Tensor, temperature: float, alpha: float) -> list[Tensor]:
    """Return the logits of at least two networks as a list; check them, the labels and options."""
    checks.positive("temperature", temperature)
    checks.not_negative("alpha", alpha)
    if isinstance(logits, Tensor) or not isinstance(logits, Sequence):
        raise TypeError(f"logits must be a list of logits, one tensor for each network, got {checks.kind(logits)}")
    if len(logits) < 2:
        raise ValueError(f"logits must be those of at least two networks, got {len(logits)}")
    for i, z in enumerate(logits):
        checks.tensor(f"logits[{i}]", z, "logits")
    if logits[0].dim() < 2:
        raise ValueError(f"logits must have the shape [B, K, ...], got {tuple(logits[0].shape)}")
    for i, z in enumerate(logits[1:], 1):
        _check_like(f"logits[{i}]", z, logits[0])
    check_labels(labels, "logits", logits[0], 1)
    return list(logits)


def _check_like(name: str, value: Tensor, first: Tensor) -> None:
    checks.tensor(name, value, "logits")
    if value.shape != first.shape or value.device != first.device:
        raise ValueError(
            f"{name} must have the shape {tuple(first.shape)} of logits[0] on {first.device}, got {tuple(value.shape)} on {value.device}"
        )


def _divergences(
    learners: Sequence[Tensor], targets: Sequence[Tensor], temperature: float, *, detached: bool = True, target_eps: float = 0.0
) -> Tensor:
    """Return the sum of T^2 KL(target || learner) over pairs, by one call with the stacked rows."""
    target = torch.cat(list(targets))
    if detached:
        target = target.detach()
    mean = temperature_kl(torch.cat(list(learners)), target, temperature, dim=1, target_eps=target_eps)
    return len(learners) * mean


class FFLLoss(LossModule):
    """Module of :func:`ffl_loss` with fixed options.

    Example: ``FFLLoss(temperature=3.0)([logits1, logits2], fused_logits, labels)``.

    Args:
        **options: the keyword options of :func:`ffl_loss`: temperature, alpha, target_eps.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        ffl_loss([torch.zeros(1, 1)] * 2, torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), **options)  # validate the options

    def forward(self, logits: Sequence[Tensor], fused_logits: Tensor, labels: Tensor) -> Tensor:
        return ffl_loss(logits, fused_logits, labels, **self.options)


class DMLLoss(LossModule):
    """Module of :func:`dml_loss` with fixed options.

    Example: ``DMLLoss()([logits1, logits2], labels)``.

    Args:
        **options: the keyword options of :func:`dml_loss`: temperature, alpha, variant.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        dml_loss([torch.zeros(1, 1)] * 2, torch.zeros(1, dtype=torch.int64), **options)  # validate the options

    def forward(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        return dml_loss(logits, labels, **self.options)


class ONELoss(LossModule):
    """Module of :func:`one_loss` with fixed options.

    Example: ``ONELoss()([logits1, logits2], gated_logits, labels)``.

    Args:
        **options: the keyword options of :func:`one_loss`: temperature, alpha.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        one_loss([torch.zeros(1, 1)] * 2, torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), **options)  # validate the options

    def forward(self, logits: Sequence[Tensor], gated_logits: Tensor, labels: Tensor) -> Tensor:
        return one_loss(logits, gated_logits, labels, **self.options)
