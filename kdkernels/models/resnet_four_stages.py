"""resnet18 and resnet34 for images of 32x32 pixels, with four stages.

He, Zhang, Ren, Sun 2016, table 1; the stem for small images is a 3x3 convolution without pooling.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FourStageResNet(nn.Module):
    """A 3x3 stem, four stages of basic blocks, global average pooling, and a linear classifier.

    The stem and the first stage have 64 channels, the other stages 128, 256 and 512. All but the
    first stage halve the resolution. Parameters are named as in RepDistiller's networks with four
    stages, so weights that were trained with RepDistiller can be loaded.

    Taps, each after its ReLU: ``relu`` (the stem), ``layer1`` to ``layer4``. Their resolutions,
    relative to the image, are 1, 1, 1/2, 1/4 and 1/8.

    Args:
        blocks: number of blocks of each stage.
        num_classes: number of classes.
    """

    def __init__(self, blocks: tuple[int, int, int, int] = (2, 2, 2, 2), num_classes: int = 100):
        super().__init__()
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks must be four numbers >= 1, got {blocks}")
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _stage(64, 64, blocks[0], stride=1)
        self.layer2 = _stage(64, 128, blocks[1], stride=2)
        self.layer3 = _stage(128, 256, blocks[2], stride=2)
        self.layer4 = _stage(256, 512, blocks[3], stride=2)
        self.linear = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*[Block(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks)])


def resnet18(num_classes: int = 100) -> FourStageResNet:
    return FourStageResNet((2, 2, 2, 2), num_classes)


def resnet34(num_classes: int = 100) -> FourStageResNet:
    return FourStageResNet((3, 4, 6, 3), num_classes)
