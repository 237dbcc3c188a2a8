"""Realistic feature maps [B, C, H, W] for the benches of truncated_svd."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn


def natural_images(batch: int, height: int, width: int) -> Tensor:
    """Generate noise [batch, 3, height, width] with a 1/f spectrum, as photographs have."""
    frequency = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.fftfreq(width) ** 2).sqrt()
    frequency[0, 0] = 1 / max(height, width)
    image = torch.fft.ifft2(torch.fft.fft2(torch.randn(batch, 3, height, width)) / frequency).real
    return (image - image.mean((1, 2, 3), keepdim=True)) / image.std((1, 2, 3), keepdim=True)


@torch.no_grad()
def relu_maps(batch: int, channels: int, side: int) -> Tensor:
    """Return the feature maps of a random network on images of :func:`natural_images`.

    The network has three 3 x 3 convolutions with batch norm and ReLU.
    """
    x = natural_images(batch, side, side)
    for width in (max(16, channels // 4), max(16, channels // 2), channels):
        x = nn.BatchNorm2d(width)(nn.Conv2d(x.shape[1], width, 3, padding=1)(x)).relu()
    return x


@functools.cache
@torch.enable_grad()
def trained_network() -> nn.Module:
    """Train TinyCNN(width=64) for one epoch on 4,000 images of ClutterDigits."""
    from kdkernels.data import ClutterDigits
    from kdkernels.models import TinyCNN

    data = ClutterDigits(train_size=4000, val_size=256, test_size=256, batch_size=64)
    data.prepare_data()
    data.setup()
    net = TinyCNN(width=64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for batch in data.train_dataloader():
        batch = data.finish(batch)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch["image"]), batch["label"]).backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def trained_maps(batch: int, block: str) -> Tensor:
    """Return the feature maps of the trained network on test images. Needs the extra ``train``."""
    for module in ("lightning", "sklearn"):
        pytest.importorskip(module)
    from kdkernels.data import ClutterDigits

    data = ClutterDigits(train_size=64, val_size=64, test_size=max(64, batch), batch_size=batch)
    data.prepare_data()
    data.setup()
    captured: dict[str, Tensor] = {}
    net = trained_network()
    handle = net.get_submodule(block).register_forward_hook(lambda *args: captured.update(output=args[2]))
    net(data.finish(next(iter(data.test_dataloader())))["image"])
    handle.remove()
    return captured["output"]
