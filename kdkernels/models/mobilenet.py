"""MobileNetV2 (Sandler et al. 2018) for images of 32x32 pixels, as used in distillation papers."""

from __future__ import annotations

from torch import Tensor, nn

# For each stage: channels before the factor ``width``, number of blocks, stride of the first block.
_STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class MobileNetV2(nn.Module):
    """A stem, seven stages of inverted residuals, 1x1 convolution, average pooling, classifier.

    The stem has stride 2. The 1x1 convolution has 1280 output channels. Parameters are named as in
    RepDistiller's networks, so weights that were trained with RepDistiller can be loaded.

    Taps: ``conv1`` (the stem), ``blocks.0`` to ``blocks.6``, ``conv2``. Their resolutions, relative
    to the image, are 1/2; 1/2, 1/2, 1/4, 1/8, 1/8, 1/16, 1/16; 1/16.

    Args:
        width: factor for the numbers of channels.
        expansion: expansion of the inverted residuals, except in the first stage, where it is 1.
        num_classes: number of classes.
    """

    def __init__(self, width: float = 0.5, expansion: int = 6, num_classes: int = 100):
        super().__init__()
        inputs, last = int(32 * width), max(1280, int(1280 * width))
        self.conv1 = _conv_bn_relu(3, inputs, 3, stride=2)
        self.blocks = nn.ModuleList()
        for i, (channels, count, stride) in enumerate(_STAGES):
            outputs, blocks = int(channels * width), []
            for j in range(count):
                blocks.append(InvertedResidual(inputs, outputs, stride if j == 0 else 1, expansion if i else 1))
                inputs = outputs
            self.blocks.append(nn.Sequential(*blocks))
        self.conv2 = _conv_bn_relu(inputs, last, 1)
        linear = nn.Linear(last, num_classes)
        self.classifier = nn.Sequential(linear)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes]
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        return self.classifier(self.conv2(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, depthwise 3x3, 1x1 to fewer channels without ReLU.

    The input is added if it has the shape of the output.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        expanded = inputs * expansion
        self.conv = nn.Sequential(
            *_conv_bn_relu(inputs, expanded, 1),
            *_conv_bn_relu(expanded, expanded, 3, stride, groups=expanded),
            nn.Conv2d(expanded, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


def _conv_bn_relu(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def mobilenet_v2(num_classes: int = 100) -> MobileNetV2:
    """MobileNetV2 with half of the channels (``width=0.5``) and expansion 6."""
    return MobileNetV2(num_classes=num_classes)
