"""A small network for segmentation with a BiFPN, as in EfficientDet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .bifpn import BiFPNLayer
from .tiny_cnn import conv_block


class TinyBiFPN(nn.Module):
    """The blocks of :class:`kdkernels.models.TinyCNN`, then BiFPN layers, and a 1x1 classifier.

    The feature maps of the three blocks are refined by a BiFPN of equal width, as in EfficientDet
    (Tan, Pang, Le, CVPR 2020). The classifier reads the finest refined map, and its scores are
    enlarged to the size of the image (bilinear interpolation). The last BiFPN layer has only a
    top-down path, because the finest map does not depend on the other one.

    The authors of FRSKD train a larger network of this form, and their self-teacher continues the
    BiFPN of the network: ``FRSKD(TinyBiFPN(), ["refined1", "refined2", "refined3"], width=1,
    laterals=False)``.

    Taps: ``block1`` (width channels, 1/2 of the image's resolution), ``block2`` (2 width, 1/4),
    ``block3`` (4 width, 1/8); and the refined maps ``refined1``, ``refined2``, ``refined3``
    (channels, same resolutions), before their ReLU.

    Args:
        width: number of channels of the first block.
        depth: number of convolutions per block.
        num_classes: number of classes.
        channels: number of channels of the BiFPN.
        layers: number of BiFPN layers; three for the authors.

    Raises:
        ValueError: an argument is less than 1.
    """

    def __init__(self, width: int = 16, depth: int = 1, num_classes: int = 11, channels: int = 32, layers: int = 3):
        super().__init__()
        if min(width, depth, num_classes, channels, layers) < 1:
            raise ValueError(
                f"width, depth, num_classes, channels and layers must be at least 1, got {width}, {depth}, {num_classes}, {channels} and {layers}"
            )
        self.block1 = conv_block(3, width, depth)
        self.block2 = conv_block(width, 2 * width, depth)
        self.block3 = conv_block(2 * width, 4 * width, depth)
        inputs = [width, 2 * width, 4 * width]
        self.bifpn = nn.ModuleList(BiFPNLayer(inputs if i == 0 else None, [channels] * 3, depth=1, bottom_up=i < layers - 1) for i in range(layers))
        self.refined1, self.refined2, self.refined3 = nn.Identity(), nn.Identity(), nn.Identity()
        self.scores = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, num_classes, H, W]
        size = x.shape[2:]
        maps = []
        for block in (self.block1, self.block2, self.block3):
            x = block(x)
            maps.append(x)
        for layer in self.bifpn:
            maps = layer(maps)
        finest, *_ = [tap(refined) for tap, refined in zip((self.refined1, self.refined2, self.refined3), maps, strict=True)]
        return F.interpolate(self.scores(F.relu(finest)), size, mode="bilinear", align_corners=False)
