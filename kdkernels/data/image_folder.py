"""Data modules from images in a folder per class."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augment
from .base import ImageData, ItemImages, TensorImages, require_at_least, require_positive
from .decode import CENTER_SQUARE, read_image
from .listing import LeftOut, Listing, split_folders


class ImageFolder(ImageData):
    """Images under ``root`` with a folder per class.

    There are two layouts: ``root/train/cat/1.png`` with ``root/val/cat/2.png`` and optionally
    ``root/test``; or ``root/cat/1.png``, of which a part is held out for validation. Classes are
    numbered in the order of their names. The folders of the splits may also be named ``training``,
    ``valid``, ``validation`` and ``testing``, in upper or lower case. Folders are searched to any
    depth, and links are followed.

    The centre square of each image is cropped, resized to ``size`` pixels and converted to RGB
    (:func:`kdkernels.data.decode.read_image`). Hidden files, files that are not images, and images
    outside the class folders are left out; one warning gives their number and names some of them.

    Args:
        root: the folder.
        size: side of the images in pixels.
        val_fraction: fraction of each class held out for validation if there is no folder ``val``;
            by default 0.2. It must be given if there is a folder ``test`` but no folder ``val``,
            because the images for validation could then be taken from either of the two folders.
        on_error: what to do if a file cannot be read as an image. "fail" raises an error that names
            the file; "skip" leaves it out and names it in a warning.
        mean, std: mean and standard deviation per channel, on a scale on which white is 1; by
            default those of ImageNet.
        max_memory: memory in GiB for the images of a split; a split that needs at most this much is
            read once and kept in memory.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
        seed: seed of the choice of images that are held out.
    """

    resize = CENTER_SQUARE
    classes: list[str]

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
                f"root: {str(root)!r} has folders for training and for testing but none for validation: give val_fraction=0.2 to hold out a part "
                f"of the training images, or add a link 'val' to {self._folders['test'].name!r} to validate on the test images"
            )
        self.classes = Listing(self._folders["train"]).classes
        self.num_classes = len(self.classes)

    def make_splits(self) -> dict[str, Dataset]:
        left_out = LeftOut(self.root)
        files = {split: Listing(folder).files(self.classes, left_out, require_all=split == "train") for split, folder in self._folders.items()}
        if "val" not in files:
            files["train"], files["val"] = self._hold_out(files["train"])
        splits = {split: self._dataset(listed, left_out) for split, listed in files.items()}
        if left_out:
            warnings.warn(str(left_out), stacklevel=2)
        return splits

    def _hold_out(self, files: list[tuple[Path, int]]) -> tuple[list, list]:
        """Split the files into training and validation files, by the same fraction in each class.

        Each class keeps at least one image in both.
        """
        fraction = 0.2 if self.val_fraction is None else self.val_fraction
        train_files, val_files = [], []
        for label, name in enumerate(self.classes):
            class_files = [file for file in files if file[1] == label]
            if len(class_files) < 2:
                raise ValueError(f"class {name!r} has {len(class_files)} image; at least 2 are needed, because one is held out for validation")
            count = min(len(class_files) - 1, max(1, round(fraction * len(class_files))))
            order = torch.randperm(len(class_files), generator=torch.Generator().manual_seed(self.seed)).tolist()
            val_files += [class_files[i] for i in sorted(order[:count])]
            train_files += [class_files[i] for i in sorted(order[count:])]
        return train_files, val_files

    def _dataset(self, files: list[tuple[Path, int]], left_out: LeftOut) -> Dataset:
        fits = len(files) * 3 * self.size**2 <= self.max_memory * 2**30
        if not fits and self.on_error == "fail":
            return ItemImages(FileImages(files, self.size), fingerprint=_hash_listing(files, self.size))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the decoders release the GIL
            results = list(pool.map(lambda file: _try_read(file[0], self.size, keep=fits), files))
        unreadable = [(path, error) for (path, _), (_, error) in zip(files, results, strict=True) if error]
        if unreadable and self.on_error == "fail":
            path, error = unreadable[0]
            others = f" (and {len(unreadable) - 1} more files)" if len(unreadable) > 1 else ""
            raise ValueError(f"cannot read the image {path}: {error}{others}; give on_error='skip' to leave out such files")
        for path, error in unreadable:
            left_out.add("cannot be read as images", path, error)
        readable = [(file, image) for file, (image, error) in zip(files, results, strict=True) if not error]
        if not readable:
            raise ValueError(f"none of the {len(files)} files under {self.root} can be read as an image")
        if not fits:
            files = [file for file, _ in readable]
            return ItemImages(FileImages(files, self.size), fingerprint=_hash_listing(files, self.size))
        images = cast(list[Tensor], [image for _, image in readable])
        return TensorImages(image=torch.stack(images), label=torch.tensor([label for (_, label), _ in readable]))


class FileImages(Dataset):
    """Images that are read on request: (image [3, size, size] uint8, label)."""

    def __init__(self, files: list[tuple[Path, int]], size: int):
        self.files, self.size = files, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        return read_image(path, self.size), label


def _try_read(path: Path, size: int, keep: bool) -> tuple[Tensor | None, str | None]:
    """Return the image (``None`` unless ``keep``) or the error message."""
    try:
        image = read_image(path, size)
        return (image if keep else None), None
    except ValueError as error:
        return None, str(error.__cause__)


def _hash_listing(files: list[tuple[Path, int]], size: int) -> str:
    """Hash the paths, labels, sizes and modification times of the files, not their contents."""
    digest = hashlib.sha256(str(size).encode())
    for path, label in files:
        stat = path.stat()
        digest.update(f"{path} {label} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()
