"""A self-teacher: a BiFPN that refines the feature maps of a network (Ji et al., CVPR 2021)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.overhaul import overhaul_margins
from ..ops.checks import flag


class SelfTeacherOutputs(NamedTuple):
    """What a self-teacher computes; the lists are in the order of its layers."""

    logits: Tensor  # [B, K], or [B, K, H, W] for label maps
    features: list[Tensor]  # [B, D_i, H_i, W_i] each, before the ReLU
    margins: list[Tensor]  # [D_i] each, see kdkernels.nn.overhaul_margins; empty unless requested


class SelfTeacher(nn.Module):
    """Refines the feature maps of a network by a BiFPN, and classifies the refined maps.

    BiFPN is the bidirectional feature pyramid network of Tan, Pang, Le (CVPR 2020). Unlike there,
    the number of channels of a refined map is proportional to that of the tapped layer (BiFPNc in
    Ji et al.). Map i, of C_i channels, becomes a map of ``width * C_i`` channels and the same size.

    A classifier averages the coarsest refined map over all positions, and has one linear layer. For
    label maps, the classifier is a 1x1 convolution of the finest refined map, whose logits are
    enlarged to the size of the images (bilinear interpolation). The last BiFPN layer then has no
    bottom-up path, because the finest map does not depend on it.

    ReLU is applied to the tapped maps first, so that they may be outputs before or after a ReLU.

    The sizes of the maps usually halve from one layer to the next. Any size that is not larger than
    that of the layer before is possible: a map is enlarged to the exact size of the finer map
    (nearest neighbour). It is reduced by max pooling: 3x3 with stride 2 to half the size, rounded
    up; ``adaptive_max_pool2d`` to any other size.

    Args:
        shapes: shapes [C, H, W] of the features, by the names of their layers, from the front to
            the back.
        num_classes: number of classes K.
        label_maps: whether labels are maps with a class for each pixel.
        width: factor of the numbers of channels.
        depth: number of depthwise separable convolutions at each node of a BiFPN layer.
        layers: number of BiFPN layers; by default 1, and 2 for label maps.
        margins: whether to compute the margins of the overhaul loss.
        laterals: whether the tapped maps first pass 1x1 convolutions. ``False`` is for a network
            with a BiFPN of its own, which the self-teacher continues. Needs ``width=1``.

    Raises:
        ValueError: there are fewer than two layers, a map is larger than that of the layer before,
            a number is less than 1, ``width`` is not 1 without laterals, or margins are requested
            of a map that is no output of the self-teacher (without laterals, for label maps, with
            one layer).

    References:
        M. Ji, S. Shin, S. Hwang, G. Park, I.-C. Moon. Refine Myself by Teaching Myself: Feature
        Refinement via Self-Knowledge Distillation. CVPR 2021. https://arxiv.org/abs/2103.08273
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        num_classes: int,
        label_maps: bool = False,
        width: int = 2,
        depth: int = 2,
        layers: int | None = None,
        margins: bool = False,
        laterals: bool = True,
    ):
        super().__init__()
        layers = (2 if label_maps else 1) if layers is None else layers
        check_sizes(num_classes=num_classes, width=width, depth=depth, layers=layers)
        for name, value in {"label_maps": label_maps, "margins": margins, "laterals": laterals}.items():
            flag(name, value)
        check_laterals(laterals, width)
        check_pyramid(shapes)
        if margins and label_maps and layers == 1 and not laterals:
            raise ValueError(
                "layers must be at least 2: without laterals, one layer for label maps does not refine the coarsest map, which then has no margin"
            )
        self.label_maps, self.with_margins = label_maps, margins
        inputs = [shape[0] for shape in shapes.values()]
        self.channels = [width * channels for channels in inputs]
        self.layers = nn.ModuleList(
            BiFPNLayer(inputs if laterals and i == 0 else None, self.channels, depth, bottom_up=not label_maps or i < layers - 1)
            for i in range(layers)
        )
        self.classifier = nn.Conv2d(self.channels[0], num_classes, 1) if label_maps else nn.Linear(self.channels[-1], num_classes)

    def forward(
        self,
        features: Sequence[Tensor],  # [B, C_i, H_i, W_i] each
        size: Sequence[int],  # height and width of the images
    ) -> SelfTeacherOutputs:
        """Refine and classify feature maps; see :class:`SelfTeacherOutputs`.

        Raises:
            ValueError: there is not one map for each layer.
        """
        maps = list(features)
        if len(maps) != len(self.channels):
            raise ValueError(f"features must be one map for each of the {len(self.channels)} layers, got {len(maps)}")
        for layer in self.layers:
            maps = layer(maps)
        if self.label_maps:
            logits = F.interpolate(self.classifier(F.relu(maps[0])), list(size), mode="bilinear", align_corners=False)
        else:
            logits = self.classifier(F.relu(maps[-1]).mean((2, 3)))
        return SelfTeacherOutputs(logits, maps, self.margins() if self.with_margins else [])

    def margins(self) -> list[Tensor]:
        """Return the margins of the refined maps, from the batch norms that compute them."""
        # A layer without a bottom-up path and without laterals passes the coarsest map on.
        norms: list[nn.Module] = []
        for layer in self.layers:
            found = cast(BiFPNLayer, layer).output_norms()
            norms = found if len(found) == len(self.channels) else [*found, norms[-1]]
        return [overhaul_margins(cast(Tensor, norm.weight), cast(Tensor, norm.bias)) for norm in norms]


def check_sizes(**sizes: int) -> None:
    """Raise TypeError or ValueError unless all sizes are integers >= 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_laterals(laterals: bool, width: int) -> None:
    """Raise ValueError if the maps are to change their numbers of channels without laterals."""
    if not laterals and width != 1:
        raise ValueError(f"width must be 1 with laterals=False, because the tapped maps keep their numbers of channels, got width={width}")


def check_pyramid(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError unless there are two or more layers whose maps do not grow to the back."""
    if len(shapes) < 2:
        raise ValueError(f"a self-teacher needs at least two tapped layers, got {list(shapes)}")
    names = list(shapes)
    for finer, coarser in itertools.pairwise(names):
        (height, width), (next_height, next_width) = shapes[finer][1:], shapes[coarser][1:]
        if next_height > height or next_width > width:
            raise ValueError(
                f"the tapped layers must be in the order from the finest to the coarsest feature map, but {finer!r} has {height}x{width}, "
                f"and {coarser!r} behind it has {next_height}x{next_width}"
            )


class BiFPNLayer(nn.Module):
    """One BiFPN layer: a top-down path, from coarse to fine, and a bottom-up path back.

    With L_i the laterals, and the finest map first,

    - top-down: P_n = L_n and P_i = node(L_i, enlarged P_{i+1});
    - bottom-up: T_1 = P_1, T_i = node(L'_i, P_i, reduced T_{i-1}) and T_n = node(L'_n, reduced
      T_{n-1}).

    A lateral is a 1x1 convolution with batch norm. The bottom-up path has laterals L' of its own,
    as in the authors' code; the paper uses L for both. Maps are returned before their ReLU, and
    ReLU is applied where they are used.

    Args:
        inputs: numbers of channels of the input maps. ``None``: the inputs are the outputs of
            another layer, and are used as L and L' themselves.
        channels: numbers of channels of the outputs.
        depth: see :class:`SelfTeacher`.
        bottom_up: whether there is a bottom-up path. Without it, the outputs are P.
    """

    def __init__(self, inputs: Sequence[int] | None, channels: Sequence[int], depth: int, bottom_up: bool = True):
        super().__init__()
        pairs = [] if inputs is None else list(zip(inputs, channels, strict=True))
        neighbours = list(itertools.pairwise(channels))
        self.laterals = nn.ModuleList(projection(c, d) for c, d in pairs)
        self.enlarging = nn.ModuleList(projection(coarse, fine) for fine, coarse in neighbours)
        self.top_down = nn.ModuleList(FusionNode(2, fine, depth) for fine, _ in neighbours)
        self.bottom_up_laterals = nn.ModuleList(projection(c, d) for c, d in pairs[1:] if bottom_up)
        self.reducing = nn.ModuleList(projection(fine, coarse) for fine, coarse in neighbours if bottom_up)
        inner = len(channels) - 2  # nodes with a third input, P_i
        self.bottom_up = nn.ModuleList(FusionNode(3 if i < inner else 2, d, depth) for i, d in enumerate(channels[1:]) if bottom_up)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        laterals = [lateral(F.relu(x)) for lateral, x in zip(self.laterals, maps, strict=True)] if len(self.laterals) else maps
        refined = self.refine_top_down(laterals)
        if not len(self.bottom_up):
            return refined
        behind = maps[1:]
        if len(self.laterals):
            behind = [lateral(F.relu(x)) for lateral, x in zip(self.bottom_up_laterals, behind, strict=True)]
        return self.refine_bottom_up(behind, refined)

    def refine_top_down(self, laterals: list[Tensor]) -> list[Tensor]:
        refined = [laterals[-1]]
        for i in range(len(self.top_down) - 1, -1, -1):
            # The authors enlarge before the projection, which takes four times the work. The maps
            # are the same: the projection acts on each position alone, and the mean and variance of
            # batch norm do not change if each position occurs four times. Only the running variance
            # differs a little, because it is multiplied by n / (n - 1) for n positions.
            coarser = F.relu(self.enlarging[i](F.relu(refined[0])))
            refined.insert(0, self.top_down[i](laterals[i], F.interpolate(coarser, laterals[i].shape[2:], mode="nearest")))
        return refined

    def refine_bottom_up(self, laterals: list[Tensor], refined: list[Tensor]) -> list[Tensor]:
        outputs = [refined[0]]
        for i, (node, lateral) in enumerate(zip(self.bottom_up, laterals, strict=True)):
            finer = self.reducing[i](max_pool_to(F.relu(outputs[-1]), lateral.shape[2:]))
            between = refined[i + 1 : i + 2] if i < len(laterals) - 1 else []
            outputs.append(node(lateral, *between, finer))
        return outputs

    def output_norms(self) -> list[nn.Module]:
        """Return the batch norms that compute the outputs.

        One is missing if the coarsest output is an input of the layer.
        """
        nodes = [self.top_down[0], *self.bottom_up] if len(self.bottom_up) else list(self.top_down)
        norms = [cast(FusionNode, node).convs[-1] for node in nodes]
        if not len(self.bottom_up) and len(self.laterals):
            norms.append(cast(nn.Sequential, self.laterals[-1])[-1])
        return norms


class FusionNode(nn.Module):
    """Weighted mean of feature maps after ReLU, and depthwise separable convolutions of it.

    The convolutions are 3x3 depthwise, then 1x1, then batch norm; ReLU between them, but not at the
    end.
    """

    def __init__(self, inputs: int, channels: int, depth: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs))
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.ReLU()] if i else []
            layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), *projection(channels, channels)]
        self.convs = nn.Sequential(*layers)

    def forward(self, *maps: Tensor) -> Tensor:  # [B, C, H, W] each -> [B, C, H, W]
        weights = fusion_weights(self.weight)
        return self.convs(cast(Tensor, sum(w * F.relu(x) for w, x in zip(weights, maps, strict=True))))


def fusion_weights(weight: Tensor) -> Tensor:
    """Return the weights of a fusion node: ReLU, divided by the sum plus 1e-6 (Tan et al. 2020)."""
    weight = F.relu(weight)
    return weight / (weight.sum() + 1e-6)


def projection(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1 convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


def max_pool_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Reduce maps [B, C, H, W] that are >= 0 to a size by max pooling, see :class:`SelfTeacher`."""
    given, size = tuple(x.shape[2:]), tuple(size)
    if given == size:
        return x
    if size != tuple((n + 1) // 2 for n in given):
        return F.adaptive_max_pool2d(x, size)
    # "Same" padding of TensorFlow, which EfficientDet uses: for an even size, one zero at the end.
    # Zeros do not change a maximum, because x >= 0.
    missing_rows, missing_columns = ((m - 1) * 2 + 3 - n for n, m in zip(given, size, strict=True))
    left, top = missing_columns // 2, missing_rows // 2
    return F.max_pool2d(F.pad(x, [left, missing_columns - left, top, missing_rows - top]), 3, 2)
