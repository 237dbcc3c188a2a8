"""ONE, distillation by on-the-fly native ensemble (Lan, Zhu, Gong, NeurIPS 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..models.fusion import Gate
from ..models.shared_layers import SharedLayers
from ..nn.online import ffl_ramp
from .online import HeadInputs, OnlineDistiller, check_online_options

__all__ = ["ONE"]


class GatedEnsemble(nn.Module):
    """The sum of the logits of all branches, weighted by a gate for each sample."""

    def __init__(self, gate: Gate):
        super().__init__()
        self.gate = gate

    def forward(self, inputs: HeadInputs) -> Tensor:
        weights = self.gate(cast(Tensor, inputs.stem))  # [B, branches]
        logits = torch.stack(inputs.logits, 1)  # [B, branches, K, ...]
        return (weights.reshape(*weights.shape, *[1] * (logits.dim() - 2)) * logits).sum(1)


class ONE(OnlineDistiller):
    """Branches of a network that learn from the labels and from their gated ensemble.

    The loss is :func:`kdkernels.nn.one_loss`. The branches share the layers before ``split``; a
    gate (:class:`kdkernels.models.Gate`) gets the input of this layer, and weighs the branches'
    logits for each sample. Validation also evaluates the gated ensemble (``val/accuracy_gated``).

    Args:
        student: the network; maps images [B, C, H, W] to logits in the shape of ``task``.
        peers: networks of the same architecture, which become the other branches.
        split: name of the first layer that is not shared, such as "layer3" of a ResNet.
        temperature: T; 3 in the paper.
        alpha: weight of the divergences.
        ramp_epochs: alpha grows to its value in these epochs (:func:`kdkernels.nn.ffl_ramp`). The
            authors' code uses 80 of 300 epochs; the paper has no ramp.
        image_shape: see :class:`FFL`.
        **options: the other arguments of :class:`Distiller`. There is no teacher.

    References:
        X. Lan, X. Zhu, S. Gong. Knowledge Distillation by On-the-Fly Native Ensemble. NeurIPS 2018.
        https://arxiv.org/abs/1806.04606
    """

    joint_suffix = "_gated"
    needs = ("split",)

    def __init__(
        self,
        student: nn.Module,
        peers: list[nn.Module],
        split: str,
        temperature: float = 3.0,
        alpha: float = 1.0,
        ramp_epochs: int = 0,
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        check_online_options(temperature, alpha, ramp_epochs)
        super().__init__(student, peers, split, image_shape=image_shape, **options)
        self.temperature, self.alpha, self.ramp_epochs = temperature, alpha, ramp_epochs

    def new_head(self, shapes: list[tuple[int, ...]], logits: Tensor, shared: SharedLayers | None) -> nn.Module:
        channels = cast(SharedLayers, shared).stem_shape
        if len(channels) != 4:
            raise ValueError(f"split: the input of layer {self.split!r} must be a feature map [B, C, H, W], got {list(channels)}")
        return GatedEnsemble(Gate(channels[1], 1 + len(self.new_peers)))

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = self.run_networks(batch["image"])
        losses = self.all_label_losses(outputs, batch)
        if self.alpha:
            joint = cast(Tensor, outputs.joint)
            pairs = outputs.logits, [joint] * len(outputs.logits)
            losses["kl"] = self.alpha * ffl_ramp(self.current_epoch, self.ramp_epochs) * self.divergences(pairs, self.temperature, batch)
        return outputs.logits[0], losses
