"""Classifiers that join several networks: the fusion module of FFL, and the gate of ONE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusionModule(nn.Module):
    """Classify the joint feature maps of several networks (Kim et al., ICPR 2020).

    ``"concat"``, the fusion module of FFL: the maps are concatenated, then 3x3 depthwise
    convolution, batch norm, ReLU, 1x1 convolution, batch norm, ReLU, average over all positions,
    and a linear layer. The numbers of channels of the maps may differ.

    ``"sum"`` (DualNet, Hou, Liu, Wang, ICCV 2017): the maps are added, averaged over all positions,
    and classified by a linear layer. The maps must have equal numbers of channels.

    A map that is larger than the smallest one is first reduced to its size by a convolution with
    batch norm and ReLU, as in FitNets: 3x3 with stride 2 for half of the size, else a convolution
    without padding whose kernel covers the difference. For label maps, the classifier is a 1x1
    convolution, whose logits are enlarged to the size of the images (bilinear interpolation).

    Args:
        shapes: [C, H, W] of the feature map of each network.
        num_classes: number of classes K.
        label_maps: whether labels are maps with a class for each pixel.
        mode: "concat" or "sum".
        channels: number of channels after the 1x1 convolution; by default those of the first map.

    Raises:
        ValueError: there are fewer than two maps, or they cannot be joined.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        num_classes: int,
        label_maps: bool = False,
        mode: Literal["concat", "sum"] = "concat",
        channels: int | None = None,
    ):
        super().__init__()
        if mode not in ("concat", "sum"):
            raise ValueError(f"mode must be 'concat' or 'sum', got {mode!r}")
        if len(shapes) < 2:
            raise ValueError(f"at least two networks must be joined, got {len(shapes)}")
        if mode == "sum" and len({shape[0] for shape in shapes}) > 1:
            raise ValueError(f"feature maps that are added must have equal numbers of channels, got {[list(shape) for shape in shapes]}")
        self.label_maps, self.mode = label_maps, mode
        height, width = min(shape[1] for shape in shapes), min(shape[2] for shape in shapes)
        self.regressors = nn.ModuleList(_regressor(shape, (height, width)) for shape in shapes)
        joint = shapes[0][0] if mode == "sum" else sum(shape[0] for shape in shapes)
        self.convs: nn.Module = nn.Identity()
        if mode == "concat":
            fused = shapes[0][0] if channels is None else channels
            if fused < 1:
                raise ValueError(f"channels must be at least 1, got {fused}")
            self.convs = nn.Sequential(
                nn.Conv2d(joint, joint, 3, padding=1, groups=joint, bias=False),
                nn.BatchNorm2d(joint),
                nn.ReLU(inplace=True),
                nn.Conv2d(joint, fused, 1, bias=False),
                nn.BatchNorm2d(fused),
                nn.ReLU(inplace=True),
            )
            joint = fused
        self.classifier = nn.Conv2d(joint, num_classes, 1) if label_maps else nn.Linear(joint, num_classes)

    def forward(
        self,
        maps: Sequence[Tensor],  # [B, C_i, H_i, W_i] each
        size: Sequence[int],  # height and width of the images
    ) -> Tensor:  # [B, K], or [B, K, *size] for label maps
        if len(maps) != len(self.regressors):
            raise ValueError(f"maps must be one feature map of each of the {len(self.regressors)} networks, got {len(maps)}")
        reduced = [regressor(x) for regressor, x in zip(self.regressors, maps, strict=True)]
        joint = torch.stack(reduced).sum(0) if self.mode == "sum" else torch.cat(reduced, 1)
        joint = self.convs(joint)
        if self.label_maps:
            return F.interpolate(self.classifier(joint), list(size), mode="bilinear", align_corners=False)
        return self.classifier(joint.mean((2, 3)))


def _regressor(shape: Sequence[int], size: tuple[int, int]) -> nn.Module:
    """Return the layers that reduce a map [C, H, W] to a size."""
    channels, *given = shape
    if tuple(given) == size:
        return nn.Identity()
    if all(n == 2 * m for n, m in zip(given, size, strict=True)):
        conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
    else:
        kernel = [1 + n - m for n, m in zip(given, size, strict=True)]
        conv = nn.Conv2d(channels, channels, (kernel[0], kernel[1]), bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


class Gate(nn.Module):
    """Weights of the branches of ONE for each sample, from the feature map that all branches get.

    A linear layer of the map's average over all positions, batch norm, ReLU and softmax, as in the
    authors' code (Lan, Zhu, Gong, NeurIPS 2018).

    Args:
        channels: number of channels of the map.
        branches: number of branches.
    """

    def __init__(self, channels: int, branches: int):
        super().__init__()
        self.linear = nn.Linear(channels, branches)
        self.norm = nn.BatchNorm1d(branches)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, branches], rows sum to 1
        return F.relu(self.norm(self.linear(x.mean((2, 3))))).softmax(1)
