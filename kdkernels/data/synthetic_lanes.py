"""SyntheticLanes: road scenes with lanes, made from images in scikit-learn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augment
from .base import ImageData, add_request_fields, check_image_size, require_at_least
from .lane_scenes import LANES, LaneScenes
from .loading import BatchRequest


class SyntheticLanes(ImageData):
    """Road scenes with up to four lanes, for the task :class:`kdkernels.tasks.Lanes`.

    A scene is a road in perspective with a common vanishing point and curvature of all its lanes.
    The lines are solid or dashed, white or yellow, and worn; some are not painted. The scene also
    has shadows, vehicles that hide lines, surroundings with the texture of scikit-learn's two
    photographs, and a fraction of the scenes is dark and noisy, at night.

    ``label`` [B, H, W] has 5 classes: 0 for the background, and 1 to 4 for the lines from left to
    right. Lines 2 and 3 are those beside the own vehicle, and each line may be absent. As in
    CULane, a line is labelled through gaps between dashes and through vehicles. Its width in the
    label map is that of CULane's label maps, 16 pixels in images of width 1640, but at least 3
    pixels. There is no field ``existence``: the task derives it from the label map.

    An image depends only on the seed, the split and its position in the split. It is generated when
    it is first needed, and kept in memory if its split fits into ``max_memory``. A split can have
    any size: the images of larger splits are generated again in each epoch.

    Args:
        train_size, val_size, test_size: number of images of the split.
        size: height and width of the images, multiples of 8.
        night: fraction of the scenes at night, in [0, 1].
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
        seed: seed of the images.
        max_memory: memory in GiB for the images of a split; the images of a split that needs more
            are not kept in memory.

    Raises:
        ValueError: ``size`` is not two multiples of 8, ``night`` is not in [0, 1], or a number of
            images is less than 1.
    """

    num_classes = LANES + 1
    classes = ("background", *(f"lane {i}" for i in range(1, LANES + 1)))
    label_maps = True
    mean, std = (0.34, 0.35, 0.34), (0.18, 0.19, 0.22)

    def __init__(
        self,
        train_size: int = 2000,
        val_size: int = 500,
        test_size: int = 500,
        size: Sequence[int] = (64, 160),
        night: float = 0.2,
        batch_size: int = 32,
        augment: Augment | None = None,
        order_seed: int = 0,
        num_workers: int = 0,
        seed: int = 0,
        max_memory: float = 1.0,
    ):
        super().__init__(batch_size, augment, order_seed, num_workers)
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for split, count in self.sizes.items():
            require_at_least(f"{split}_size", count, 1)
        check_image_size("size", size, 8)
        if not 0 <= night <= 1:
            raise ValueError(f"night must lie in [0, 1], got {night}")
        self.size, self.night, self.seed, self.max_memory = (size[0], size[1]), night, seed, max_memory
        self.image_shape = (3, *self.size)

    def make_splits(self) -> dict[str, Dataset]:
        splits: dict[str, Dataset] = {}
        for number, (split, count) in enumerate(self.sizes.items()):
            scenes = LaneScenes(3 * self.seed + number, self.size, self.night)
            splits[split] = LaneImages(count, scenes, keep=count * 4 * self.size[0] * self.size[1] <= self.max_memory * 2**30)
        return splits


class LaneImages(Dataset):
    """The images of a split, generated on request, and then kept in memory if ``keep`` is true."""

    def __init__(self, count: int, scenes: LaneScenes, keep: bool):
        self.count, self.scenes, self.keep = count, scenes, keep

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, request: BatchRequest | int | list[int]) -> dict:
        if isinstance(request, int):
            return {name: field[0] for name, field in self[[request]].items()}
        index = torch.tensor(request.index if isinstance(request, BatchRequest) else request)
        image, label = self._kept(index) if self.keep else self._make(index)
        return add_request_fields({"image": image, "label": label}, request)

    def _make(self, index: Tensor) -> tuple[Tensor, Tensor]:
        # A few images at a time, whose temporary tensors stay in the processor's caches.
        images, labels = zip(*(self.scenes.make(part) for part in index.split(8)), strict=True)
        return torch.cat(images), torch.cat(labels)

    @cached_property
    def _store(self) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for all images and label maps, and which of them have been generated."""
        image = torch.zeros(self.count, 3, *self.scenes.size, dtype=torch.uint8)
        return image, torch.zeros(self.count, *self.scenes.size, dtype=torch.uint8), torch.zeros(self.count, dtype=torch.bool)

    def _kept(self, index: Tensor) -> tuple[Tensor, Tensor]:
        image, label, is_made = self._store
        missing = index[~is_made[index]]
        if len(missing):
            image[missing], label[missing] = self._make(missing)
            is_made[missing] = True
        return image[index], label[index]

    def fingerprint(self) -> str:
        recipe = (self.count, self.scenes.seed, self.scenes.size, self.scenes.night)
        return hashlib.sha256(repr(recipe).encode()).hexdigest()
