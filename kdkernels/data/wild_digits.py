"""WildDigits: unlabelled images of which some resemble those of ClutterDigits, and some do not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .base import require_at_least
from .clutter_digits import ClutterImages, draw_scans

# Kinds of images, and their shares of the pool.
KINDS = {"digit": 0.3, "part of a digit": 0.15, "two digits": 0.15, "scrambled digit": 0.1, "shape": 0.15, "photograph": 0.15}
NO_DIGIT = -1
_SEED = 1_000_000  # other random numbers than those of ClutterDigits
# The purpose of a random number, as in clutter_digits.py.
_KIND, _SCAN, _ANGLE, _ZOOM, _SHIFT, _SECOND_SCAN, _SECOND_SHIFT, _ORDER, _IS_RING, _SIZE, _WIDTH = range(100, 111)
_QUADRANTS = torch.tensor([[1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0], [1, 2, 3, 0], [2, 0, 3, 1], [3, 0, 1, 2]])  # no quadrant remains at its place


class WildDigits(Dataset):
    """A pool of unlabelled images [3, 32, 32] uint8, for distillation without the original data.

    The teacher's data are :class:`ClutterDigits`. The pool has six kinds of images: digits that are
    rotated, zoomed and shifted more (30 %), enlarged parts of a digit (15 %), two digits (15 %),
    digits whose quadrants are exchanged (10 %), rings and bars (15 %), and photographs alone (15
    %). Contrasts are lower, and the pixel noise is stronger. The digits are scans of the training
    split.

    An item is an image alone. The true labels are held back for evaluation: :meth:`true_labels`. An
    image depends only on the seed and its position, and is generated when it is read, so a pool can
    have any size.

    Args:
        count: number of images.
        seed: seed of the images.
    """

    def __init__(self, count: int = 20000, seed: int = 0):
        for name, value in (("count", count), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        require_at_least("count", count, 1)
        self.count, self.seed = count, seed
        self._images = _WildImages("train", count, _SEED + seed, max_rotation=35.0, max_shift=5.0, contrast=0.15, noise=0.05)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if not -self.count <= index < self.count:
            raise IndexError(f"the pool has {self.count} images, got the index {index}")
        return self.__getitems__([index % self.count])[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return list(self._images.make(torch.tensor(indices))["image"])

    def true_labels(self, indices: Tensor) -> Tensor:
        """Return the digits in images [N] int64, -1 where there is none or more than one.

        Args:
            indices: positions [N] int64.
        """
        indices = torch.as_tensor(indices)
        return torch.cat([self._images.make_ink(part)[1] for part in indices.split(500)])

    def kinds(self, indices: Tensor) -> list[str]:
        """Return the names of the kinds of images at positions [N]."""
        names = list(KINDS)
        return [names[i] for i in self._images.kinds(torch.as_tensor(indices)).tolist()]


class _WildImages(ClutterImages):
    def kinds(self, index: Tensor) -> Tensor:
        limits = torch.tensor(list(KINDS.values())).cumsum(0)
        return torch.bucketize(self.random(index, _KIND), limits[:-1], right=True)

    def make_ink(self, index: Tensor) -> tuple[Tensor, Tensor]:
        drawers = (self._digit, self._part, self._two_digits, self._scrambled, self._shape, self._photograph)
        ink, label = torch.zeros(len(index), 1, 32, 32), torch.full((len(index),), NO_DIGIT)
        kinds = self.kinds(index)
        for kind, draw in enumerate(drawers):
            (chosen,) = (kinds == kind).nonzero(as_tuple=True)
            if len(chosen):
                ink[chosen], label[chosen] = draw(index[chosen])
        return ink, label

    def _scan(self, index: Tensor, purpose: int = _SCAN) -> tuple[Tensor, Tensor]:
        scans, labels, _ = self._sources
        scan = (self.random(index, purpose) * len(scans)).long()
        return scans[scan], labels[scan]

    def _draw(self, index: Tensor, zoom: tuple[float, float], max_shift: float) -> tuple[Tensor, Tensor]:
        scans, labels = self._scan(index)
        angle = self.random(index, _ANGLE, low=-self.max_rotation, high=self.max_rotation).deg2rad()
        shift = self.random(index, _SHIFT, 2, low=-max_shift, high=max_shift) / 16
        return draw_scans(scans, angle, self.random(index, _ZOOM, low=zoom[0], high=zoom[1]), shift), labels

    def _digit(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self._draw(index, (0.75, 1.5), self.max_shift)

    def _part(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self._draw(index, (0.35, 0.6), 8.0)

    def _two_digits(self, index: Tensor) -> tuple[Tensor, Tensor]:
        ink = torch.zeros(len(index), 1, 32, 32)
        for side, scan, shift in ((1.0, _SCAN, _SHIFT), (-1.0, _SECOND_SCAN, _SECOND_SHIFT)):
            place = torch.tensor([side * 0.7, 0.0]) + self.random(index, shift, 2, low=-0.3, high=0.3)
            angle = self.random(index, _ANGLE, low=-12, high=12).deg2rad()
            ink = torch.maximum(ink, draw_scans(self._scan(index, scan)[0], angle, self.random(index, _ZOOM, low=1.5, high=1.9), place))
        return ink, torch.full((len(index),), NO_DIGIT)

    def _scrambled(self, index: Tensor) -> tuple[Tensor, Tensor]:
        ink, _ = self._draw(index, (0.95, 1.2), 1.5)
        quadrants = ink.view(-1, 2, 16, 2, 16).transpose(2, 3).reshape(-1, 4, 16, 16)
        order = _QUADRANTS[(self.random(index, _ORDER) * len(_QUADRANTS)).long()]
        exchanged = quadrants.gather(1, order[:, :, None, None].expand_as(quadrants))
        return exchanged.view(-1, 2, 2, 16, 16).transpose(2, 3).reshape(-1, 1, 32, 32), torch.full((len(index),), NO_DIGIT)

    def _shape(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a ring or a bar with soft edges."""
        y, x = torch.meshgrid(torch.arange(32.0) - 15.5, torch.arange(32.0) - 15.5, indexing="ij")
        angle = self.random(index, _ANGLE, 1, 1, high=180).deg2rad()
        place = self.random(index, _SHIFT, 2, 1, 1, low=-5, high=5)
        along = (x - place[:, 0]) * angle.cos() + (y - place[:, 1]) * angle.sin()
        across = (y - place[:, 1]) * angle.cos() - (x - place[:, 0]) * angle.sin()
        size = self.random(index, _SIZE, 2, 1, 1, low=4, high=13)
        width = self.random(index, _WIDTH, 1, 1, low=1.5, high=3)
        radius = ((along / size[:, 0]) ** 2 + (across / size[:, 1]) ** 2).sqrt()
        ring = (width - (radius - 1).abs() * size.amin(1)).clamp(0, 1)
        bar = (width - across.abs()).clamp(0, 1) * (size[:, 0] - along.abs()).clamp(0, 1)
        is_ring = self.random(index, _IS_RING, 1, 1) < 0.5
        return torch.where(is_ring, ring, bar)[:, None], torch.full((len(index),), NO_DIGIT)

    def _photograph(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(index), 1, 32, 32), torch.full((len(index),), NO_DIGIT)
