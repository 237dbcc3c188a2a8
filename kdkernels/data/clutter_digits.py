"""ClutterDigits: handwritten digits on photographs, made from images in scikit-learn."""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augment
from .base import ImageData, TensorImages, add_request_fields, require_at_least
from .digits import load_scans, split_scans
from .keyed_random import normal, uniform
from .loading import BatchRequest

_SIDE = 32
_BYTES = _SIDE * _SIDE * 4  # size of an image and its mask in bytes
# The purpose of a random number, a part of the key from which it is computed.
_SCAN, _ANGLE, _ZOOM, _SHIFT, _PHOTOGRAPH, _CORNER, _INK, _HUE, _NOISE = range(9)


class ClutterDigits(ImageData):
    """Digits (the 8x8 scans of scikit-learn), enlarged, rotated, shifted, coloured and pasted on
    crops of scikit-learn's two photographs.

    Images are [3, 32, 32]. Batches have the fields of :class:`ImageData` and ``mask`` [B, 32, 32]
    bool, the pixels of the digit. An image depends only on the seed, the split and its position in
    the split, so a split can have any size: a split that does not fit into ``max_memory`` is
    generated batch by batch. No two splits contain the same scan.

    Args:
        train_size, val_size, test_size: number of images of the split.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
        seed: seed of the images.
        max_rotation: largest rotation in degrees, in either direction.
        max_shift: largest shift in pixels, along each axis.
        contrast: smallest difference between the grey values of the ink and of the crop behind it,
            in [0, 0.5].
        noise: standard deviation of the pixel noise, on a scale on which white is 1.
        max_memory: memory in GiB for the images of a split; a split that needs more is not kept in
            memory but generated batch by batch in each epoch.
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
        self.appearance = {"max_rotation": max_rotation, "max_shift": max_shift, "contrast": contrast, "noise": noise}

    def make_splits(self) -> dict[str, Dataset]:
        splits: dict[str, Dataset] = {}
        for number, (split, size) in enumerate(self.sizes.items()):
            images = ClutterImages(split, size, 3 * self.seed + number, **self.appearance, label_maps=self.label_maps)
            splits[split] = images.in_memory() if size * _BYTES <= self.max_memory * 2**30 else images
        return splits


class SegmentedClutterDigits(ClutterDigits):
    """The images of :class:`ClutterDigits` with a class for each pixel.

    Use it with the task :class:`kdkernels.tasks.Segmentation`. ``label`` [B, 32, 32] has 11
    classes: 0 for the background, and d + 1 for the pixels of the digit d.
    """

    num_classes = 11
    classes = ("background", *"0123456789")
    label_maps = True


class ClutterImages(Dataset):
    """The images of a split, generated on request."""

    def __init__(
        self, split: str, size: int, seed: int, max_rotation: float, max_shift: float, contrast: float, noise: float, label_maps: bool = False
    ):
        self.label_maps = label_maps
        self.split, self.size, self.seed = split, size, seed
        self.max_rotation, self.max_shift, self.contrast, self.noise = max_rotation, max_shift, contrast, noise

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, request: BatchRequest | int | list[int]) -> dict:
        if isinstance(request, int):
            return {name: field[0] for name, field in self[[request]].items()}
        return add_request_fields(self.make(torch.tensor(request.index if isinstance(request, BatchRequest) else request)), request)

    def in_memory(self) -> TensorImages:
        parts = [self.make(index) for index in torch.arange(self.size).split(500)]
        return TensorImages(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def fingerprint(self) -> str:
        recipe = (self.split, self.size, self.seed, self.max_rotation, self.max_shift, self.contrast, self.noise, self.label_maps)
        return hashlib.sha256(repr(recipe).encode()).hexdigest()

    @cached_property
    def _sources(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scans of the split [D, 8, 8] in [0, 1], their labels [D], photographs [2, 3, 427, 640]
        uint8.
        """
        from sklearn.datasets import load_sample_images

        scans, labels = load_scans()
        part = split_scans(len(scans))[self.split]
        photographs = [torch.tensor(photograph.copy()).permute(2, 0, 1) for photograph in load_sample_images().images]
        return scans[part], labels[part], torch.stack(photographs)

    def make(self, index: Tensor) -> dict[str, Tensor]:
        """Generate the images at the positions ``index`` [B].

        Returns image [B, 3, 32, 32] uint8, label [B] (label maps: [B, 32, 32] uint8) and mask [B,
        32, 32] bool.
        """
        ink, label = self.make_ink(index)
        image = self.paste(ink, index)
        mask = ink[:, 0] > 0.5
        if self.label_maps:
            label = torch.where(mask, label[:, None, None] + 1, 0).to(torch.uint8)
        return {"image": image, "label": label, "mask": mask}

    def random(self, index: Tensor, purpose: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return uniform random numbers [B, *shape] for the images at the positions ``index``."""
        positions = [torch.arange(n).view(-1, *[1] * (len(shape) - 1 - i)) for i, n in enumerate(shape)]
        return low + (high - low) * uniform(self.seed, purpose, index.view(-1, *[1] * len(shape)), *positions)

    def make_ink(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coverage of the pixels with ink [B, 1, 32, 32] in [0, 1], and the labels."""
        scans, labels, _ = self._sources
        scan = (self.random(index, _SCAN) * len(scans)).long()
        angle = self.random(index, _ANGLE, low=-self.max_rotation, high=self.max_rotation).deg2rad()
        zoom = self.random(index, _ZOOM, low=0.95, high=1.2)
        shift = self.random(index, _SHIFT, 2, low=-self.max_shift, high=self.max_shift) / (_SIDE / 2)
        return draw_scans(scans[scan], angle, zoom, shift), labels[scan]

    def paste(self, ink: Tensor, index: Tensor) -> Tensor:
        """Paste ink in a random colour on random crops; return images [B, 3, 32, 32] uint8."""
        photographs = self._sources[2]
        photograph = (self.random(index, _PHOTOGRAPH) * len(photographs)).long()
        corner = (self.random(index, _CORNER, 2) * (torch.tensor(photographs.shape[2:]) - _SIDE)).long()
        rows, columns = (corner[:, i, None] + torch.arange(_SIDE) for i in (0, 1))
        channels = torch.arange(3)[:, None, None]
        background = photographs[photograph[:, None, None, None], channels, rows[:, None, :, None], columns[:, None, None, :]] / 255

        # The ink has a random hue. Its grey value differs by at least `contrast` from that of the
        # crop: it is lighter on a dark crop and darker on a light one.
        grey = background.mean((1, 2, 3))
        headroom = torch.where(grey < 0.5, 1 - self.contrast - grey, grey - self.contrast)
        offset = self.contrast + self.random(index, _INK) * headroom.clamp(min=0)
        target = grey + torch.where(grey < 0.5, offset, -offset)
        hue = self.random(index, _HUE, 3, low=-0.25, high=0.25)
        colour = (target[:, None] + hue - hue.mean(1, keepdim=True)).clamp(0, 1)
        image = ink * colour[:, :, None, None] + (1 - ink) * background
        if self.noise:
            pixels = torch.arange(image[0].numel()).view(image[0].shape)
            image = image + self.noise * normal(self.seed, _NOISE, index[:, None, None, None], pixels)
        return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def draw_scans(scans: Tensor, angle: Tensor, zoom: Tensor, shift: Tensor) -> Tensor:
    """Enlarge scans [B, 8, 8] to [B, 1, 32, 32], rotated, zoomed and shifted.

    Args:
        scans: values in [0, 1].
        angle: [B], in radians.
        zoom: [B]; the size of the image in units of the size of the scan.
        shift: [B, 2], x and y, in units of half an image.
    """
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, [len(scans), 1, _SIDE, _SIDE], align_corners=False)
    return F.grid_sample(scans.unsqueeze(1), grid, mode="bicubic", align_corners=False).clamp(0, 1)
