"""The loss of TRL's ``GKDTrainer``."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..ops import checks
from ..ops.temperature_kl import temperature_kl

IGNORED = -100


def generalized_jsd_loss(
    student_logits: Tensor,  # [B, S, V]
    teacher_logits: Tensor,  # [B, S, V]
    labels: Tensor | None = None,  # [B, S]; -100: the token is left out
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: Literal["batchmean", "sum", "mean"] = "batchmean",
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence, without T^2 (Agarwal et al. 2024, equation 1).

    0 is KL(teacher || student), 1 is KL(student || teacher).

    "batchmean" divides the sum by the number of tokens that are not left out; without ``labels`` by
    B. "mean" divides by V as well. ``num_items_in_batch`` replaces the divisor, whatever the
    reduction. "none", a value for each element, is not supported: the op sums over the vocabulary.
    """
    checks.choice("reduction", reduction, ("batchmean", "sum", "mean"))
    mask = None if labels is None else labels != IGNORED
    divisor = num_items_in_batch
    if divisor is not None:
        reduction = "batchmean"
    elif mask is None and reduction == "batchmean":
        divisor = max(len(student_logits), 1)
    return temperature_kl(
        student_logits,
        teacher_logits,
        temperature,
        direction="jsd",
        beta=beta,
        reduction=reduction,
        scale_by_t2=False,
        mask=mask,
        normalizer=divisor,
    )
