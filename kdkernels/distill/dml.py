"""Deep mutual learning, DML (Zhang, Xiang, Hospedales, Lu, CVPR 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from ..nn.online import dml_pairs, dml_weight
from ..ops import checks
from .online import OnlineDistiller, check_online_options

__all__ = ["DML"]


class DML(OnlineDistiller):
    """Networks that learn from the labels and from each other's predictions.

    The loss is :func:`kdkernels.nn.dml_loss`. The networks may have any architectures.

    Args:
        student: the first network; maps images [B, C, H, W] to logits in the shape of ``task``.
        peers: the other networks.
        temperature: T; 1 in the paper.
        alpha: weight of the divergences.
        variant: "paper" (the predictions of the others are constants) or "symmetric".
        split, image_shape: see :class:`FFL`.
        **options: the other arguments of :class:`Distiller`. There is no teacher.

    References:
        Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu. Deep Mutual Learning. CVPR 2018.
        https://arxiv.org/abs/1706.00384
    """

    def __init__(
        self,
        student: nn.Module,
        peers: list[nn.Module],
        temperature: float = 1.0,
        alpha: float = 1.0,
        variant: Literal["paper", "symmetric"] = "paper",
        split: str | None = None,
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        check_online_options(temperature, alpha, 0)
        checks.choice("variant", variant, ("paper", "symmetric"))
        super().__init__(student, peers, split, image_shape=image_shape, **options)
        self.temperature, self.alpha, self.variant = temperature, alpha, variant

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = self.run_networks(batch["image"])
        losses = self.all_label_losses(outputs, batch)
        if self.alpha:
            weight = dml_weight(self.alpha, len(outputs.logits), self.variant)
            losses["kl"] = weight * self.divergences(dml_pairs(outputs.logits), self.temperature, batch, detached=self.variant == "paper")
        return outputs.logits[0], losses
