"""The divergences of Liger-Kernel: ``liger_kernel.transformers``.

They take log-probabilities [BT, V]. The ops of this package normalise what they get, which changes
nothing for log-probabilities: so the values are Liger's, and the gradients are Liger's after the
``log_softmax`` that made the log-probabilities. Logits give the same loss without this
``log_softmax``.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..ops import checks
from ..ops.temperature_kl import temperature_kl
from .functional import kl_div_of_logits


def _require_rows(log_q: Tensor, log_p: Tensor) -> None:
    """Raise an error unless both are tensors [BT, V], as Liger expects."""
    for name, value in (("the first argument", log_q), ("the second argument", log_p)):
        checks.tensor(name, value, "log-probabilities")
        if value.dim() != 2:
            raise ValueError(f"{name} must have the shape [BT, V], as in Liger, got {list(value.shape)}: call flatten(0, -2)")
    if log_q.shape != log_p.shape:
        raise ValueError(f"both arguments must have the same shape, got {list(log_q.shape)} and {list(log_p.shape)}")


class LigerKLDIVLoss(nn.KLDivLoss):
    """``F.kl_div`` of log-probabilities [BT, V].

    With ``log_target``, the fused op computes it. Without, the target has probabilities that need
    not sum to 1: rows of zeros, as of padding, add nothing. This form is computed by torch.

    Args:
        eps: the smallest probability of the target inside the logarithm.
        size_average, reduce: torch's deprecated options; only ``None``.
        reduction: as in ``F.kl_div``.
        log_target: the target has log-probabilities.
    """

    def __init__(
        self,
        eps: float = 1e-10,
        size_average: None = None,
        reduce: None = None,
        reduction: Literal["none", "sum", "mean", "batchmean"] = "mean",
        log_target: bool = False,
    ):
        checks.not_negative("eps", eps)
        if size_average is not None or reduce is not None:
            raise ValueError("size_average and reduce are deprecated in torch and must be None: pass reduction")
        checks.choice("reduction", reduction, ("none", "sum", "mean", "batchmean"))
        checks.flag("log_target", log_target)
        super().__init__(reduction=reduction, log_target=log_target)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        _require_rows(y_pred, y_true)
        y_true = y_true.detach()
        if self.log_target:
            return kl_div_of_logits(y_pred, y_true, reduction=cast(Any, self.reduction))
        dtype = torch.promote_types(torch.promote_types(y_pred.dtype, y_true.dtype), torch.float32)
        target = y_true.to(dtype)
        losses = target * (target.clamp(min=self.eps).log() - y_pred.to(dtype))
        if self.reduction == "none":
            return losses
        return losses.sum() / {"sum": 1, "mean": max(losses.numel(), 1), "batchmean": max(len(losses), 1)}[self.reduction]


class LigerJSD(nn.Module):
    """Generalised Jensen-Shannon divergence of log-probabilities [BT, V], as a mean over rows.

    Args:
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher).
        ignore_index: label of rows that are left out.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100):
        super().__init__()
        checks.fraction("beta", beta)
        checks.integer("ignore_index", ignore_index)
        self.beta, self.ignore_index = beta, ignore_index

    def forward(
        self,
        log_q: Tensor,  # student
        log_p: Tensor,  # teacher
        shift_labels: Tensor | None = None,  # [BT]
    ) -> Tensor:
        _require_rows(log_q, log_p)
        if shift_labels is not None and shift_labels.shape != log_q.shape[:1]:
            raise ValueError(f"shift_labels must have the shape {list(log_q.shape[:1])}, a label for each row, got {list(shift_labels.shape)}")
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        return temperature_kl(log_q, log_p.detach(), direction="jsd", beta=self.beta, scale_by_t2=False, mask=mask)
