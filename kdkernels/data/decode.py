"""Conversion of image files and of images in memory to tensors of pixels."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


CENTER_SQUARE = "center_square_bilinear"  # name of the resizing rule of read_image


def read_image(path: str | os.PathLike, size: int, mode: str = "RGB") -> Tensor:
    """Read an image file, crop the centre square and resize it to [3, size, size] uint8.

    If ``mode`` is "L", the result is [1, size, size] in grey. The image is rotated according to its
    EXIF data. Transparent pixels are blended with white. 16-bit integers, and floats in [0, 1], are
    scaled to 8 bits. If the file has several frames, the first one is read.

    Raises:
        ValueError: the file cannot be read as an image, or the scale of its values is not known.
            The message names the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.load()
            image = to_8_bits(ImageOps.exif_transpose(file), mode)
    except Exception as error:  # for damaged files, decoders raise many kinds of exceptions
        raise ValueError(f"cannot read the image {path}: {error}") from error
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2  # crop before resizing: resizing a whole long image would need much memory
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def to_8_bits(image: Image.Image, mode: str | None = None) -> Image.Image:
    """Convert an image to ``mode`` ("RGB" or "L"), by default to L if it is grey and else to RGB.

    Raises:
        ValueError: integers that do not fit into 16 bits, or floats outside [0, 1]: the value of
            white is not known.
    """
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_scaled(np.asarray(image)))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    gray = image.mode in ("1", "L")
    return image.convert(mode or ("L" if gray else "RGB"))


def _scaled(pixels: np.ndarray) -> np.ndarray:
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f":
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"its pixels are floats from {low:.4g} to {high:.4g}; floats must lie in [0, 1], because the value of white is not known otherwise: "
                "save the image with 8 or 16 bits"
            )
        return (pixels * 255 + 0.5).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(
            f"its pixels are integers from {low} to {high}; integers must fit into 16 bits, because the value of white is not known otherwise: "
            "save the image with 8 or 16 bits"
        )
    return ((pixels.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)


def is_pil(image: object) -> TypeGuard[Image.Image]:
    """Whether ``image`` is a Pillow image, tested without importing Pillow."""
    return hasattr(image, "convert") and hasattr(image, "getbands")


def as_pixels(image: object, name: str) -> Tensor:
    """Convert an image of a user's dataset to a tensor [C, H, W].

    Args:
        image: a tensor [C, H, W], an array [H, W] or [H, W, C], or a PIL image.
        name: name of the image in error messages.

    Returns:
        uint8, float32 and float64 images with their dtype and values; float16 and bfloat16 images
        as float32 with the same values; uint16 and bool images as float32 in [0, 1].

    Raises:
        TypeError: another type, or integers of another dtype, for which the value of white is not
            known.
        ValueError: another shape, or a PIL image for which the value of white is not known.
    """
    if is_pil(image):
        image = np.array(to_8_bits(image))
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3):
            raise ValueError(f"{name} must have the shape [H, W] or [H, W, C], got {list(image.shape)}")
        image = torch.from_numpy(np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("=")))
        image = (image[..., None] if image.dim() == 2 else image).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a tensor, an array or a PIL image, got {type(image).__name__}")
    if image.dim() != 3:
        raise ValueError(f"{name} must have the shape [C, H, W], got {list(image.shape)}")
    if image.dtype in (torch.bool, torch.uint16):
        return image.float() / (1 if image.dtype == torch.bool else 65535)
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(f"{name} must be uint8, uint16 or floating point, got {image.dtype}")
    return image.float() if image.dtype in (torch.float16, torch.bfloat16) else image
