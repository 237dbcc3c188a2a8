"""Feature fusion learning, FFL (Kim, Hyun, Chung, Kwak, ICPR 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..models.fusion import FusionModule
from ..models.shared_layers import SharedLayers
from ..nn.online import ffl_pairs, ffl_ramp
from ..ops import checks
from .online import HeadInputs, OnlineBranches, OnlineDistiller, check_online_options

__all__ = ["FFL"]


class FusionHead(nn.Module):
    """The fusion module as the head of several networks."""

    def __init__(self, fusion: FusionModule):
        super().__init__()
        self.fusion = fusion

    def forward(self, inputs: HeadInputs) -> Tensor:
        return self.fusion(inputs.maps, inputs.size)


class FFL(OnlineDistiller):
    r"""Networks that teach each other through a classifier of their fused features.

    The loss is :func:`kdkernels.nn.ffl_loss`. The mean of the networks' logits teaches the fused
    classifier (:class:`kdkernels.models.FusionModule`), which teaches each network. Targets are
    detached, but the fused classifier's losses also train the networks through their feature maps.

    Networks of one architecture can share the layers before ``split``. Networks of different
    architectures are separate; their feature maps may have different sizes.

    Validation evaluates the student (``val/accuracy``), the other networks
    (``val/accuracy_peer_1``, ...), the mean of their logits (``val/accuracy_ensemble``), and the
    fused classifier (``val/accuracy_fused``).

    Args:
        student: the first network; maps images [B, C, H, W] to logits in the shape of ``task``.
        peers: the other networks.
        student_tap: name of the layer whose feature map is fused, usually the last one.
        peer_taps: the same for each peer; by default the student's.
        split: name of the first layer that is not shared, such as "layer3" of a ResNet.
        temperature: T.
        alpha: weight of the divergences.
        ramp_epochs: alpha grows to its value in these epochs (:func:`kdkernels.nn.ffl_ramp`). The
            authors' code uses 80 of 300 epochs; the paper has no ramp.
        target_eps: number added to each target probability; 1e-7 in the authors' code.
        channels: number of channels of the fused features; by default those of the student's map.
        fusion_weight_decay: weight decay of the fusion module, if the optimizer has this option.
            ``None`` is that of the optimizer. The authors have a second optimizer, with weight
            decay 1e-5 instead of 1e-4. For an optimizer that updates each parameter by itself, as
            all of torch but LBFGS do, this is the same.
        image_shape: see :class:`SelfDistiller`.
        **options: the other arguments of :class:`Distiller`. There is no teacher.

    References:
        J. Kim, M. Hyun, I. Chung, N. Kwak. Feature Fusion for Online Mutual Knowledge Distillation.
        ICPR 2020. https://arxiv.org/abs/1904.09058
    """

    joint_suffix = "_fused"
    needs = ("student_tap",)

    def __init__(
        self,
        student: nn.Module,
        peers: list[nn.Module],
        student_tap: str,
        peer_taps: list[str] | None = None,
        split: str | None = None,
        temperature: float = 3.0,
        alpha: float = 1.0,
        ramp_epochs: int = 0,
        target_eps: float = 1e-7,
        channels: int | None = None,
        fusion_weight_decay: float | None = 1e-5,
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        check_online_options(temperature, alpha, ramp_epochs)
        checks.not_negative("target_eps", target_eps)
        if fusion_weight_decay is not None:
            checks.not_negative("fusion_weight_decay", fusion_weight_decay)
        super().__init__(student, peers, split, student_tap, peer_taps, **options)
        self.temperature, self.alpha, self.ramp_epochs, self.target_eps = temperature, alpha, ramp_epochs, target_eps
        self.channels, self.fusion_weight_decay = channels, fusion_weight_decay
        if image_shape is not None:
            self.build_branches(image_shape)

    def new_head(self, shapes: list[tuple[int, ...]], logits: Tensor, shared: SharedLayers | None) -> nn.Module:
        return FusionHead(FusionModule(shapes, logits.shape[1], logits.dim() == 4, channels=self.channels))

    def optimized_parameters(self) -> Iterable[nn.Parameter] | list[dict]:
        # LBFGS, for example, has neither weight decay nor groups.
        if self.fusion_weight_decay is None or "weight_decay" not in self.make_optimizer([nn.Parameter(torch.zeros(1))]).defaults:
            return super().optimized_parameters()
        branches = cast(OnlineBranches, self.branches)
        networks: dict = {"params": list(self.student.parameters()) + list(branches.peers.parameters())}
        fusion: dict = {"params": list(cast(nn.Module, branches.head).parameters()), "weight_decay": self.fusion_weight_decay}
        return [networks, fusion]

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = self.run_networks(batch["image"])
        losses = self.all_label_losses(outputs, batch)
        if self.alpha:
            weight = self.alpha * ffl_ramp(self.current_epoch, self.ramp_epochs)
            pairs = ffl_pairs(outputs.logits, cast(Tensor, outputs.joint))
            losses["kl"] = weight * self.divergences(pairs, self.temperature, batch, target_eps=self.target_eps)
        return outputs.logits[0], losses
