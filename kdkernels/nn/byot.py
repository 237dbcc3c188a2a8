"""Be Your Own Teacher: exits of a network learn from its last layer (Zhang et al., ICCV 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from ..ops import checks
from ..ops.registration import clone_inference_tensor
from ..ops.temperature_kl import temperature_kl
from .features import check_batch_size, check_labels, cross_entropy, features_of_layers
from .loss_module import LossModule

BYOTVariant = Literal["paper", "authors", "luanyunteng"]


class BYOTWeights(NamedTuple):
    """Weights of the terms of a variant, apart from its feature loss."""

    cross_entropy: float  # of each exit but the last
    last_cross_entropy: float
    divergence: float  # of KL, without T^2
    features: float


def byot_weights(variant: str, temperature: float = 3.0, alpha: float | None = None, beta: float | None = None) -> BYOTWeights:
    """Return the weights of :func:`byot_loss`; ``None`` stands for the variant's own weight.

    Raises:
        ValueError: the variant is unknown, a weight is negative, or the temperature is not
            positive.
    """
    checks.choice("variant", variant, tuple(_DEFAULTS))
    checks.positive("temperature", temperature)
    default_alpha, default_beta = _DEFAULTS[variant]
    alpha, beta = default_alpha if alpha is None else alpha, default_beta if beta is None else beta
    checks.not_negative("alpha", alpha)
    checks.not_negative("beta", beta)
    if alpha > 1:
        raise ValueError(f"alpha must be at most 1, because the cross-entropy has the weight 1 - alpha, got {alpha}")
    last = 1 - alpha if variant == "luanyunteng" else 1.0
    return BYOTWeights(1 - alpha, last, alpha * temperature**2 if variant == "luanyunteng" else alpha, beta)


_DEFAULTS = {"paper": (0.3, 0.03), "authors": (0.3, 0.03), "luanyunteng": (0.1, 1e-6)}  # alpha and beta


def byot_feature_losses(
    features: Sequence[Tensor],  # [B, D, ...] each, from the front to the back
    variant: BYOTVariant = "paper",
) -> list[Tensor]:  # one 0-dim tensor for each of features but the last
    """Compare the features of each exit with those of the last layer, which are detached.

    ============== ============================================================================
    ``variant``    distance of F from the last layer's features C
    ============== ============================================================================
    "paper"        the sum of (F - C)^2 over the features of a sample, as a mean over the samples
    "authors"      the square root of the sum of (F - C)^2 over the whole batch; 0 for the exit
                   before the last one, which the code leaves out
    "luanyunteng"  the sum over the whole batch of (F - C)^2 where F > 0 or C > 0
    ============== ============================================================================
    """
    checks.choice("variant", variant, tuple(_DEFAULTS))
    features = features_of_layers("features", features)
    dtype = torch.float64 if features[-1].dtype == torch.float64 else torch.float32
    last = features[-1].detach().to(dtype)
    losses = []
    for i, feature in enumerate(features[:-1]):
        if feature.shape != last.shape:
            raise ValueError(
                f"features must have the same shape, got {tuple(feature.shape)} for exit {i + 1} and {tuple(last.shape)} for the last layer"
            )
        difference = feature.to(dtype) - last
        if variant == "paper":
            losses.append(difference.square().sum() / max(len(last), 1))
        elif variant == "authors":
            losses.append(torch.linalg.vector_norm(difference) * float(i < len(features) - 2))
        else:
            losses.append((difference.square() * ((feature > 0) | (last > 0))).sum())
    return losses


def byot_loss(
    logits: Sequence[Tensor],  # [B, K] or [B, K, ...] each, from the front to the back
    labels: Tensor,  # [B] or [B, ...] int64, or probabilities in the shape of the logits
    features: Sequence[Tensor] | None = None,  # [B, D, ...] each
    *,
    temperature: float = 3.0,
    alpha: float | None = None,
    beta: float | None = None,
    variant: BYOTVariant = "paper",
) -> Tensor:
    r"""Loss of Be Your Own Teacher: the exits learn from labels and from the last layer.

    With the exits 1 to C - 1 and the whole network C, whose predictions and features are detached
    where they are targets:

    .. math::

        \sum_{i<C} \left[(1-\alpha) CE(z_i, y) + \alpha KL(p_C \| p_i)
        + \beta D(F_i, F_C)\right] + w CE(z_C, y)

    where p are the predictions softened by the temperature T, and D is a distance of features
    (:func:`byot_feature_losses`). The variants are:

    ============== ========== ============== ===================== ===========================
    ``variant``    w          KL             default alpha, beta   source
    ============== ========== ============== ===================== ===========================
    "paper"        1          KL             0.3, 0.03             equation of the paper, which
                                                                   does not give the weights
    "authors"      1          KL             0.3, 0.03             code of the journal version
    "luanyunteng"  1 - alpha  T^2 KL         0.1, 1e-6             the public implementation
    ============== ========== ============== ===================== ===========================

    Both codes write a soft cross-entropy instead of the KL. Its gradient is the same, its value is
    larger by the entropy of p_C.

    Args:
        logits: of the exits and, last, of the whole network; classes in dimension 1.
        labels: class indices, or probabilities.
        features: of the exits and of the last layer; without them, there is no feature loss.
        temperature: T > 0.
        alpha: weight of the KL; in [0, 1].
        beta: weight of the feature loss.
        variant: "paper", "authors" or "luanyunteng". The feature losses of the last two depend on
            how a batch is split.

    Returns:
        0-dim, float32 or float64. With ``alpha=0`` and ``beta=0`` it is deep supervision.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes differ, there are fewer than two logits, or an option is out of range.

    References:
        L. Zhang, J. Song, A. Gao, J. Chen, C. Bao, K. Ma. Be Your Own Teacher: Improve the
        Performance of Convolutional Neural Networks via Self Distillation. ICCV 2019.
        https://arxiv.org/abs/1905.08094
    """
    weights = byot_weights(variant, temperature, alpha, beta)
    logits = features_of_layers("logits", logits, "logits")
    if len(logits) < 2 or any(z.shape != logits[0].shape or z.dim() < 2 for z in logits):
        raise ValueError(f"logits must be at least two tensors of the same shape [B, K, ...], got {[tuple(z.shape) for z in logits]}")
    if features is not None and len(features) != len(logits):
        raise ValueError(f"features must have one tensor for each of the {len(logits)} logits, got {len(features)}")
    if features is not None:
        check_batch_size("features", features_of_layers("features", features), logits[0])
    check_labels(labels, "logits", logits[0], 1)
    labels = clone_inference_tensor(labels)
    *exits, last = logits
    total = weights.last_cross_entropy * cross_entropy(last, labels)
    for z in exits:
        total = total + weights.cross_entropy * cross_entropy(z, labels)
        total = total + weights.divergence * temperature_kl(z, last.detach(), temperature, dim=1, scale_by_t2=False)
    if features is not None and weights.features:
        total = total + weights.features * cast(Tensor, sum(byot_feature_losses(features, variant)))
    return total


class BYOTLoss(LossModule):
    """Module of :func:`byot_loss` with fixed options.

    Example: ``BYOTLoss(variant="luanyunteng")(logits_of_exits, labels, features_of_exits)``.

    Args:
        **options: the keyword options of :func:`byot_loss`: temperature, alpha, beta, variant.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        probe = torch.zeros(1, 1)
        byot_loss([probe, probe], torch.zeros(1, dtype=torch.int64), [probe, probe], **options)  # validate the options

    def forward(self, logits: Sequence[Tensor], labels: Tensor, features: Sequence[Tensor] | None = None) -> Tensor:
        return byot_loss(logits, labels, features, **self.options)
