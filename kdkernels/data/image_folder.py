"""Images in a folder per class."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augment
from .base import ImageData, ItemImages, TensorImages, require_at_least

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageFolder(ImageData):
    """Images under ``root``, a folder per class: ``root/train/cat/1.png`` with ``root/val/cat/2.png`` and perhaps ``root/test``, or
    ``root/cat/1.png``, of which a part is held out. Classes are numbered by their names in order.

    Each image is resized to ``size`` pixels on its shorter side and cut to the square in its middle, as RGB.

    Args:
        root: the folder.
        size: side of the images in pixels.
        val_fraction: part of each class held out for validation where there is no folder ``val``.
        on_error: what to do about a file that is not a readable image: "fail" stops and names it; "skip" names it in a warning and goes on
            without it.
        mean, std: per channel, on a scale where white is 1; the default is ImageNet's.
        max_memory: in GiB; where the images of a split need no more, they are read once and kept.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
        seed: of what is held out.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        size: int = 32,
        val_fraction: float = 0.2,
        on_error: Literal["fail", "skip"] = "fail",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        max_memory: float = 2.0,
        batch_size: int = 64,
        augment: Augment | None = None,
        order_seed: int = 0,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, augment, order_seed, num_workers)
        require_at_least("size", size, 1)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie in (0, 1), got {val_fraction}")
        if on_error not in ("fail", "skip"):
            raise ValueError(f'on_error must be "fail" or "skip", got {on_error!r}')
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std must hold 3 numbers each, got {mean} and {std}")
        self.root, self.size, self.val_fraction, self.on_error, self.seed = Path(root), size, val_fraction, on_error, seed
        self.mean, self.std, self.max_memory = mean, std, max_memory
        self.image_shape = (3, size, size)
        self.classes = _folders(self.root / "train" if (self.root / "train").is_dir() else self.root)
        self.num_classes = len(self.classes)

    def make_splits(self) -> dict[str, Dataset]:
        if (self.root / "train").is_dir():
            files = {s: _labelled_files(self.root / s, self.classes) for s in ("train", "val", "test") if (self.root / s).is_dir()}
        else:
            files = {"train": _labelled_files(self.root, self.classes)}
        if "val" not in files:
            files["train"], files["val"] = self._hold_out(files["train"])
        return {split: self._dataset(listed) for split, listed in files.items()}

    def _hold_out(self, files: list[tuple[Path, int]]) -> tuple[list, list]:
        """The same part of each class, at least one image and not all."""
        kept, held = [], []
        for label, name in enumerate(self.classes):
            own = [file for file in files if file[1] == label]
            if len(own) < 2:
                raise ValueError(f"class {name!r} has {len(own)} image; at least 2 are needed to hold one out for validation")
            count = min(len(own) - 1, max(1, round(self.val_fraction * len(own))))
            order = torch.randperm(len(own), generator=torch.Generator().manual_seed(self.seed)).tolist()
            held += [own[i] for i in sorted(order[:count])]
            kept += [own[i] for i in sorted(order[count:])]
        return kept, held

    def _dataset(self, files: list[tuple[Path, int]]) -> Dataset:
        fits = len(files) * 3 * self.size**2 <= self.max_memory * 2**30
        if not fits and self.on_error == "fail":
            return ItemImages(Files(files, self.size), fingerprint=_listing(files, self.size))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the decoders let other threads run
            read = list(pool.map(lambda file: _attempt(file[0], self.size, keep=fits), files))
        broken = [f"{path}: {error}" for (path, _), (_, error) in zip(files, read, strict=True) if error]
        if broken and self.on_error == "fail":
            raise ValueError(f"cannot read the image {broken[0]}" + (f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""))
        if broken:
            shown = "\n  ".join(broken[:20] + [f"... and {len(broken) - 20} more"] * (len(broken) > 20))
            warnings.warn(f"{len(broken)} files that cannot be read as images are left out:\n  {shown}", stacklevel=2)
        good = [(file, image) for file, (image, error) in zip(files, read, strict=True) if not error]
        if not good:
            raise ValueError(f"not one of the {len(files)} files under {self.root} can be read as an image")
        if not fits:
            files = [file for file, _ in good]
            return ItemImages(Files(files, self.size), fingerprint=_listing(files, self.size))
        return TensorImages(image=torch.stack([image for _, image in good]), label=torch.tensor([label for (_, label), _ in good]))


class Files(Dataset):
    """Images read when asked for: (image [3, size, size] uint8, label)."""

    def __init__(self, files: list[tuple[Path, int]], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return read_image(path, self.size), label


def read_image(path: Path, size: int) -> Tensor:
    """[3, size, size] uint8: resized on the shorter side, the square in the middle.

    Raises:
        ValueError: the file cannot be read as an image; names it.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except Exception as error:  # a decoder of a damaged file raises what it likes
        raise ValueError(f"cannot read the image {path}: {error}") from error
    scale = size / min(image.size)
    width, height = (max(size, round(extent * scale)) for extent in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1).contiguous()


def _attempt(path: Path, size: int, keep: bool) -> tuple[Tensor | None, str | None]:
    try:
        image = read_image(path, size)
        return (image if keep else None), None
    except ValueError as error:
        return None, str(error.__cause__)


def _folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise FileNotFoundError(f"root: there is no folder {str(root)!r}")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"root: {str(root)!r} must hold a folder for each of at least 2 classes, found {names}")
    return names


def _labelled_files(root: Path, classes: list[str]) -> list[tuple[Path, int]]:
    unknown = [name for name in _folders(root) if name not in classes]
    if unknown:
        raise ValueError(f"{root} has classes that the training images do not have: {unknown}; those are {classes}")
    files = []
    for label, name in enumerate(classes):
        own = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in _SUFFIXES and path.is_file())
        if not own and root.name not in ("val", "test"):
            raise ValueError(f"{root / name} holds no image (files that end in {', '.join(sorted(_SUFFIXES))})")
        files += [(path, label) for path in own]
    return files


def _listing(files: list[tuple[Path, int]], size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    for path, label in files:
        stat = path.stat()
        digest.update(f"{path} {label} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()
