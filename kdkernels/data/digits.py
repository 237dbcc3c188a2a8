"""Digits: the 8x8 scans of handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor

from .augment import Augment
from .base import ImageData, TensorImages, require_at_least

# Where each split begins and ends, as fractions of the 1,797 scans in random order.
_SPLIT_FRACTIONS = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}


class Digits(ImageData):
    """Scans [C, 8, 8] of handwritten digits, ten classes (UCI, Alpaydin and Kaynak 1998).

    Of the 1,797 scans, 1,078 are for training, 270 for validation and 449 for testing.

    Args:
        channels: number of channels, all with the same grey value; 3 for networks that expect
            colours.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
    """

    num_classes = 10
    classes = tuple("0123456789")
    image_shape: tuple[int, int, int]

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
    """Return all scans [1797, 8, 8] in [0, 1], and their labels [1797]."""
    from sklearn.datasets import load_digits

    scans = load_digits()
    return torch.from_numpy(scans.images).float() / 16, torch.from_numpy(scans.target).long()


def split_scans(count: int) -> dict[str, Tensor]:
    """Return the indices of the scans of each split; the splits are disjoint."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1797))
    return {split: order[round(first * count) : round(last * count)] for split, (first, last) in _SPLIT_FRACTIONS.items()}
