"""VGG networks with batch norm (Simonyan, Zisserman 2015) for images of 32x32 pixels.

These are the variants that distillation papers use.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


class VGG(nn.Module):
    """Five blocks of 3x3 convolutions with batch norm, global average pooling, linear classifier.

    Max pooling follows each of the first three blocks, and also the fourth if images are at least
    64 pixels high. Parameters are named as in RepDistiller's networks, so weights that were trained
    with RepDistiller can be loaded.

    Taps: ``relu0`` to ``relu4``, the outputs of the blocks after the ReLU, and ``block0`` to
    ``block4``, the same outputs before the ReLU. For images of 32x32 pixels their resolutions,
    relative to the image, are 1, 1/2, 1/4, 1/8, 1/8.

    Args:
        widths: for each block, the number of channels of each convolution.
        num_classes: number of classes.
    """

    def __init__(self, widths: tuple[tuple[int, ...], ...] = ((64,), (128,), (256,), (512,), (512,)), num_classes: int = 100):
        super().__init__()
        if len(widths) != 5 or not all(widths):
            raise ValueError(f"widths must contain five blocks of at least one convolution each, got {widths}")
        inputs = 3
        for i, block in enumerate(widths):
            layers: list[nn.Module] = []
            for outputs in block:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
                inputs = outputs
            setattr(self, f"block{i}", nn.Sequential(*layers[:-1]))
            setattr(self, f"relu{i}", nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(cast(Tensor, module.bias))
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        pools = 4 if x.shape[2] >= 64 else 3
        for i in range(5):
            x = getattr(self, f"relu{i}")(getattr(self, f"block{i}")(x))
            if i < pools:
                x = self.pool(x)
        return self.classifier(x.mean((2, 3)))


def vgg8(num_classes: int = 100) -> VGG:
    return VGG(num_classes=num_classes)


def vgg11(num_classes: int = 100) -> VGG:
    return VGG(((64,), (128,), (256, 256), (512, 512), (512, 512)), num_classes)


def vgg13(num_classes: int = 100) -> VGG:
    return VGG(((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)), num_classes)
