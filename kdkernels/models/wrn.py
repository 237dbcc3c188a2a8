"""Wide residual networks: batch norm and ReLU before each convolution.

Zagoruyko, Komodakis 2016.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class WideResNet(nn.Module):
    """A 3x3 stem, three stages of residual blocks, global average pooling, and a linear classifier.

    The stem has 16 channels, the stages have 16 w, 32 w and 64 w channels. Batch norm and ReLU
    follow the last stage. Parameters are named as in RepDistiller's networks, so weights that were
    trained with RepDistiller can be loaded.

    Taps: ``conv1`` (the stem), ``block1``, ``block2``, ``block3``; their resolutions, relative to
    the image, are 1, 1, 1/2, 1/4. The outputs of ``block1`` to ``block3`` are sums of residuals,
    before batch norm and ReLU.
    ``relu`` is the output of the last stage after batch norm and ReLU.

    Args:
        depth: number of layers, 6 n + 4 with n blocks per stage.
        width: the factor w.
        dropout: dropout probability between the two convolutions of a block.
        num_classes: number of classes.
    """

    def __init__(self, depth: int = 16, width: int = 2, dropout: float = 0.0, num_classes: int = 100):
        super().__init__()
        blocks, remainder = divmod(depth - 4, 6)
        if remainder or blocks < 1:
            raise ValueError(f"depth must be 6 n + 4 (10, 16, 22, ...), got {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = Stage(16, 16 * width, blocks, 1, dropout)
        self.block2 = Stage(16 * width, 32 * width, blocks, 2, dropout)
        self.block3 = Stage(32 * width, 64 * width, blocks, 2, dropout)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(64 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.relu(self.bn1(x)).mean((2, 3)))


class Stage(nn.Module):
    def __init__(self, inputs: int, outputs: int, blocks: int, stride: int, dropout: float):
        super().__init__()
        self.layer = nn.Sequential(
            *[PreActivationBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1, dropout) for i in range(blocks)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class PreActivationBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        x = F.relu(self.bn2(self.conv1(activated)))
        x = F.dropout(x, self.dropout, self.training)
        return shortcut + self.conv2(x)


def wrn_16_1(num_classes: int = 100) -> WideResNet:
    return WideResNet(16, 1, num_classes=num_classes)


def wrn_16_2(num_classes: int = 100) -> WideResNet:
    return WideResNet(16, 2, num_classes=num_classes)


def wrn_40_1(num_classes: int = 100) -> WideResNet:
    return WideResNet(40, 1, num_classes=num_classes)


def wrn_40_2(num_classes: int = 100) -> WideResNet:
    return WideResNet(40, 2, num_classes=num_classes)
