"""Classifiers of the inner layers of a network: its exits (Zhang et al., ICCV 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import flag

Branch = Literal["bottleneck", "separable"]


class ExitOutputs(NamedTuple):
    """What the exits compute, from the front to the back."""

    logits: list[Tensor]  # [B, K], or [B, K, H, W] for label maps; without the whole network's
    features: list[Tensor]  # [B, D], or [B, D, h, w] for label maps; the last one is the whole network's


class Exits(nn.Module):
    """Exits at the tapped layers of a network: a branch of layers, and a classifier.

    A branch brings the feature map of its layer to the resolution and the number of channels of the
    last tapped layer. Its output is averaged over all positions, and classified by a linear layer.
    For label maps, a branch keeps the resolution of its layer, the classifier is a 1x1 convolution,
    and its logits are enlarged to the size of the images (bilinear interpolation).

    Two kinds of branches have been published:

    - "bottleneck" (the paper, as in the public implementation of luanyunteng): 1x1 convolution to a
      quarter of the output channels, convolution whose kernel size and stride are the ratio of the
      resolutions, 1x1 convolution. Each is followed by batch norm and ReLU.
    - "separable" (the first author's code of the journal version): depthwise separable convolutions
      that halve the resolution until it is that of the last layer. Before them, the feature map is
      multiplied by a gate between 0 and 1, computed from it at half of its resolution.

    Args:
        shapes: shapes [C, H, W] of the features, by the names of their layers, from the front to
            the back. The last layer is the one whose feature map the network itself classifies.
        num_classes: number of classes K.
        label_maps: whether labels are maps with a class for each pixel.
        branch: "bottleneck" or "separable".
        adapters: whether a linear layer is applied to the features of each exit but the last one,
            before they are compared with those of the last layer (journal version).

    Raises:
        ValueError: there are fewer than two layers, the resolution of a layer is not a multiple of
            the last layer's resolution, or, for "separable", not by a power of two.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        num_classes: int,
        label_maps: bool = False,
        branch: Branch = "bottleneck",
        adapters: bool = False,
    ):
        super().__init__()
        if branch not in ("bottleneck", "separable"):
            raise ValueError(f"branch must be 'bottleneck' or 'separable', got {branch!r}")
        if len(shapes) < 2:
            raise ValueError(f"at least two layers must be tapped, that of an exit and the last one, got {list(shapes)}")
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes must be an integer >= 1, got {num_classes!r}")
        flag("label_maps", label_maps)
        flag("adapters", adapters)
        *inner, last = shapes
        channels = shapes[last][0]
        self.label_maps = label_maps
        self.branches, self.classifiers, self.adapters = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for name in inner:
            stride = (1, 1) if label_maps else resolution_ratio(name, shapes[name], last, shapes[last])
            if branch == "bottleneck":
                self.branches.append(bottleneck_branch(shapes[name][0], channels, stride))
            else:
                self.branches.append(SeparableBranch(name, shapes[name][0], channels, stride))
            self.classifiers.append(nn.Conv2d(channels, num_classes, 1) if label_maps else nn.Linear(channels, num_classes))
            if adapters:
                self.adapters.append(nn.Conv2d(channels, channels, 1) if label_maps else nn.Linear(channels, channels))

    def __len__(self) -> int:
        return len(self.branches)

    def forward(
        self,
        features: Sequence[Tensor],  # [B, C_i, H_i, W_i] each; the last one is that of the last layer
        size: Sequence[int],  # height and width of the images
    ) -> ExitOutputs:
        """Run all exits; see :class:`ExitOutputs`.

        Raises:
            ValueError: there is not one feature map for each exit and one for the last layer.
        """
        if len(features) != len(self) + 1:
            raise ValueError(f"features must be the maps of {len(self)} exits and of the last layer, got {len(features)}")
        last = features[-1]
        outputs = [self.exit(i, feature, size) for i, feature in enumerate(features[:-1])]
        if self.label_maps:
            pooled = [F.adaptive_avg_pool2d(feature, (last.shape[2], last.shape[3])) for _, feature in outputs] + [last]
        else:
            pooled = [feature.mean((2, 3)) for _, feature in outputs] + [last.mean((2, 3))]
        adapted = [adapter(x) for adapter, x in zip(self.adapters, pooled, strict=False)] or pooled[:-1]
        return ExitOutputs([logits for logits, _ in outputs], [*adapted, pooled[-1]])

    def exit(self, i: int, feature: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the logits of exit i, counted from 0, and the output of its branch."""
        feature = self.branches[i](feature)
        if self.label_maps:
            return F.interpolate(self.classifiers[i](feature), list(size), mode="bilinear", align_corners=False), feature
        return self.classifiers[i](feature.mean((2, 3))), feature


def resolution_ratio(name: str, shape: Sequence[int], last: str, last_shape: Sequence[int]) -> tuple[int, int]:
    """Return the ratios of the heights and widths of two layers.

    Raises:
        ValueError: a size is not a multiple of the last layer's size.
    """
    (height, width), (last_height, last_width) = shape[1:], last_shape[1:]
    if height % last_height or width % last_width:
        raise ValueError(
            f"the sizes of the tapped layers must be multiples of the last one's size: {name!r} has {height}x{width}, "
            f"{last!r} has {last_height}x{last_width}"
        )
    return height // last_height, width // last_width


def bottleneck_branch(in_channels: int, out_channels: int, stride: tuple[int, int]) -> nn.Sequential:
    """Return the branch "bottleneck" of :class:`Exits`."""
    middle = max(1, out_channels // 4)
    convolutions = (nn.Conv2d(in_channels, middle, 1), nn.Conv2d(middle, middle, stride, stride), nn.Conv2d(middle, out_channels, 1))
    return nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())))


class SeparableBranch(nn.Module):
    """The branch "separable" of :class:`Exits`.

    The number of channels doubles with each halving of the resolution, up to ``out_channels``.
    """

    def __init__(self, name: str, in_channels: int, out_channels: int, stride: tuple[int, int]):
        super().__init__()
        halvings = [ratio.bit_length() - 1 for ratio in stride]
        if any(ratio != 1 << count for ratio, count in zip(stride, halvings, strict=True)):
            raise ValueError(
                f"branch='separable' halves the resolution, so that the sizes of {name!r} must be those of the last layer times a power of two, "
                f"got the ratios {stride[0]} and {stride[1]}"
            )
        self.gate = nn.Sequential(separable_convs(in_channels, in_channels, (2, 2)), nn.BatchNorm2d(in_channels), nn.ReLU())
        steps = max(1, *halvings)
        channels = [min(in_channels << i, out_channels) for i in range(steps)] + [out_channels]
        self.layers = nn.Sequential(
            *(separable_convs(channels[i], channels[i + 1], (2 if i < halvings[0] else 1, 2 if i < halvings[1] else 1)) for i in range(steps))
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, out_channels, h, w]
        gate = F.interpolate(self.gate(x), x.shape[2:], mode="bilinear", align_corners=False).sigmoid()
        return self.layers(gate * x)


def separable_convs(in_channels: int, out_channels: int, stride: tuple[int, int]) -> nn.Sequential:
    """Two depthwise separable 3x3 convolutions, the first with a stride; batch norm and ReLU."""
    layers: list[nn.Module] = []
    for channels, step in ((in_channels, stride), (out_channels, (1, 1))):
        layers += [
            nn.Conv2d(in_channels, in_channels, 3, step, 1, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
