"""The lane markings of BDD100K (Yu et al., CVPR 2020), read from a folder on disk."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import numpy as np

from .augment import Augment
from .lane_files import IMAGENET_MEAN, IMAGENET_STD, LaneData, LaneSample
from .listing import LeftOut

# The lowest three bits of a mask are the category, and bit 3 is set for the background.
CATEGORIES = ("crosswalk", "double other", "double white", "double yellow", "road curb", "single other", "single white", "single yellow")
_BACKGROUND = 8
_LANE_CATEGORIES = ("double other", "double white", "double yellow", "single other", "single white", "single yellow")


class BDD100KLanes(LaneData):
    """Lane markings of BDD100K, as one class, with the folders of the published archives::

        root/images/100k/train/0000f77c-6257be58.jpg
        root/labels/lane/masks/train/0000f77c-6257be58.png
        root/images/100k/val/..., root/labels/lane/masks/val/...

    A mask is an image with one channel of 8 bits. Bits 0 to 2 are the category of the marking, and
    bit 3 is set for the background; the other bits, style and direction, are not used. Class 1 of
    the label map stands for the pixels of the chosen categories. The data set does not say which
    lane a marking belongs to, so use the task ``Lanes(lanes=1)``.

    The data have to be downloaded from <https://doc.bdd100k.com>. The test images have no masks.

    Args:
        root: the folder ``bdd100k`` of the archives.
        size: height and width to which images and masks are resized.
        categories: names of the categories that count as lanes; by default all but crosswalks and
            road curbs.
        mean, std: mean and standard deviation per channel, on a scale on which white is 1; by
            default those of ImageNet.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.

    Raises:
        FileNotFoundError: there is no such folder, or an image has no mask.
        ValueError: a category is unknown, or none is given.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        size: Sequence[int] = (360, 640),
        categories: Sequence[str] = _LANE_CATEGORIES,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        batch_size: int = 12,
        augment: Augment | None = None,
        order_seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__(root, 1, size, mean, std, batch_size, augment, order_seed, num_workers)
        unknown = [name for name in categories if name not in CATEGORIES]
        if unknown or not categories:
            raise ValueError(f"categories must be some of {', '.join(CATEGORIES)}; got {list(categories)}")
        self.categories = list(categories)
        self.classes = ["background", "lane"]

    def decode_label(self, values: np.ndarray) -> np.ndarray:
        table = np.zeros(256, dtype=np.uint8)
        for value in range(256):
            table[value] = not value & _BACKGROUND and CATEGORIES[value & 7] in self.categories
        return table[values]

    def samples(self) -> dict[str, list[LaneSample]]:
        found, left_out = {}, LeftOut(self.root)
        for split in self.splits_required:
            images, masks = self.root / "images" / "100k" / split, self.root / "labels" / "lane" / "masks" / split
            for folder in (images, masks):
                if not folder.is_dir():
                    raise FileNotFoundError(f"root: there is no folder {str(folder)!r}")
            names = {path.stem for path in masks.glob("*.png") if not path.name.startswith(".")}
            files = sorted(path for path in images.iterdir() if path.is_file() and not path.name.startswith("."))
            paths = [path for path in files if path.suffix.lower() in (".jpg", ".jpeg")]
            for path in files:
                if path not in paths:
                    left_out.add("do not have the suffix .jpg", path)
            for name in sorted(names - {path.stem for path in paths}):
                left_out.add("are masks without an image", masks / f"{name}.png")
            missing = [path.name for path in paths if path.stem not in names]
            if missing:
                raise FileNotFoundError(f"{masks} has no mask (.png) for {len(missing)} of the {len(paths)} images in {images}, such as {missing[0]}")
            found[split] = [LaneSample(path, masks / f"{path.stem}.png") for path in paths]
        if left_out:
            warnings.warn(str(left_out), stacklevel=2)
        return found
