"""The loss of NVIDIA's Model Optimizer: ``modelopt.torch.distill``."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.modules.loss import _Loss

from ..ops import checks
from ..ops.temperature_kl import temperature_kl
from .functional import kl_div_of_logits


class LogitsDistillationLoss(_Loss):
    """T^2 KL of logits [..., C]. The teacher is detached.

    Args:
        temperature: T.
        reduction: required here, because Model Optimizer has had two defaults: "batchmean" in
            version 0.40, "mean" in 0.47. They differ by the factor C. "none" gives one loss per
            row.

    "batchmean" divides by the first extent of the logits, as version 0.47 does. Version 0.40
    divides by the number of rows; for logits [B, S, C] pass ``logits.flatten(0, 1)`` to get this.
    """

    def __init__(self, temperature: float = 1.0, reduction: Literal["batchmean", "mean", "sum", "none"] | None = None):
        if reduction is None:
            raise TypeError("reduction is required, because Model Optimizer's default was 'batchmean' in version 0.40 and is 'mean' in 0.47")
        checks.positive("temperature", temperature)
        checks.choice("reduction", reduction, ("batchmean", "mean", "sum", "none"))
        super().__init__(reduction=reduction)
        self._temperature, self._reduction = temperature, reduction

    def forward(self, logits_s: Tensor, logits_t: Tensor) -> Tensor:
        if self._reduction == "none":
            return temperature_kl(logits_s, logits_t.detach(), self._temperature, reduction="none")
        return kl_div_of_logits(logits_s, logits_t.detach(), self._temperature, reduction=self._reduction, scale_by_t2=True)
