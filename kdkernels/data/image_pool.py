"""Pools of unlabelled images: a folder of files, and the reading of any dataset of images."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .decode import as_pixels, read_image
from .listing import LeftOut, image_files

__all__ = ["ImagePool", "images_of"]


class ImagePool(Dataset):
    """The image files of a folder, at any depth, as a dataset of images [C, size, size] uint8.

    The centre square of each image is resized (:class:`ImageFolder` does the same). Several images
    are read by several threads.

    Args:
        root: the folder.
        size: height and width of the images.
        mode: "RGB", or "L" for grey images with one channel.
        on_error: what to do if a file cannot be read as an image. "fail" raises an error that names
            the file. "skip" warns, and gives a black image, which :func:`select_samples` never
            selects from this pool (but may from a Subset of it); its position is in ``damaged``.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder contains no image; or, when an image is read, it is damaged.
    """

    def __init__(self, root: str | os.PathLike, size: int = 32, mode: Literal["RGB", "L"] = "RGB", on_error: Literal["fail", "skip"] = "fail"):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be an integer >= 1, got {size!r}")
        if mode not in ("RGB", "L"):
            raise ValueError(f'mode must be "RGB" or "L", got {mode!r}')
        if on_error not in ("fail", "skip"):
            raise ValueError(f'on_error must be "fail" or "skip", got {on_error!r}')
        self.root, self.size, self.mode, self.on_error = Path(root), size, mode, on_error
        self.damaged: set[int] = set()  # positions of the files that could not be read so far
        self.files = image_files(self.root, LeftOut(self.root))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Tensor:
        try:
            return read_image(self.files[i], self.size, self.mode)
        except ValueError as error:
            if self.on_error == "fail":
                raise
            if i not in self.damaged:
                self.damaged.add(i)
                warnings.warn(f"{error}; this file is not selected", stacklevel=2)
            return torch.zeros(1 if self.mode == "L" else 3, self.size, self.size, dtype=torch.uint8)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:  # the decoders release the GIL
            return list(threads.map(self.__getitem__, indices))


def images_of(pool: Any, indices: list[int], size: tuple[int, int] | None, *, name: str = "the pool", resizable: bool = True) -> Tensor:
    """Return images of a pool [B, C, H, W], resized to ``size`` if it is given.

    ``name`` is that of the pool in messages, and ``resizable`` whether the user can give a size.

    Raises:
        TypeError, ValueError: an item is no image, or the shapes or dtypes differ.
    """
    items = pool.__getitems__(indices) if hasattr(pool, "__getitems__") else [pool[i] for i in indices]
    images = []
    for i, item in zip(indices, items, strict=True):
        if isinstance(item, dict):
            if "image" not in item:
                raise TypeError(f"image {i} of {name} is a dict without 'image', it has {sorted(map(str, item))}")
            item = item["image"]
        elif isinstance(item, (tuple, list)) and item:
            item = item[0]
        image = as_pixels(item, f"image {i} of {name}").detach()
        if size is not None and tuple(image.shape[1:]) != size:
            image = _resized(image, size)
        images.append(image)
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        advice = " or size must be given," if resizable and len({shape[0] for shape in shapes}) == 1 else ""
        raise ValueError(f"the images of {name} must have one shape,{advice} got {sorted(shapes)}")
    dtypes = {str(image.dtype) for image in images}
    if len(dtypes) > 1:
        raise ValueError(f"the images of {name} must have one dtype, because it determines the value of white, got {sorted(dtypes)}")
    return torch.stack(images)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True, align_corners=False)[0]
    return resized.round().clamp(0, 255).to(torch.uint8) if image.dtype == torch.uint8 else resized
