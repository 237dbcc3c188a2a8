"""ClutterDigits: handwritten digits pasted on photographs, made from images that scikit-learn carries. No download."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

_SPLITS = {"train": (0.0, 0.6), "val": (0.6, 0.75), "test": (0.75, 1.0)}  # of the 1,797 digits: no digit is in two splits
_RECIPE = 1  # raised whenever the images of a seed change
MEAN, STD = (0.45, 0.45, 0.42), (0.27, 0.27, 0.29)


class ClutterDigits(L.LightningDataModule):
    """Digits (8x8 scans of scikit-learn) enlarged, rotated, shifted, coloured and pasted on crops of its two photographs.

    A batch is a dict of ``image`` [B, 3, 32, 32] float32, normalised; ``label`` [B] int64; ``mask`` [B, 32, 32] bool, the pixels of the digit.
    The images are a function of the seed and the sizes alone; they are made once and cached.

    Args:
        train_size, val_size, test_size: images per split. The splits share no digit.
        batch_size: images per batch.
        seed: of the images, not of the order in which they are shown (that follows torch's generator).
        max_rotation: degrees.
        max_shift: in pixels.
        contrast: least distance between the grey of the ink and the grey of the crop behind it, in [0, 0.5].
        noise: standard deviation of the pixel noise, on a scale where white is 1.
        cache_dir: where the images are kept; by default ``~/.cache/kdkernels``, or ``KDKERNELS_CACHE``.
    """

    num_classes = 10
    image_shape = (3, 32, 32)

    def __init__(
        self,
        train_size: int = 8000,
        val_size: int = 1000,
        test_size: int = 4000,
        batch_size: int = 128,
        seed: int = 0,
        max_rotation: float = 12.0,
        max_shift: float = 1.5,
        contrast: float = 0.3,
        noise: float = 0.03,
        cache_dir: str | os.PathLike | None = None,
    ):
        super().__init__()
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for name, size in {**{f"{k}_size": v for k, v in self.sizes.items()}, "batch_size": batch_size}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not 0 <= contrast <= 0.5:
            raise ValueError(f"contrast must lie in [0, 0.5], got {contrast}")
        self.batch_size, self.seed = batch_size, seed
        self.look = {"max_rotation": max_rotation, "max_shift": max_shift, "contrast": contrast, "noise": noise}
        self.cache_dir = Path(cache_dir or os.environ.get("KDKERNELS_CACHE") or Path.home() / ".cache" / "kdkernels")
        self.splits: dict[str, ImageSet] = {}

    def prepare_data(self) -> None:
        for split in _SPLITS:
            path = self._path(split)
            if not path.exists():
                _write_atomically(path, self._make(split))

    def setup(self, stage: str | None = None) -> None:
        self.prepare_data()
        for split in _SPLITS:
            if split not in self.splits:
                self.splits[split] = ImageSet(**torch.load(self._path(split), weights_only=True))

    def _path(self, split: str) -> Path:
        recipe = json.dumps([_RECIPE, split, self.sizes[split], self.seed, self.look], sort_keys=True)
        return self.cache_dir / f"clutter_digits_{split}_{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.pt"

    def _make(self, split: str) -> dict[str, Tensor]:
        digits, labels, photographs = _sources()
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(1797))
        first, last = (round(edge * len(digits)) for edge in _SPLITS[split])
        pool = order[first:last]
        generator = torch.Generator().manual_seed(1000 * self.seed + list(_SPLITS).index(split))
        return make_images(digits[pool], labels[pool], photographs, self.sizes[split], generator, **self.look)

    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader:
        """Whole batches by one index: an in-memory set needs no worker processes."""
        images = self.splits[split]
        order = RandomSampler(images) if shuffle else SequentialSampler(images)
        return DataLoader(images, sampler=BatchSampler(order, self.batch_size, drop_last=False), batch_size=None)


class ImageSet(Dataset):
    """Images in memory, indexed one at a time or by a list."""

    def __init__(self, image: Tensor, label: Tensor, mask: Tensor):
        self.image, self.label, self.mask = image, label, mask  # [N, 3, 32, 32] uint8, [N] int64, [N, 32, 32] bool

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int | list[int]) -> dict[str, Tensor]:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
        return {"image": (self.image[index] / 255 - mean) / std, "label": self.label[index], "mask": self.mask[index]}


def _sources() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Digits [1797, 8, 8] in [0, 1], their labels, and photographs [3, H, W] in [0, 1]."""
    from sklearn.datasets import load_digits, load_sample_images

    scans = load_digits()
    digits = torch.from_numpy(scans.images).float() / 16
    photographs = [torch.tensor(p.copy()).permute(2, 0, 1).float() / 255 for p in load_sample_images().images]
    return digits, torch.from_numpy(scans.target).long(), photographs


def make_images(
    digits: Tensor,  # [D, 8, 8] in [0, 1]
    labels: Tensor,  # [D]
    photographs: list[Tensor],  # [3, H, W] in [0, 1]
    count: int,
    generator: torch.Generator,
    *,
    max_rotation: float,
    max_shift: float,
    contrast: float,
    noise: float,
) -> dict[str, Tensor]:
    """``count`` images: image [count, 3, 32, 32] uint8, label [count] and mask [count, 32, 32] bool."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    which = torch.randint(len(digits), (count,), generator=generator)
    angle = uniform(count, low=-max_rotation, high=max_rotation).deg2rad()
    zoom = uniform(count, low=0.95, high=1.2)
    shift = uniform(count, 2, low=-max_shift, high=max_shift) / 16
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, [count, 1, 32, 32], align_corners=False)
    ink = F.grid_sample(digits[which].unsqueeze(1), grid, mode="bicubic", align_corners=False).clamp(0, 1)  # [count, 1, 32, 32]

    background = torch.empty(count, 3, 32, 32)
    for i in range(count):
        photograph = photographs[int(torch.randint(len(photographs), (1,), generator=generator))]
        top, left = (int(torch.randint(extent - 32, (1,), generator=generator)) for extent in photograph.shape[1:])
        background[i] = photograph[:, top : top + 32, left : left + 32]

    # Ink of a random hue, on the far side of the crop's grey by at least `contrast`.
    grey = background.mean((1, 2, 3))
    room = torch.where(grey < 0.5, 1 - contrast - grey, grey - contrast)
    offset = contrast + uniform(count) * room.clamp(min=0)
    target = grey + torch.where(grey < 0.5, offset, -offset)
    hue = uniform(count, 3, low=-0.25, high=0.25)
    colour = (target[:, None] + hue - hue.mean(1, keepdim=True)).clamp(0, 1)
    image = ink * colour[:, :, None, None] + (1 - ink) * background
    image = (image + noise * torch.randn(image.shape, generator=generator)).clamp(0, 1)
    return {"image": (image * 255).round().to(torch.uint8), "label": labels[which], "mask": ink[:, 0] > 0.5}


def _write_atomically(path: Path, images: dict[str, Tensor]) -> None:
    """A reader sees the whole file or none, also when two processes make it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(images, file)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
