"""The loss of TRL's ``GKDTrainer``."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
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
    reduction: Literal["batchmean", "sum", "mean", "none"] = "batchmean",
    num_items_in_batch: float | Tensor | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence, without T^2 (Agarwal et al. 2024, equation 1).

    0 is KL(teacher || student), 1 is KL(student || teacher).

    "batchmean" divides the sum by the number of tokens that are not left out; without ``labels`` by
    B. "mean" divides by V as well. ``num_items_in_batch`` replaces the divisor, whatever the
    reduction. "none" gives a value for each element, of the tokens that are not left out; it is
    computed by torch, not by the fused op.
    """
    checks.choice("reduction", reduction, ("batchmean", "sum", "mean", "none"))
    mask = None if labels is None else labels != IGNORED
    divisor = num_items_in_batch
    if divisor is not None:
        reduction = "batchmean"
    elif mask is None and reduction == "batchmean":
        divisor = max(len(student_logits), 1)
    if reduction == "none":
        elements = _elements(student_logits, teacher_logits, beta, temperature)
        return elements if mask is None else elements[mask]
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


def _elements(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    with torch.no_grad():
        temperature_kl(student, teacher, temperature, direction="jsd", beta=beta)  # checks the arguments
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    log_p, log_q = (F.log_softmax(x.to(dtype) / temperature, -1) for x in (teacher, student))
    if beta == 0 or beta == 1:
        return F.kl_div(*((log_q, log_p) if beta == 0 else (log_p, log_q)), reduction="none", log_target=True)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    of_teacher, of_student = (F.kl_div(log_m, x, reduction="none", log_target=True) for x in (log_p, log_q))
    return beta * of_teacher + (1 - beta) * of_student
