"""The divergences of Liger-Kernel: ``liger_kernel.transformers``.

They take log-probabilities. The ops of this package normalise what they get, which changes nothing
for log-probabilities: so the values are Liger's, and the gradients are Liger's after the
``log_softmax`` that made the log-probabilities. Logits give the same loss without this
``log_softmax``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..ops import checks
from ..ops.temperature_kl import temperature_kl
from .functional import kl_div_of_logits


class LigerKLDIVLoss(nn.Module):
    """``F.kl_div`` of log-probabilities [B, V].

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
        super().__init__()
        checks.not_negative("eps", eps)
        if size_average is not None or reduce is not None:
            raise ValueError("size_average and reduce are deprecated in torch and must be None: pass reduction")
        checks.choice("reduction", reduction, ("none", "sum", "mean", "batchmean"))
        checks.flag("log_target", log_target)
        self.eps, self.reduction, self.log_target = eps, reduction, log_target

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        y_true = y_true.detach()
        target = y_true if self.log_target else y_true.clamp(min=self.eps).log()
        return kl_div_of_logits(y_pred, target, reduction=self.reduction)


class LigerJSD(nn.Module):
    """Generalised Jensen-Shannon divergence of log-probabilities [B, V], as a mean over rows.

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
        shift_labels: Tensor | None = None,  # [B]
    ) -> Tensor:
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        return temperature_kl(log_q, log_p.detach(), direction="jsd", beta=self.beta, scale_by_t2=False, mask=mask)
