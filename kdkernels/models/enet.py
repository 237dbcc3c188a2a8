"""ENet (Paszke et al. 2016) with the encoder and the existence branch of ENet-SAD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ENet(nn.Module):
    """ENet for lane detection, as in Self Attention Distillation (Hou et al., ICCV 2019).

    The encoder has four parts: E1 is the initial block with stage 1 of ENet, at 1/4 of the image's
    resolution. E2, E3 and E4, at 1/8, are stage 2 with its downsampling, stage 3, and one more
    stage of the same layers. The decoder takes the concatenated outputs of E3 and E4, and is
    otherwise ENet's. The existence branch maps the output of E4 with a 1x1 convolution, a softmax
    over the channels, 2x2 average pooling and two linear layers to the logits of the existence of
    each lane.

    Taps: ``encoder1`` (64 channels, 1/4), ``encoder2``, ``encoder3``, ``encoder4`` (128 channels,
    1/8). All numbers of channels are multiplied by ``width``.

    Images may have any height and width that are multiples of 8. The linear layers of the existence
    branch are made for ``image_size``. For this size the pooling is 2x2 (if height and width are
    multiples of 16); images of another size are pooled to the same number of cells by adaptive
    average pooling.

    Args:
        num_classes: number of classes of the logits: the background and the lanes.
        width: factor of the numbers of channels; 1.0 is the paper's network. Channels are rounded
            to multiples of 4, and are at least 8.
        image_size: height and width of the images, multiples of 8.
        share_weights: let E2, E3 and E4 share the convolutions of their stages. Each keeps its own
            batch norm and PReLU, because the statistics of their features differ.
        dropout: probability with which the bottlenecks drop whole channels; a tenth of it in E1, as
            in the paper.

    Raises:
        ValueError: an argument is out of range; or, when called, the height or width of the images
            is not a multiple of 8.
    """

    def __init__(
        self, num_classes: int = 5, width: float = 1.0, image_size: Sequence[int] = (64, 160), share_weights: bool = False, dropout: float = 0.1
    ):
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"num_classes must be an integer >= 2, got {num_classes!r}")
        if isinstance(width, bool) or not isinstance(width, (int, float)) or not 0 < width < float("inf"):
            raise ValueError(f"width must be a finite number > 0, got {width!r}")
        sides = list(image_size) if isinstance(image_size, Sequence) else [image_size]
        if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 8 or side % 8 for side in sides):
            raise ValueError(f"image_size must be the height and the width of the images, two multiples of 8, got {image_size!r}")
        if not isinstance(share_weights, bool):
            raise TypeError(f"share_weights must be True or False, got {share_weights!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        c0, c1, c2 = (max(8, 4 * round(width * channels / 4)) for channels in (16, 64, 128))
        self.initial = InitialBlock(c0)
        self.down1 = DownBottleneck(c0, c1, dropout / 10)
        self.encoder1 = nn.Sequential(*(Bottleneck(c1, dropout=dropout / 10) for _ in range(4)))
        self.down2 = DownBottleneck(c1, c2, dropout)
        self.encoder2, self.encoder3, self.encoder4 = (_stage(c2, dropout) for _ in range(3))
        if share_weights:
            for stage in (self.encoder3, self.encoder4):
                _share_convolutions(self.encoder2, stage)
        self.up1 = UpBottleneck(2 * c2, c1, dropout)
        self.decoder1 = nn.Sequential(*(Bottleneck(c1, dropout=dropout) for _ in range(2)))
        self.up2 = UpBottleneck(c1, c0, dropout)
        self.decoder2 = Bottleneck(c0, dropout=dropout)
        self.scores = nn.ConvTranspose2d(c0, num_classes, 2, 2)
        self.exists = ExistenceBranch(c2, num_classes, image_size)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return ``logits`` [B, num_classes, H, W] and ``existence`` [B, num_classes - 1].

        Args:
            x: images [B, 3, H, W].
        """
        if x.shape[-2] % 8 or x.shape[-1] % 8:
            raise ValueError(f"height and width of the images must be multiples of 8, got {list(x.shape[-2:])}")
        x, indices1 = self.down1(self.initial(x))
        x, indices2 = self.down2(self.encoder1(x))
        e3 = self.encoder3(self.encoder2(x))
        e4 = self.encoder4(e3)
        x = self.decoder1(self.up1(torch.cat([e3, e4], 1), indices2))
        x = self.decoder2(self.up2(x, indices1))
        return {"logits": self.scores(x), "existence": self.exists(e4)}


class InitialBlock(nn.Module):
    """A 3x3 convolution with stride 2 beside 2x2 max pooling of the image, concatenated."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(3, channels - 3, 3, 2, 1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(channels), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, channels, H/2, W/2]
        return self.act(self.norm(torch.cat([self.conv(x), F.max_pool2d(x, 2)], 1)))


def _conv(inputs: int, outputs: int, kernel: int | tuple[int, int], **options: Any) -> nn.Sequential:
    """A convolution without bias, batch norm and PReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs), nn.PReLU(outputs))


def _last(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    """The expansion of a bottleneck: a 1x1 convolution, batch norm and dropout of channels."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.Dropout2d(dropout))


class Bottleneck(nn.Module):
    """A bottleneck with a residual: 1x1 projection to a quarter of the channels, one convolution,
    and 1x1 expansion.

    Args:
        channels: number of channels.
        dilation: dilation of the 3x3 convolution.
        asymmetric: 5x1 and 1x5 convolutions instead of one of 3x3.
        dropout: probability with which a channel is dropped.
    """

    def __init__(self, channels: int, dilation: int = 1, asymmetric: bool = False, dropout: float = 0.1):
        super().__init__()
        inner = channels // 4
        if asymmetric:
            first = nn.Conv2d(inner, inner, (5, 1), padding=(2, 0), bias=False)
            middle = nn.Sequential(first, *_conv(inner, inner, (1, 5), padding=(0, 2)))
        else:
            middle = _conv(inner, inner, 3, padding=dilation, dilation=dilation)
        self.branch = nn.Sequential(_conv(channels, inner, 1), middle, _last(inner, channels, dropout))
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.branch(x))


class DownBottleneck(nn.Module):
    """A bottleneck with stride 2, whose residual is max pooling with zeros for further channels."""

    def __init__(self, inputs: int, outputs: int, dropout: float):
        super().__init__()
        inner = inputs // 4
        self.branch = nn.Sequential(_conv(inputs, inner, 2, stride=2), _conv(inner, inner, 3, padding=1), _last(inner, outputs, dropout))
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [B, outputs, H/2, W/2], and the positions of the maxima."""
        branch = self.branch(x)
        pooled, indices = F.max_pool2d(x, 2, return_indices=True)
        return self.act(F.pad(pooled, [0, 0, 0, 0, 0, branch.shape[1] - x.shape[1]]) + branch), indices


def unpool(x: Tensor, indices: Tensor) -> Tensor:
    """Undo 2x2 max pooling: put each value where the maximum was, and 0 elsewhere.

    The same as ``torch.nn.functional.max_unpool2d``, which is not deterministic.

    Args:
        x: [B, C, H, W].
        indices: of ``max_pool2d(..., 2, return_indices=True)``, [B, C, H, W].

    Returns:
        [B, C, 2 H, 2 W].
    """
    width = 2 * x.shape[3]
    row, column = indices // width % 2, indices % 2  # within the four pixels of a maximum
    two = torch.arange(2, device=x.device)
    is_maximum = (row[:, :, :, None, :, None] == two[:, None, None]) & (column[:, :, :, None, :, None] == two)
    return torch.where(is_maximum, x[:, :, :, None, :, None], 0).flatten(4).flatten(2, 3)


class UpBottleneck(nn.Module):
    """A bottleneck that doubles the resolution; its residual puts values where the maxima were."""

    def __init__(self, inputs: int, outputs: int, dropout: float):
        super().__init__()
        inner = inputs // 4
        up = nn.Sequential(nn.ConvTranspose2d(inner, inner, 2, 2, bias=False), nn.BatchNorm2d(inner), nn.PReLU(inner))
        self.branch = nn.Sequential(_conv(inputs, inner, 1), up, _last(inner, outputs, dropout))
        self.residual = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor, indices: Tensor) -> Tensor:
        return self.act(unpool(self.residual(x), indices) + self.branch(x))


class ExistenceBranch(nn.Module):
    """Logits of the existence of each lane: 1x1 convolution, softmax over the channels, 2x2 average
    pooling, and linear layers with 128 hidden units.
    """

    def __init__(self, channels: int, num_classes: int, image_size: Sequence[int]):
        super().__init__()
        cells = [max(1, side // 16) for side in image_size]
        self.scores = nn.Conv2d(channels, num_classes, 1)
        self.pool = nn.AdaptiveAvgPool2d((cells[0], cells[1]))
        self.hidden = nn.Linear(num_classes * cells[0] * cells[1], 128)
        self.out = nn.Linear(128, num_classes - 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, H/8, W/8] -> [B, num_classes - 1]
        return self.out(F.relu(self.hidden(self.pool(self.scores(x).softmax(1)).flatten(1))))


def _stage(channels: int, dropout: float) -> nn.Sequential:
    """The eight bottlenecks of ENet's stages 2 and 3, without the downsampling."""

    def layer(dilation: int = 1, asymmetric: bool = False) -> Bottleneck:
        return Bottleneck(channels, dilation, asymmetric, dropout)

    return nn.Sequential(layer(), layer(2), layer(asymmetric=True), layer(4), layer(), layer(8), layer(asymmetric=True), layer(16))


def _share_convolutions(source: nn.Module, target: nn.Module) -> None:
    """Let the convolutions of ``target`` use the weights of those of ``source``."""
    for first, second in zip(source.modules(), target.modules(), strict=True):
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d):
            second.weight = first.weight
