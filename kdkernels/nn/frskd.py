"""Feature refinement via self-knowledge distillation, FRSKD (Ji et al., CVPR 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..ops import checks
from ..ops.registration import clone_inference_tensor
from ..ops.temperature_kl import temperature_kl
from .attention import attention_transfer_losses
from .features import check_batch_size, check_labels, cross_entropy, features_of_layers
from .loss_module import LossModule
from .overhaul import overhaul_loss

FeatureLoss = Literal["att", "fit", "od"]
FRSKDVariant = Literal["authors", "paper"]
_FEATURE_LOSSES = ("att", "fit", "od")
# Directions of temperature_kl: KL(p_t || p_c), and KL(p_c || p_t).
DIRECTIONS = {"authors": "forward", "paper": "reverse"}


def frskd_feature_losses(
    features: Sequence[Tensor],  # [B, C_i, H_i, W_i] each
    teacher_features: Sequence[Tensor],  # [B, D_i, H_i, W_i] each
    feature_loss: FeatureLoss = "att",
    margins: Sequence[Tensor] | None = None,  # [D_i] each
    variant: FRSKDVariant = "authors",
) -> list[Tensor]:  # one 0-dim tensor for each layer
    """Compare the features of each layer with the refined features, which are detached.

    ================ ========================================================================
    ``feature_loss`` distance of the features F from the refined features T of a layer
    ================ ========================================================================
    "att"            attention transfer, :func:`kdkernels.attention_transfer_loss` with p = 2 and
                     this ``variant``; the numbers of channels may differ
    "fit"            mean of (F - T)^2, as in FitNets
    "od"             :func:`kdkernels.nn.overhaul_loss`, divided by 2 for each layer behind this
                     one; F and T are features before the ReLU
    ================ ========================================================================

    Raises:
        TypeError: features are not lists of tensors.
        ValueError: numbers of layers or shapes differ, or "od" has no margins.
    """
    checks.choice("feature_loss", feature_loss, _FEATURE_LOSSES)
    checks.choice("variant", variant, tuple(DIRECTIONS))
    features, teacher_features = features_of_layers("features", features), features_of_layers("teacher_features", teacher_features)
    if len(features) != len(teacher_features) or not features:
        raise ValueError(
            f"features and teacher_features must have the same number of layers, at least one, got {len(features)} and {len(teacher_features)}"
        )
    if feature_loss == "att":
        return attention_transfer_losses(features, teacher_features, variant=variant)
    for i, (feature, target) in enumerate(zip(features, teacher_features, strict=True)):
        if feature.shape != target.shape:
            raise ValueError(
                f"with feature_loss={feature_loss!r}, features and teacher_features must have the same shapes, got {tuple(feature.shape)} and "
                f"{tuple(target.shape)} for layer {i}"
            )
    if feature_loss == "fit":
        dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
        # F.mse_loss has no forward mode derivative for a detached target.
        return [(f.to(dtype) - t.detach().to(dtype)).square().mean() for f, t in zip(features, teacher_features, strict=True)]
    if margins is None or len(margins) != len(features):
        raise ValueError(f"feature_loss='od' needs margins, one tensor for each of the {len(features)} layers (kdkernels.nn.overhaul_margins)")
    losses = [overhaul_loss(f, t, m) for f, t, m in zip(features, teacher_features, margins, strict=True)]
    return [loss / 2 ** (len(losses) - 1 - i) for i, loss in enumerate(losses)]


def frskd_loss(
    logits: Tensor,  # [B, K] or [B, K, ...]
    teacher_logits: Tensor,  # in the shape of the logits
    labels: Tensor,  # [B] or [B, ...] int64, or probabilities in the shape of the logits
    features: Sequence[Tensor] | None = None,  # [B, C_i, H_i, W_i] each
    teacher_features: Sequence[Tensor] | None = None,  # [B, D_i, H_i, W_i] each
    *,
    temperature: float = 4.0,
    alpha: float = 2.0,
    beta: float = 100.0,
    feature_loss: FeatureLoss | None = "att",
    margins: Sequence[Tensor] | None = None,
    variant: FRSKDVariant = "authors",
) -> Tensor:
    r"""Loss of FRSKD: a network and its self-teacher learn from labels, the network from both.

    With the logits z_c of the network and z_t of the self-teacher, their predictions p softened by
    the temperature T, the tapped features F_i and the refined features T_i:

    .. math::

        CE(z_c, y) + CE(z_t, y) + \alpha T^2 KL(p_t \| p_c) + \beta \sum_i D(F_i, T_i)

    where p_t and T_i are detached, and D is a distance of features (:func:`frskd_feature_losses`).
    The defaults are those of the authors for CIFAR-100. For segmentation they use alpha = 1,
    beta = 50 and T = 1.

    This is the loss of the authors' code. In the paper (``variant="paper"``) the divergence is
    :math:`KL(p_c \| p_t)`, and "att" is the norm of the difference of two attention maps, instead
    of the mean square. The norm is much larger: beta = 100 is not made for it.

    Args:
        logits, teacher_logits: classes in dimension 1.
        labels: class indices, or probabilities.
        features, teacher_features: of each layer; without them, there is no feature loss
            (FRSKD\F).
        temperature: T > 0.
        alpha: weight of T^2 KL.
        beta: weight of the feature loss. 100 is made for "att"; "od" is a sum over the elements of
            a map, for which Heo et al. use 0.001.
        feature_loss: "att", "fit", "od", or ``None`` for FRSKD\F.
        margins: for "od", see :func:`kdkernels.nn.overhaul_margins`.
        variant: "authors" or "paper".

    Returns:
        0-dim, float32 or float64.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, or an option is out of range.

    References:
        M. Ji, S. Shin, S. Hwang, G. Park, I.-C. Moon. Refine Myself by Teaching Myself: Feature
        Refinement via Self-Knowledge Distillation. CVPR 2021. https://arxiv.org/abs/2103.08273
    """
    check_frskd_options(temperature, alpha, beta, feature_loss, variant)
    checks.tensor("logits", logits, "logits")
    checks.tensor("teacher_logits", teacher_logits, "logits")
    if logits.shape != teacher_logits.shape or logits.dim() < 2:
        raise ValueError(
            f"logits and teacher_logits must have the same shape [B, K, ...], got {tuple(logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if (features is None) != (teacher_features is None):
        raise ValueError("features and teacher_features must be given together, got only one of them")
    for name, maps in {"features": features, "teacher_features": teacher_features}.items():
        if maps is not None:
            check_batch_size(name, features_of_layers(name, maps), logits)
    check_labels(labels, "logits", logits, 1)
    labels = clone_inference_tensor(labels)
    total = cross_entropy(logits, labels) + cross_entropy(teacher_logits, labels)
    if alpha:
        total = total + alpha * temperature_kl(logits, teacher_logits.detach(), temperature, dim=1, direction=DIRECTIONS[variant])
    if beta and feature_loss is not None and features is not None and teacher_features is not None:
        total = total + beta * cast(Tensor, sum(frskd_feature_losses(features, teacher_features, feature_loss, margins, variant)))
    return total


def check_frskd_options(temperature: float, alpha: float, beta: float, feature_loss: str | None, variant: str) -> None:
    """Raise TypeError or ValueError if an option of :func:`frskd_loss` is out of range."""
    checks.positive("temperature", temperature)
    checks.not_negative("alpha", alpha)
    checks.not_negative("beta", beta)
    checks.choice("feature_loss", feature_loss, (*_FEATURE_LOSSES, None))
    checks.choice("variant", variant, tuple(DIRECTIONS))


def frskd_ramp(epoch: int, ramp_start: int, ramp_epochs: int) -> float:
    r"""Return the factor of alpha and beta in an epoch, counted from 0.

    It is 0 before epoch ``ramp_start``. In the next ``ramp_epochs`` epochs it is
    :math:`\exp(-5 (1-t)^2)`, where t = (epoch + 1 - ramp_start) / ramp_epochs grows to 1.
    Afterwards it is 1. The authors use 40 and 20 for segmentation, and no ramp for classification
    (0 and 0).

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is negative.
    """
    for name, value in {"epoch": epoch, "ramp_start": ramp_start, "ramp_epochs": ramp_epochs}.items():
        checks.integer(name, value)
        checks.not_negative(name, value)
    if epoch < ramp_start:
        return 0.0
    progress = min(1.0, (epoch + 1 - ramp_start) / ramp_epochs) if ramp_epochs else 1.0
    return math.exp(-5 * (1 - progress) ** 2)


class FRSKDLoss(LossModule):
    """Module of :func:`frskd_loss` with fixed options.

    Example: ``FRSKDLoss(beta=50.0)(logits, teacher_logits, labels, features, teacher_features)``.

    Args:
        **options: the keyword options of :func:`frskd_loss` but ``margins``: temperature, alpha,
            beta, feature_loss, variant.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        if "margins" in options:
            raise TypeError("FRSKDLoss has no option 'margins': give them to each call, because they change during training")
        probe = torch.zeros(1, 1)
        frskd_loss(probe, probe, torch.zeros(1, dtype=torch.int64), None, None, **options)  # validate the options

    def forward(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        features: Sequence[Tensor] | None = None,
        teacher_features: Sequence[Tensor] | None = None,
        margins: Sequence[Tensor] | None = None,
    ) -> Tensor:
        return frskd_loss(logits, teacher_logits, labels, features, teacher_features, margins=margins, **self.options)
