"""``F.kl_div`` of the log-probabilities and probabilities of logits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import checks
from ..ops.temperature_kl import temperature_kl


def kl_div_of_logits(
    student: Tensor,  # [B, ..., C, ...]
    teacher: Tensor,  # like student
    temperature: float = 1.0,
    *,
    dim: int = -1,
    reduction: Literal["mean", "batchmean", "sum", "none"] = "mean",
    scale_by_t2: bool = False,
) -> Tensor:
    """``F.kl_div(F.log_softmax(student / T, dim), F.softmax(teacher / T, dim))``, as a fused op.

    Args:
        student, teacher: logits of one shape.
        temperature: T.
        dim: dimension of the classes.
        reduction: as in ``F.kl_div``. "mean" divides by the number of elements, which makes the
            loss C times smaller than a mean over rows. "batchmean" divides by B, the first extent,
            also if there are more rows than B. "none" gives a value for each element; it is
            computed by torch, not by the fused op.
        scale_by_t2: multiply by T^2. ``F.kl_div`` does not.

    Returns:
        A 0-dim tensor, or for "none" a tensor of the logits' shape.

    Raises:
        TypeError, ValueError: as :func:`kdkernels.temperature_kl`.
    """
    checks.choice("reduction", reduction, ("mean", "batchmean", "sum", "none"))
    if reduction != "none":
        divisor = max(len(student), 1) if reduction == "batchmean" else None
        return temperature_kl(student, teacher, temperature, dim=dim, reduction=reduction, scale_by_t2=scale_by_t2, normalizer=divisor)
    if isinstance(temperature, Tensor) and temperature.dim():
        raise TypeError(f"temperature must be a number for reduction='none', got a tensor of shape {list(temperature.shape)}")
    with torch.no_grad():
        temperature_kl(student, teacher, temperature, dim=dim)  # checks the arguments
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    log_p, log_q = (F.log_softmax(x.to(dtype) / temperature, dim) for x in (teacher, student))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True) * (temperature**2 if scale_by_t2 else 1)
