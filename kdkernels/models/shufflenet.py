"""ShuffleNetV1 (Zhang et al. 2018) and ShuffleNetV2 (Ma et al. 2018) for images of 32x32 pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShuffleNetV1(nn.Module):
    """A 1x1 stem, three stages of grouped bottlenecks, global average pooling, linear classifier.

    The stem has 24 channels. Parameters are named as in RepDistiller's networks, so weights that
    were trained with RepDistiller can be loaded.

    Taps: ``relu`` (the stem), ``layer1``, ``layer2``, ``layer3``; their resolutions, relative to
    the image, are 1, 1/2, 1/4, 1/8.

    Args:
        widths: number of channels of each stage.
        blocks: number of blocks of each stage.
        groups: number of groups of the 1x1 convolutions.
        num_classes: number of classes.
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
        inputs, stages = 24, []
        for i, (outputs, count) in enumerate(zip(widths, blocks, strict=True), start=1):
            first = GroupedBottleneck(inputs, outputs, 2, groups, first_groups=1 if i == 1 else groups)
            rest = [GroupedBottleneck(outputs, outputs, 1, groups, groups) for _ in range(count - 1)]
            stages.append(nn.Sequential(first, *rest))
            inputs = outputs
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class GroupedBottleneck(nn.Module):
    """Grouped 1x1 convolution, channel shuffle, depthwise 3x3 convolution, grouped 1x1 convolution.

    With stride 1, the input is added. With stride 2, the average-pooled input is concatenated.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int, first_groups: int):
        super().__init__()
        # With stride 2, the other output channels are those of the input.
        convolved = outputs - inputs if stride == 2 else outputs
        middle = convolved // 4
        self.stride, self.groups = stride, first_groups
        self.conv1 = nn.Conv2d(inputs, middle, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, convolved, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(convolved)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(shuffle(out, self.groups))))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return F.relu(torch.cat([out, F.avg_pool2d(x, 3, 2, padding=1)], 1))
        return F.relu(out + x)


class ShuffleNetV2(nn.Module):
    """A 1x1 stem, three stages of split blocks, a 1x1 convolution, average pooling, classifier.

    The stem has 24 channels. Parameters are named as in RepDistiller's networks, so weights that
    were trained with RepDistiller can be loaded.

    Taps: ``relu`` (the stem), ``layer1``, ``layer2``, ``layer3``; their resolutions, relative to
    the image, are 1, 1/2, 1/4, 1/8.

    Args:
        widths: numbers of channels of the stages and of the last convolution.
        blocks: number of blocks of each stage, without the first one, which halves the resolution.
        num_classes: number of classes.
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
        inputs, stages = 24, []
        for outputs, count in zip(widths[:3], blocks, strict=True):
            stages.append(nn.Sequential(DownBlock(inputs, outputs), *[SplitBlock(outputs) for _ in range(count)]))
            inputs = outputs
        self.layer1, self.layer2, self.layer3 = stages
        self.conv2 = nn.Conv2d(inputs, widths[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


class SplitBlock(nn.Module):
    """1x1, depthwise 3x3, 1x1 convolution of half of the channels, then a shuffle of both halves.

    The other half of the channels is not changed.
    """

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
        unchanged, out = x.chunk(2, 1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)))
        return shuffle(torch.cat([unchanged, out], 1), 2)


class DownBlock(nn.Module):
    """Two branches with stride 2, each from all input channels to half of the output channels."""

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
    """Interleave the channels of the groups: [B, groups * n, H, W] -> [B, groups * n, H, W]."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def shufflenet_v1(num_classes: int = 100) -> ShuffleNetV1:
    return ShuffleNetV1(num_classes=num_classes)


def shufflenet_v2(num_classes: int = 100) -> ShuffleNetV2:
    return ShuffleNetV2(num_classes=num_classes)
