"""DualNet (Hou, Liu, Wang, ICCV 2017): two networks that learn complementary features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models.fusion import FusionModule
from ..models.shared_layers import SharedLayers
from .checks import check_weights
from .ffl import FusionHead
from .online import OnlineBranches, OnlineDistiller

__all__ = ["DualNet"]


class DualNet(OnlineDistiller):
    r"""Two networks, and a classifier of the sum of their feature maps.

    The loss is :math:`CE(z_f, y) + w \sum_k CE(z_k, y)` with the logits z_f of the fused classifier
    and z_k of the networks. Training alternates: for ``alternate_epochs`` epochs the second network
    is not updated, then as long the first one, and so on. In the last ``joint_epochs`` epochs both
    are updated. The fused classifier is always updated.

    Validation evaluates the student, the other network (``val/accuracy_peer_1``), the mean of their
    logits (``val/accuracy_ensemble``), and the fused classifier (``val/accuracy_fused``).

    Args:
        student: the first network; maps images [B, C, H, W] to logits in the shape of ``task``.
        peers: the second network, in a list.
        student_tap: name of the layer whose feature map is fused, usually the last one.
        peer_taps: the same for the second network; by default the student's. The maps must have
            equal numbers of channels.
        network_weight: w.
        alternate_epochs: number of epochs before the other network is updated; 0: always both.
        joint_epochs: number of epochs at the end in which both are updated.
        image_shape: see :class:`FFL`.
        **options: the other arguments of :class:`Distiller`. There is no teacher.

    References:
        S. Hou, X. Liu, Z. Wang. DualNet: Learn Complementary Features for Image Recognition. ICCV
        2017.
    """

    joint_suffix = "_fused"
    needs = ("student_tap",)

    def __init__(
        self,
        student: nn.Module,
        peers: list[nn.Module],
        student_tap: str,
        peer_taps: list[str] | None = None,
        network_weight: float = 0.3,
        alternate_epochs: int = 1,
        joint_epochs: int = 0,
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        check_weights(network_weight=network_weight)
        for name, value in {"alternate_epochs": alternate_epochs, "joint_epochs": joint_epochs}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
        super().__init__(student, peers, None, student_tap, peer_taps, image_shape, **options)
        if len(self.peer_taps) != 1:
            raise ValueError(f"DualNet trains two networks: peers must be one network, got {len(self.peer_taps)}")
        self.network_weight, self.alternate_epochs, self.joint_epochs = network_weight, alternate_epochs, joint_epochs

    def new_head(self, shapes: list[tuple[int, ...]], logits: Tensor, shared: SharedLayers | None) -> nn.Module:
        return FusionHead(FusionModule(shapes, logits.shape[1], logits.dim() == 4, mode="sum"))

    def on_train_start(self) -> None:
        epochs = self.trainer.max_epochs
        if self.joint_epochs and (epochs is None or epochs < self.joint_epochs) and not cast(Any, self.trainer).fast_dev_run:
            raise ValueError(f"joint_epochs must be at most max_epochs, got {self.joint_epochs} and max_epochs={epochs}")

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        outputs = self.run_networks(batch["image"])
        losses = self.all_label_losses(outputs, batch)
        joint = f"cross_entropy{self.joint_suffix}"
        return outputs.logits[0], {name: value if name == joint else self.network_weight * value for name, value in losses.items()}

    def fixed_network(self, epoch: int) -> nn.Module | None:
        """Return the network that is not updated in an epoch, counted from 0."""
        epochs = cast(int, self.trainer.max_epochs)
        if not self.alternate_epochs or (self.joint_epochs and epoch >= epochs - self.joint_epochs):
            return None
        peer = cast(OnlineBranches, self.branches).peers[0]
        return peer if (epoch // self.alternate_epochs) % 2 == 0 else self.student

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # An optimizer skips parameters without gradient, with their momentum and weight decay. They
        # must have one until then, because DDP waits for the gradients of all parameters.
        fixed = self.fixed_network(self.current_epoch)
        if fixed is not None:
            for parameter in fixed.parameters():
                parameter.grad = None
