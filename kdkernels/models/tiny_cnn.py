"""A small plain CNN, used for the student and the teacher of the demo."""

from __future__ import annotations

from torch import Tensor, nn


class TinyCNN(nn.Module):
    """Three blocks of 3x3 convolutions, global average pooling, and a linear classifier.

    Each convolution is followed by batch norm and ReLU, and each block by max pooling.

    Taps: ``block1`` (width channels, 1/2 of the image's resolution), ``block2`` (2 width, 1/4),
    ``block3`` (4 width, 1/8).

    Args:
        width: number of channels of the first block.
        depth: number of convolutions per block.
        num_classes: number of classes.
    """

    def __init__(self, width: int = 32, depth: int = 1, num_classes: int = 10):
        super().__init__()
        if min(width, depth, num_classes) < 1:
            raise ValueError(f"width, depth and num_classes must be at least 1, got {width}, {depth} and {num_classes}")
        self.block1 = conv_block(3, width, depth)
        self.block2 = conv_block(width, 2 * width, depth)
        self.block3 = conv_block(2 * width, 4 * width, depth)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(x.mean((2, 3)))


def conv_block(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """``depth`` times 3x3 convolution, batch norm and ReLU, then 2x2 max pooling.

    Maps [B, inputs, H, W] to [B, outputs, H/2, W/2].
    """
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(2))
