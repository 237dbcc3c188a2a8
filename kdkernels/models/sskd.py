"""The networks of SVD-KD's experiments, for images of 32x32 pixels.

Lee, Kim, Song, ECCV 2018, section 4. They are three pairs of a student and a deeper teacher, which
have the same number of channels at each tap.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_WIDTHS = (64, 128, 256, 512)


class PlainVGG(nn.Module):
    """Four stages of 3x3 convolutions with ReLU and without batch norm, linear layers, dropout.

    Each stage ends with max pooling.

    Taps: ``pool0`` to ``pool3``, with 64, 128, 256 and 512 channels and the resolutions 1/2, 1/4,
    1/8 and 1/16, relative to the image.

    Args:
        convolutions: number of convolutions of each stage.
        hidden: number of linear layers with 1024 outputs before the classifier.
        num_classes: number of classes.
        image_size: height and width of the images, a multiple of 16. The size of the first linear
            layer depends on it.
    """

    def __init__(self, convolutions: tuple[int, ...] = (1, 1, 1, 1), hidden: int = 1, num_classes: int = 100, image_size: int = 32):
        super().__init__()
        if len(convolutions) != 4 or min(convolutions) < 1:
            raise ValueError(f"convolutions must be four numbers >= 1, got {convolutions}")
        if hidden < 1:
            raise ValueError(f"hidden must be >= 1, got {hidden}")
        if image_size < 16 or image_size % 16:
            raise ValueError(f"image_size must be a multiple of 16, got {image_size}")
        inputs = 3
        for i, (outputs, count) in enumerate(zip(_WIDTHS, convolutions, strict=True)):
            layers: list[nn.Module] = []
            for _ in range(count):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = outputs
            setattr(self, f"stage{i}", nn.Sequential(*layers))
            setattr(self, f"pool{i}", nn.MaxPool2d(2))
        layers, inputs = [nn.Flatten()], inputs * (image_size // 16) ** 2
        for _ in range(hidden):
            layers += [nn.Linear(inputs, 1024), nn.ReLU(inplace=True)]
            inputs = 1024
        self.classifier = nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(inputs, num_classes))
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        for i in range(4):
            x = getattr(self, f"pool{i}")(getattr(self, f"stage{i}")(x))
        return self.classifier(x)


class MobileNet(nn.Module):
    """A stem, four stages of depthwise separable convolutions, global average pooling, classifier.

    Howard et al. 2017.

    Taps: ``stage0`` to ``stage3``, after batch norm and ReLU, with 64, 128, 256 and 512 channels
    and the resolutions 1, 1/2, 1/4, 1/8, relative to the image.

    Args:
        blocks: number of blocks of each stage. From the second stage on, the first block of a stage
            has stride 2.
        num_classes: number of classes.
    """

    def __init__(self, blocks: tuple[int, ...] = (1, 1, 1, 3), num_classes: int = 100):
        super().__init__()
        if len(blocks) != 4 or min(blocks) < 1:
            raise ValueError(f"blocks must be four numbers >= 1, got {blocks}")
        self.stem = _conv_bn_relu(3, 32, 3)
        inputs = 32
        for i, (outputs, count) in enumerate(zip(_WIDTHS, blocks, strict=True)):
            layers: list[nn.Module] = []
            for j in range(count):
                layers += [*_conv_bn_relu(inputs, inputs, 3, 2 if i and j == 0 else 1, groups=inputs), *_conv_bn_relu(inputs, outputs, 1)]
                inputs = outputs
            setattr(self, f"stage{i}", nn.Sequential(*layers))
        self.classifier = nn.Linear(inputs, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.stem(x)
        for i in range(4):
            x = getattr(self, f"stage{i}")(x)
        return self.classifier(x.mean((2, 3)))


class ResNeXt(nn.Module):
    """A stem, three stages of grouped residual bottlenecks, global average pooling, classifier.

    Xie et al. 2017.

    Taps: ``stem``, ``stage0`` to ``stage2``, after the ReLU, with 64, 64, 128 and 256 channels and
    the resolutions 1, 1, 1/2, 1/4, relative to the image.

    Args:
        blocks: number of blocks of each stage.
        groups: number of groups of the 3x3 convolutions, which have half of the channels of the
            stage.
        num_classes: number of classes.
    """

    def __init__(self, blocks: int = 3, groups: int = 8, num_classes: int = 100):
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks must be >= 1, got {blocks}")
        self.stem = _conv_bn_relu(3, 64, 3)
        inputs = 64
        for i, outputs in enumerate((64, 128, 256)):
            layers = []
            for j in range(blocks):
                layers.append(_Bottleneck(inputs, outputs, 2 if i and j == 0 else 1, groups))
                inputs = outputs
            setattr(self, f"stage{i}", nn.Sequential(*layers))
        self.classifier = nn.Linear(inputs, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.stem(x)
        for i in range(3):
            x = getattr(self, f"stage{i}")(x)
        return self.classifier(x.mean((2, 3)))


class _Bottleneck(nn.Module):
    """1x1 convolution to half of the channels, grouped 3x3, 1x1 to all channels, and a shortcut.

    If the shape changes, the shortcut is average-pooled, and zero channels are appended.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int):
        super().__init__()
        inner = outputs // 2
        self.residual = nn.Sequential(
            *_conv_bn_relu(inputs, inner, 1),
            *_conv_bn_relu(inner, inner, 3, stride, groups),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.stride, self.added_channels = stride, outputs - inputs
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.stride == 1 else F.avg_pool2d(x, self.stride)
        return self.relu(F.pad(shortcut, (0, 0, 0, 0, 0, self.added_channels)) + self.residual(x))


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _initialize(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def sskd_vgg_student(num_classes: int = 100, image_size: int = 32) -> PlainVGG:
    """PlainVGG with one convolution per stage and one hidden layer."""
    return PlainVGG((1, 1, 1, 1), 1, num_classes, image_size)


def sskd_vgg_teacher(num_classes: int = 100, image_size: int = 32) -> PlainVGG:
    """PlainVGG with 2, 2, 3 and 3 convolutions per stage and two hidden layers."""
    return PlainVGG((2, 2, 3, 3), 2, num_classes, image_size)


def sskd_mobilenet_student(num_classes: int = 100) -> MobileNet:
    """MobileNet with 1, 1, 1 and 3 blocks per stage."""
    return MobileNet((1, 1, 1, 3), num_classes)


def sskd_mobilenet_teacher(num_classes: int = 100) -> MobileNet:
    """MobileNet with 1, 2, 2 and 8 blocks per stage."""
    return MobileNet((1, 2, 2, 8), num_classes)


def sskd_resnext_student(num_classes: int = 100) -> ResNeXt:
    """ResNeXt with three blocks per stage."""
    return ResNeXt(3, num_classes=num_classes)


def sskd_resnext_teacher(num_classes: int = 100) -> ResNeXt:
    """ResNeXt with six blocks per stage."""
    return ResNeXt(6, num_classes=num_classes)
