"""A small fully convolutional network for segmentation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .tiny_cnn import conv_block


class TinyFCN(nn.Module):
    """A stem and the blocks of :class:`kdkernels.models.TinyCNN`, with class scores from each.

    The scores are added from the coarsest resolution to the finest: the scores of a block are
    enlarged by 2 (bilinear interpolation) and added to those of the layer before it, as in Long,
    Shelhamer, Darrell (CVPR 2015). The stem is a 3x3 convolution at full resolution.

    Taps: ``block1`` (width channels, 1/2 of the image's resolution), ``block2`` (2 width, 1/4),
    ``block3`` (4 width, 1/8).

    Args:
        width: number of channels of the stem and of the first block.
        depth: number of convolutions per block.
        num_classes: number of classes.
    """

    def __init__(self, width: int = 16, depth: int = 1, num_classes: int = 11):
        super().__init__()
        if min(width, depth, num_classes) < 1:
            raise ValueError(f"width, depth and num_classes must be at least 1, got {width}, {depth} and {num_classes}")
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.block1 = conv_block(width, width, depth)
        self.block2 = conv_block(width, 2 * width, depth)
        self.block3 = conv_block(2 * width, 4 * width, depth)
        self.scores = nn.ModuleList(nn.Conv2d(channels, num_classes, 1) for channels in (width, width, 2 * width, 4 * width))

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes, H, W]
        maps = [self.stem(x)]
        for block in (self.block1, self.block2, self.block3):
            maps.append(block(maps[-1]))
        scores = self.scores[3](maps[3])
        for i in (2, 1, 0):
            finer = self.scores[i](maps[i])
            scores = finer + F.interpolate(scores, finer.shape[2:], mode="bilinear", align_corners=False)
        return scores
