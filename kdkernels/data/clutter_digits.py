"""ClutterDigits: handwritten digits pasted on photographs, made from images that scikit-learn carries. No download."""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augment
from .base import ImageData, TensorImages, require_at_least, with_draw
from .digits import load_scans, split_scans
from .keyed_random import normal, uniform
from .loading import Draw

_SIDE = 32
_BYTES = _SIDE * _SIDE * 4  # of an image and its mask
_WHICH, _ANGLE, _ZOOM, _SHIFT, _PHOTOGRAPH, _CORNER, _INK, _HUE, _NOISE = range(9)  # what a random number is for


class ClutterDigits(ImageData):
    """Digits (8x8 scans of scikit-learn) enlarged, rotated, shifted, coloured and pasted on crops of its two photographs.

    Batches hold, besides what :class:`ImageData` says, ``mask`` [B, 32, 32] bool, the pixels of the digit. Images are [3, 32, 32].
    An image is a function of the seed, the split and its place in the split, so sizes can be any: what does not fit into ``max_memory`` is
    made as it is asked for. The splits share no digit.

    Args:
        train_size, val_size, test_size: images per split.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
        seed: of the images.
        max_rotation: degrees.
        max_shift: in pixels.
        contrast: least distance between the grey of the ink and the grey of the crop behind it, in [0, 0.5].
        noise: standard deviation of the pixel noise, on a scale where white is 1.
        max_memory: in GiB, for the images of a split; a split that needs more is not kept but made batch by batch, each epoch.
    """

    num_classes = 10
    classes = tuple("0123456789")
    image_shape = (3, _SIDE, _SIDE)
    mean, std = (0.45, 0.45, 0.42), (0.27, 0.27, 0.29)

    def __init__(
        self,
        train_size: int = 8000,
        val_size: int = 1000,
        test_size: int = 4000,
        batch_size: int = 128,
        augment: Augment | None = None,
        order_seed: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        max_rotation: float = 12.0,
        max_shift: float = 1.5,
        contrast: float = 0.3,
        noise: float = 0.03,
        max_memory: float = 1.0,
    ):
        super().__init__(batch_size, augment, order_seed, num_workers)
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            require_at_least(f"{split}_size", size, 1)
        if not 0 <= contrast <= 0.5:
            raise ValueError(f"contrast must lie in [0, 0.5], got {contrast}")
        self.seed, self.max_memory = seed, max_memory
        self.look = {"max_rotation": max_rotation, "max_shift": max_shift, "contrast": contrast, "noise": noise}

    def make_splits(self) -> dict[str, Dataset]:
        splits: dict[str, Dataset] = {}
        for number, (split, size) in enumerate(self.sizes.items()):
            images = ClutterImages(split, size, 3 * self.seed + number, **self.look, label_maps=self.label_maps)
            splits[split] = images.in_memory() if size * _BYTES <= self.max_memory * 2**30 else images
        return splits


class SegmentedClutterDigits(ClutterDigits):
    """The images of :class:`ClutterDigits` with a class for each pixel.

    ``label`` [B, 32, 32] is 0 on the background and d + 1 on the pixels of the digit d, 11 classes. With the task
    :class:`kdkernels.tasks.Segmentation`.
    """

    num_classes = 11
    classes = ("background", *"0123456789")
    label_maps = True


class ClutterImages(Dataset):
    """The images of a split, made when asked for."""

    def __init__(
        self, split: str, size: int, seed: int, max_rotation: float, max_shift: float, contrast: float, noise: float, label_maps: bool = False
    ):
        self.label_maps = label_maps
        self.split, self.size, self.seed = split, size, seed
        self.max_rotation, self.max_shift, self.contrast, self.noise = max_rotation, max_shift, contrast, noise

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, draw: Draw | int | list[int]) -> dict:
        if isinstance(draw, int):
            return {name: field[0] for name, field in self[[draw]].items()}
        return with_draw(self.make(torch.tensor(draw.index if isinstance(draw, Draw) else draw)), draw)

    def in_memory(self) -> TensorImages:
        parts = [self.make(index) for index in torch.arange(self.size).split(500)]
        return TensorImages(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def fingerprint(self) -> str:
        recipe = (self.split, self.size, self.seed, self.max_rotation, self.max_shift, self.contrast, self.noise, self.label_maps)
        return hashlib.sha256(repr(recipe).encode()).hexdigest()

    @cached_property
    def _sources(self) -> tuple[Tensor, Tensor, Tensor]:
        """The split's scans [D, 8, 8] in [0, 1], their labels [D], and photographs [2, 3, 427, 640] uint8."""
        from sklearn.datasets import load_sample_images

        scans, labels = load_scans()
        part = split_scans(len(scans))[self.split]
        photographs = [torch.tensor(photograph.copy()).permute(2, 0, 1) for photograph in load_sample_images().images]
        return scans[part], labels[part], torch.stack(photographs)

    def make(self, index: Tensor) -> dict[str, Tensor]:
        """Images ``index`` [B]: image [B, 3, 32, 32] uint8, label [B] or, as maps, [B, 32, 32] uint8, mask [B, 32, 32] bool."""
        scans, labels, photographs = self._sources

        def random(purpose: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:  # [B, *shape]
            places = [torch.arange(n).view(-1, *[1] * (len(shape) - 1 - i)) for i, n in enumerate(shape)]
            return low + (high - low) * uniform(self.seed, purpose, index.view(-1, *[1] * len(shape)), *places)

        which = (random(_WHICH) * len(scans)).long()
        angle = random(_ANGLE, low=-self.max_rotation, high=self.max_rotation).deg2rad()
        zoom = random(_ZOOM, low=0.95, high=1.2)
        shift = random(_SHIFT, 2, low=-self.max_shift, high=self.max_shift) / (_SIDE / 2)
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
        grid = F.affine_grid(theta, [len(index), 1, _SIDE, _SIDE], align_corners=False)
        ink = F.grid_sample(scans[which].unsqueeze(1), grid, mode="bicubic", align_corners=False).clamp(0, 1)  # [B, 1, 32, 32]

        photograph = (random(_PHOTOGRAPH) * len(photographs)).long()
        corner = (random(_CORNER, 2) * (torch.tensor(photographs.shape[2:]) - _SIDE)).long()
        rows, columns = (corner[:, i, None] + torch.arange(_SIDE) for i in (0, 1))
        channels = torch.arange(3)[:, None, None]
        background = photographs[photograph[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]] / 255

        # Ink of a random hue, on the far side of the crop's grey by at least `contrast`.
        grey = background.mean((1, 2, 3))
        room = torch.where(grey < 0.5, 1 - self.contrast - grey, grey - self.contrast)
        offset = self.contrast + random(_INK) * room.clamp(min=0)
        target = grey + torch.where(grey < 0.5, offset, -offset)
        hue = random(_HUE, 3, low=-0.25, high=0.25)
        colour = (target[:, None] + hue - hue.mean(1, keepdim=True)).clamp(0, 1)
        image = ink * colour[:, :, None, None] + (1 - ink) * background
        if self.noise:
            pixels = torch.arange(image[0].numel()).view(image[0].shape)
            image = image + self.noise * normal(self.seed, _NOISE, index[:, None, None, None], pixels)
        mask, label = ink[:, 0] > 0.5, labels[which]
        if self.label_maps:
            label = torch.where(mask, label[:, None, None] + 1, 0).to(torch.uint8)
        return {"image": (image.clamp(0, 1) * 255).round().to(torch.uint8), "label": label, "mask": mask}
