"""Digits: the 8x8 scans of handwritten digits that scikit-learn carries. No download."""

from __future__ import annotations

import torch
from torch import Tensor

from .augment import Augment
from .base import ImageData, TensorImages, require_at_least

_EDGES = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}  # of the 1,797 scans


class Digits(ImageData):
    """1,797 scans [C, 8, 8] of ten classes (UCI, Alpaydin and Kaynak 1998): 1,078 to train, 270 to validate, 449 to test.

    Args:
        channels: 3 repeats the grey value, for networks that expect colour; 1 does not.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
    """

    num_classes = 10
    classes = tuple("0123456789")

    def __init__(self, channels: int = 3, batch_size: int = 64, augment: Augment | None = None, order_seed: int = 0, num_workers: int = 0):
        super().__init__(batch_size, augment, order_seed, num_workers)
        require_at_least("channels", channels, 1)
        self.image_shape = (channels, 8, 8)
        self.mean, self.std = (0.305,) * channels, (0.376,) * channels

    def make_splits(self) -> dict[str, TensorImages]:
        scans, labels = load_scans()
        image = (scans * 255).round().to(torch.uint8)[:, None].repeat(1, self.image_shape[0], 1, 1)
        return {split: TensorImages(image=image[part], label=labels[part]) for split, part in split_scans(len(scans)).items()}


def load_scans() -> tuple[Tensor, Tensor]:
    """All scans [1797, 8, 8] in [0, 1], and their labels [1797]."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    return torch.from_numpy(scans.images).float() / 16, torch.from_numpy(scans.target).long()


def split_scans(count: int) -> dict[str, Tensor]:
    """The scans of each split; no scan is in two."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1797))
    return {split: order[round(first * count) : round(last * count)] for split, (first, last) in _EDGES.items()}
