"""What the readers of lane data sets share: curves to label maps, and samples that are read from
files on request.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augment
from .base import ImageData, ItemImages, check_image_size, require_positive
from .decode import to_8_bits

if TYPE_CHECKING:
    from PIL import Image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Curve = np.ndarray  # [n, 2] float64: x and y of n points, in pixels of the image file


@dataclass(frozen=True)
class LaneSample:
    """An image file with its lanes, as a file with a label map or as curves."""

    image: Path
    label: Path | None = None
    curves: tuple[Curve, ...] = ()
    existence: tuple[bool, ...] | None = None  # None: derived from the label map


class LaneData(ImageData):
    """Base class of the readers of lane data sets, for the task :class:`kdkernels.tasks.Lanes`.

    Images are resized to ``size`` without keeping their aspect ratio, label maps by nearest
    neighbour. Batches have the field ``existence`` [B, lanes] bool.
    """

    label_maps = True
    resize = "stretch_bilinear"
    splits_required = ("train", "val")

    def __init__(
        self,
        root: str | os.PathLike,
        lanes: int,
        size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        augment: Augment | None,
        order_seed: int,
        num_workers: int,
    ):
        super().__init__(batch_size, augment, order_seed, num_workers)
        check_image_size("size", size)
        if isinstance(lanes, bool) or not isinstance(lanes, int) or not 1 <= lanes <= 254:
            raise ValueError(f"lanes must be an integer in [1, 254], got {lanes!r}")
        if not isinstance(root, (str, os.PathLike)):
            raise TypeError(f"root must be the path of a folder, got {root!r}")
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std must hold 3 numbers each, got {mean} and {std}")
        require_positive("std", std)
        self.root, self.lanes, self.size, self.mean, self.std = Path(root), lanes, (size[0], size[1]), mean, std
        if not self.root.is_dir():
            raise FileNotFoundError(f"root: there is no folder {str(root)!r}")
        self.num_classes, self.image_shape = lanes + 1, (3, *self.size)
        self.classes = ["background", *(f"lane {i}" for i in range(1, lanes + 1))]

    def samples(self) -> Mapping[str, list[LaneSample]]:
        """Return the samples of each split; raise ValueError for a file in another format."""
        raise NotImplementedError

    def decode_label(self, values: np.ndarray) -> np.ndarray:
        """Convert the values [H, W] of a file with a label map to classes; 255 is ignored."""
        return values

    def make_splits(self) -> dict[str, Dataset]:
        splits: dict[str, Dataset] = {}
        for split, samples in self.samples().items():
            if not samples:
                raise ValueError(f"root: {str(self.root)!r} has no images for {split}")
            images = LaneFiles(samples, self.size, self.lanes, self.decode_label)
            splits[split] = ItemImages(images, fingerprint=images.fingerprint())
        return splits


class LaneFiles(Dataset):
    """Samples that are read on request: dicts with ``image``, ``label`` and ``existence``."""

    def __init__(self, samples: list[LaneSample], size: tuple[int, int], lanes: int, decode_label: Callable[[np.ndarray], np.ndarray]):
        self.samples, self.size, self.lanes, self.decode_label = samples, size, lanes, decode_label

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        image, size = read_resized(sample.image, self.size)
        if sample.label is None:
            label = draw_label_map(sample.curves, size, self.size, self.lanes)
        else:
            label = read_label_map(sample.label, size, self.size, self.lanes, self.decode_label)
        existence = sample.existence or [bool((label == lane).any()) for lane in range(1, self.lanes + 1)]
        return {"image": image, "label": torch.from_numpy(label), "existence": torch.tensor(existence)}

    def fingerprint(self) -> str:
        """Hash the samples, not the contents of their images."""
        digest = hashlib.sha256(f"{self.size} {self.lanes}".encode())
        for sample in self.samples:
            digest.update(f"{sample.image} {sample.label} {sample.existence} {[curve.tolist() for curve in sample.curves]}".encode())
        return digest.hexdigest()


def read_resized(path: Path, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Read an image file as RGB and resize it to [3, *size] uint8.

    Returns:
        The image, and height and width of the file's image.

    Raises:
        ValueError: the file cannot be read as an image; names the file.
    """
    from PIL import Image

    image = _opened(path)
    original = (image.height, image.width)
    try:
        resized = to_8_bits(image, "RGB").resize((size[1], size[0]), Image.Resampling.BILINEAR)
    except ValueError as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous(), original


def read_label_map(
    path: Path, original: tuple[int, int], size: tuple[int, int], lanes: int, decode: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Read a file with a label map, decode it, and resize it by nearest neighbour to uint8 [*size].

    Raises:
        ValueError: the file cannot be read, has several channels, does not have the height and
            width ``original`` of the image, or has values that are neither a lane nor 255; names
            the file.
    """
    from PIL import Image

    image = _opened(path)
    if (image.height, image.width) != original:
        raise ValueError(f"the label map {path} must have the height and width of its image {list(original)}, got {[image.height, image.width]}")
    if image.mode not in ("1", "L", "P"):
        raise ValueError(f"the label map {path} must be an image with one channel of 8 bits, whose values are classes; it has the mode {image.mode}")
    label = decode(np.array(image, dtype=np.uint8))
    wrong = label[(label > lanes) & (label != 255)]
    if wrong.size:
        raise ValueError(f"the label map {path} must have the values 0 (background), 1 to {lanes} (lanes) or 255 (ignored), but it has {wrong.max()}")
    return np.array(Image.fromarray(label).resize((size[1], size[0]), Image.Resampling.NEAREST))


def _opened(path: Path) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(path) as file:
            file.load()
            return file.copy()
    except Exception as error:  # for damaged files, decoders raise many kinds of exceptions
        raise ValueError(f"cannot read the image {path}: {error}") from error


def numbered_from_left(curves: Sequence[Curve], height: int, width: int, lanes: int) -> dict[int, Curve]:
    """Give each curve the number of a lane, from 1 on the left to ``lanes`` on the right.

    The curves are sorted by the column at which they reach the bottom of the image; the segment of
    their two lowest points is extended to it. As in CULane, the numbers count from the own vehicle:
    the curves that end left of the middle get the numbers ``lanes // 2``, ``lanes // 2 - 1``, ...
    from right to left, and the others the following numbers. If one side has more curves than
    numbers, all numbers are shifted; if there are more than ``lanes`` curves, the curves that are
    farthest from the middle are left out.
    """

    def column_at_bottom(curve: Curve) -> float:
        (x0, y0), (x1, y1) = curve[np.argsort(curve[:, 1], kind="stable")[-2:]]
        return float(x1 if y1 == y0 else x1 + (height - 1 - y1) * (x1 - x0) / (y1 - y0))

    columns = [column_at_bottom(curve) for curve in curves]
    nearest = sorted(range(len(curves)), key=lambda i: abs(columns[i] - (width - 1) / 2))[:lanes]
    order = sorted(nearest, key=lambda i: columns[i])
    left = sum(columns[i] < (width - 1) / 2 for i in order)
    first = min(max(lanes // 2 - left, 0), lanes - len(order)) + 1
    return {first + position: curves[i] for position, i in enumerate(order)}


def label_width(width: int) -> float:
    """Return the width of the lanes in label maps of the given width, in pixels.

    It is that of CULane's label maps, 16 pixels in images of width 1640, but at least 3 pixels,
    because a network can hardly learn thinner lines in small images.
    """
    return max(3.0, 16 * width / 1640)


def draw_label_map(curves: Sequence[Curve], original: tuple[int, int], size: tuple[int, int], lanes: int) -> np.ndarray:
    """Draw the label map of an image, uint8 [*size].

    The lines have the :func:`label_width` of the size.

    Args:
        curves: curves in pixels of the image file.
        original: height and width of the image file.
        size: height and width of the label map.
        lanes: number of lanes; 1 draws all curves as class 1.
    """
    label = np.zeros(size, dtype=np.uint8)
    scale = np.array([size[1] / original[1], size[0] / original[0]])
    half = label_width(size[1]) / 2
    rows, columns = np.mgrid[: size[0], : size[1]]
    # A single lane stands for all lanes of an image.
    numbered = [(1, curve) for curve in curves] if lanes == 1 else list(numbered_from_left(curves, *original, lanes).items())
    for lane, curve in numbered:
        points = (curve + 0.5) * scale - 0.5  # the centre of a pixel has integer coordinates
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            box = tuple(slice(max(0, int(np.floor(min(a, b) - half))), max(0, int(np.ceil(max(a, b) + half)) + 1)) for a, b in ((y0, y1), (x0, x1)))
            y, x, dy, dx = rows[box] - y0, columns[box] - x0, y1 - y0, x1 - x0
            along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
            label[box][(x - along * dx) ** 2 + (y - along * dy) ** 2 <= half * half] = lane
    return label


def text_lines(path: Path) -> list[str]:
    """Return the lines of a text file in UTF-8, with or without byte order mark.

    Raises:
        ValueError: the file is not UTF-8; names file and line.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: expected text in UTF-8, got the byte 0x{content[error.start]:02x}: {error.reason}") from error


def require_file(path: Path, where: str, what: str) -> Path:
    """Return the path of a file that a line of a list names.

    Raises:
        FileNotFoundError: there is no such file; names the line ``where``.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no {what} {str(path)!r}")
    return path
