"""Networks for inference from training several networks together: one of them, or all joined."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..models.taps import FeatureTaps
from ..tasks import find_logits
from .online import HeadInputs, OnlineBranches, OnlineDistiller
from .restore import restore

__all__ = ["JointNetwork", "online_network"]


class JointNetwork(nn.Module):
    """Several networks as one: ``network(image)`` returns their joint logits.

    Args:
        networks: the networks, each with all of its layers.
        taps: name of the tapped layer of each network, or ``None``.
        head: maps what the networks computed to joint logits; ``None``: the mean of their logits.
        split: layer of the first network whose input the head gets, or ``None``.
    """

    def __init__(self, networks: Sequence[nn.Module], taps: Sequence[str | None], head: nn.Module | None, split: str | None):
        super().__init__()
        self.networks, self.head = nn.ModuleList(networks), head
        self.taps, self.split = list(taps), split

    def forward(self, image: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K], or [B, K, H, W] for label maps
        stems: list[Tensor] = []
        logits: list[Tensor] = []
        maps: list[Tensor] = []
        handles = []
        if self.split is not None:
            layer = self.networks[0].get_submodule(self.split)
            handles.append(layer.register_forward_pre_hook(lambda _module, inputs: stems.append(inputs[0])))
        try:
            for network, tap in zip(self.networks, self.taps, strict=True):
                output, features = FeatureTaps(network, [] if tap is None else [tap])(image)
                logits.append(find_logits(output))
                maps.extend(features.values())
        finally:
            for handle in handles:
                handle.remove()
        if self.head is None:
            return torch.stack(logits).mean(0)
        return self.head(HeadInputs(logits, maps, stems[0] if stems else None, (image.shape[2], image.shape[3])))


def online_network(ckpt: str | os.PathLike, network: str) -> nn.Module:
    """Return a network of a checkpoint of :class:`FFL`, :class:`DML`, :class:`ONE` or DualNet.

    >>> network = online_network("runs/ffl/best.ckpt", "fused").eval()

    Args:
        ckpt: checkpoint of ``kdkernels fit``.
        network: as in the names of the metrics: "peer_1", "peer_2", ... for a network besides the
            student, with all of its layers; "ensemble" for the mean of the logits; "fused" (FFL,
            DualNet) or "gated" (ONE) for the joint classifier. "student" is the student.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the checkpoint was not written by such a method, or has no such network.
    """
    method = restore(ckpt)[0]
    if not isinstance(method, OnlineDistiller) or not isinstance(method.branches, OnlineBranches):
        raise ValueError(f"{os.fspath(ckpt)!r} has one network: it was trained with {type(method).__name__}; train with FFL, DML, ONE or DualNet")
    names = ["student", *(name.removeprefix("_") for name in method.prediction_names()[1:])]
    if network not in names:
        raise ValueError(f"network must be one of {', '.join(names)}, got {network!r}")
    branches = method.branches
    peers = [cast(nn.Module, peer) for peer in branches.peers]
    if branches.shared is not None:
        peers = [branches.shared.restore_layers(peer, method.student) for peer in peers]
    if network == "student":
        return method.student
    if network.startswith("peer_"):
        return peers[int(network.removeprefix("peer_")) - 1]
    taps = [method.student_taps.names[0] if method.student_taps.names else None, *method.peer_taps]
    return JointNetwork([method.student, *peers], taps, None if network == "ensemble" else branches.head, method.split)
