"""ShuffleNetV1 (Zhang et al. 2018) and ShuffleNetV2 (Ma et al. 2018) for images of 32x32 pixels, as distillation papers use them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShuffleNetV1(nn.Module):
    """A 1x1 stem of 24 channels, three stages of grouped bottlenecks, global mean, classifier.

    Parameters are named as in RepDistiller's networks, so that files of weights trained with those load.

    Taps: ``relu`` (the stem), ``layer1``, ``layer2``, ``layer3``; resolution 1, 1/2, 1/4, 1/8.

    Args:
        widths: channels of the stages.
        blocks: of each stage.
        groups: of the 1x1 convolutions.
        num_classes: classes.
    """

    def __init__(
        self,
        widths: tuple[int, int, int] = (240, 480, 960),
        blocks: tuple[int, int, int] = (4, 8, 4),
        groups: int = 3,
        num_classes: int = 100,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        inputs = 24
        for i, (outputs, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            first = GroupedBottleneck(inputs, outputs, 2, groups, first_groups=1 if i == 1 else groups)
            rest = [GroupedBottleneck(outputs, outputs, 1, groups, groups) for _ in range(count - 1)]
            setattr(self, f"layer{i}", nn.Sequential(first, *rest))
            inputs = outputs
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class GroupedBottleneck(nn.Module):
    """1x1 in groups, shuffle, 3x3 per channel, 1x1 in groups; added to its input, or, at stride 2, beside the input's local means."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, first_groups: int):
        super().__init__()
        own = outputs - inputs if stride == 2 else outputs  # the rest are the input's
        middle = own // 4
        self.stride, self.groups = stride, first_groups
        self.conv1 = nn.Conv2d(inputs, middle, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, own, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(own)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(shuffle(out, self.groups))))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], 1))
        return F.relu(out + x)


class ShuffleNetV2(nn.Module):
    """A 1x1 stem of 24 channels, three stages of split blocks, a 1x1 convolution, global mean, classifier.

    Parameters are named as in RepDistiller's networks, so that files of weights trained with those load.

    Taps: ``relu`` (the stem), ``layer1``, ``layer2``, ``layer3``; resolution 1, 1/2, 1/4, 1/8.

    Args:
        widths: channels of the stages and of the last convolution.
        blocks: of each stage after the one that halves the map.
        num_classes: classes.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int] = (116, 232, 464, 1024),
        blocks: tuple[int, int, int] = (3, 7, 3),
        num_classes: int = 100,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.relu = nn.ReLU()
        inputs = 24
        for i, (outputs, count) in enumerate(zip(widths[:3], blocks, strict=True), start=1):
            setattr(self, f"layer{i}", nn.Sequential(DownBlock(inputs, outputs), *[SplitBlock(outputs) for _ in range(count)]))
            inputs = outputs
        self.conv2 = nn.Conv2d(inputs, widths[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


class SplitBlock(nn.Module):
    """Half of the channels pass; the other half goes through 1x1, 3x3 per channel, 1x1; then the halves are shuffled."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passed, out = x.chunk(2, 1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return shuffle(torch.cat([passed, out], 1), 2)


class DownBlock(nn.Module):
    """Halves the map: both branches see all channels, each gives half of the outputs."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        half = outputs // 2
        self.conv1 = nn.Conv2d(inputs, inputs, 3, 2, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(inputs, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return shuffle(torch.cat([left, right], 1), 2)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """[B, g*n, H, W] with the channels of the g groups interleaved."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def shufflenet_v1(num_classes: int = 100) -> ShuffleNetV1:
    return ShuffleNetV1(num_classes=num_classes)


def shufflenet_v2(num_classes: int = 100) -> ShuffleNetV2:
    return ShuffleNetV2(num_classes=num_classes)
