"""Images in a folder per class."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augment
from .base import ImageData, ItemImages, TensorImages, require_at_least, require_positive
from .decode import CENTER_SQUARE, read_image
from .listing import LeftOut, Listing, split_folders


class ImageFolder(ImageData):
    """Images under ``root``, a folder per class: ``root/train/cat/1.png`` with ``root/val/cat/2.png`` and perhaps ``root/test``, or
    ``root/cat/1.png``, of which a part is held out. Classes are numbered by their names in order. ``training``, ``valid``, ``validation`` and
    ``testing`` are other names of the splits, in any case of letters. Folders are searched to any depth, links followed.

    Of each image the square in the middle is taken, and resized to ``size`` pixels, as RGB (:func:`kdkernels.data.decode.read_image`). Hidden
    files, files that are no images, and images outside a class's folder are left out; one warning says how many, and names some.

    Args:
        root: the folder.
        size: side of the images in pixels.
        val_fraction: part of each class held out for validation where there is no folder ``val``; by default 0.2. Must be given where there is
            a folder ``test``: whether that is meant for validation nobody can tell.
        on_error: what to do about a file that is not a readable image: "fail" stops and names it; "skip" names it in a warning and goes on
            without it.
        mean, std: per channel, on a scale where white is 1; the default is ImageNet's.
        max_memory: in GiB; where the images of a split need no more, they are read once and kept.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
        seed: of what is held out.
    """

    resize = CENTER_SQUARE

    def __init__(
        self,
        root: str | os.PathLike,
        size: int = 32,
        val_fraction: float | None = None,
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
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie in (0, 1), got {val_fraction}")
        if on_error not in ("fail", "skip"):
            raise ValueError(f'on_error must be "fail" or "skip", got {on_error!r}')
        if len(mean) != 3 or len(std) != 3:
            raise ValueError(f"mean and std must hold 3 numbers each, got {mean} and {std}")
        require_positive("std", std)
        self.root, self.size, self.val_fraction, self.on_error, self.seed = Path(root), size, val_fraction, on_error, seed
        self.mean, self.std, self.max_memory = mean, std, max_memory
        self.image_shape = (3, size, size)
        self._folders = split_folders(self.root)
        if val_fraction is None and "test" in self._folders and "val" not in self._folders:
            raise ValueError(
                f"root: {str(root)!r} has images to train on and to test with, and none for validation: val_fraction=0.2 takes a part of the "
                f"former; a link 'val' to {self._folders['test'].name!r} validates on the latter"
            )
        self.classes = Listing(self._folders["train"]).classes
        self.num_classes = len(self.classes)

    def make_splits(self) -> dict[str, Dataset]:
        left_out = LeftOut(self.root)
        files = {split: Listing(folder).files(self.classes, left_out, every=split == "train") for split, folder in self._folders.items()}
        if "val" not in files:
            files["train"], files["val"] = self._hold_out(files["train"])
        splits = {split: self._dataset(listed, left_out) for split, listed in files.items()}
        if left_out:
            warnings.warn(str(left_out), stacklevel=2)
        return splits

    def _hold_out(self, files: list[tuple[Path, int]]) -> tuple[list, list]:
        """The same part of each class, at least one image and not all."""
        fraction = 0.2 if self.val_fraction is None else self.val_fraction
        kept, held = [], []
        for label, name in enumerate(self.classes):
            own = [file for file in files if file[1] == label]
            if len(own) < 2:
                raise ValueError(f"class {name!r} has {len(own)} image; at least 2 are needed to hold one out for validation")
            count = min(len(own) - 1, max(1, round(fraction * len(own))))
            order = torch.randperm(len(own), generator=torch.Generator().manual_seed(self.seed)).tolist()
            held += [own[i] for i in sorted(order[:count])]
            kept += [own[i] for i in sorted(order[count:])]
        return kept, held

    def _dataset(self, files: list[tuple[Path, int]], left_out: LeftOut) -> Dataset:
        fits = len(files) * 3 * self.size**2 <= self.max_memory * 2**30
        if not fits and self.on_error == "fail":
            return ItemImages(Files(files, self.size), fingerprint=_listing(files, self.size))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the decoders let other threads run
            read = list(pool.map(lambda file: _attempt(file[0], self.size, keep=fits), files))
        broken = [(path, error) for (path, _), (_, error) in zip(files, read, strict=True) if error]
        if broken and self.on_error == "fail":
            path, error = broken[0]
            more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
            raise ValueError(f"cannot read the image {path}: {error}{more}; on_error='skip' goes on without such files")
        for path, error in broken:
            left_out.add("cannot be read as images", path, error)
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


def _attempt(path: Path, size: int, keep: bool) -> tuple[Tensor | None, str | None]:
    try:
        image = read_image(path, size)
        return (image if keep else None), None
    except ValueError as error:
        return None, str(error.__cause__)


def _listing(files: list[tuple[Path, int]], size: int) -> str:
    digest = hashlib.sha256(str(size).encode())
    for path, label in files:
        stat = path.stat()
        digest.update(f"{path} {label} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()
