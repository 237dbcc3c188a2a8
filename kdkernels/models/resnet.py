"""Residual networks for images of 32x32 pixels, in the sizes that distillation papers compare.

He, Zhang, Ren, Sun 2016, section 4.2.
"""

from __future__ import annotations

from torch import Tensor, nn


class ResNet(nn.Module):
    """A 3x3 stem, three stages of basic blocks, global average pooling, and a linear classifier.

    The second and the third stage halve the resolution. A shortcut that changes the shape is a 1x1
    convolution with batch norm. Images must have at least 4x4 pixels. Parameters are named as in
    RepDistiller's networks, so weights that were trained with RepDistiller can be loaded.

    Taps, each after its ReLU: ``relu`` (the stem), ``layer1``, ``layer2``, ``layer3``. They have
    ``widths`` channels and the resolutions 1, 1, 1/2, 1/4, relative to the image.

    Args:
        depth: number of layers, 6 n + 2 with n blocks per stage.
        widths: numbers of channels of the stem and of the three stages.
        num_classes: number of classes.
    """

    def __init__(self, depth: int = 20, widths: tuple[int, int, int, int] = (16, 16, 32, 64), num_classes: int = 100):
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth must be 6 n + 2 (8, 14, 20, ...), got {depth}")
        stem, *stages = widths
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = _stage(stem, stages[0], blocks, stride=1)
        self.layer2 = _stage(stages[0], stages[1], blocks, stride=2)
        self.layer3 = _stage(stages[1], stages[2], blocks, stride=2)
        self.fc = nn.Linear(stages[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*[BasicBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks)])


_WIDE = (32, 64, 128, 256)


def resnet8(num_classes: int = 100) -> ResNet:
    return ResNet(8, num_classes=num_classes)


def resnet14(num_classes: int = 100) -> ResNet:
    return ResNet(14, num_classes=num_classes)


def resnet20(num_classes: int = 100) -> ResNet:
    return ResNet(20, num_classes=num_classes)


def resnet32(num_classes: int = 100) -> ResNet:
    return ResNet(32, num_classes=num_classes)


def resnet44(num_classes: int = 100) -> ResNet:
    return ResNet(44, num_classes=num_classes)


def resnet56(num_classes: int = 100) -> ResNet:
    return ResNet(56, num_classes=num_classes)


def resnet110(num_classes: int = 100) -> ResNet:
    return ResNet(110, num_classes=num_classes)


def resnet8x4(num_classes: int = 100) -> ResNet:
    """resnet8 with four times the channels (two times in the stem)."""
    return ResNet(8, _WIDE, num_classes)


def resnet32x4(num_classes: int = 100) -> ResNet:
    """resnet32 with four times the channels (two times in the stem)."""
    return ResNet(32, _WIDE, num_classes)
