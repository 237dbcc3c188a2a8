"""Image files and images in memory as uint8 pixels, whatever kind of image they are."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


CENTER_SQUARE = "center_square_bilinear"  # the name of the rule by which read_image resizes


def read_image(path: str | os.PathLike, size: int, mode: str = "RGB") -> Tensor:
    """[3, size, size] uint8, or [1, size, size] where ``mode`` is "L": the square in the middle of an image, resized.

    An image is turned as its EXIF data say. What lies under transparent pixels is hidden: they are shown on white. 16 bits and floats in [0, 1]
    are scaled to 8 bits. Of several frames the first is taken.

    Raises:
        ValueError: the file cannot be read as an image, or its numbers have no known scale; names it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image.load()
            image = to_8_bits(ImageOps.exif_transpose(image), mode)
    except Exception as error:  # a decoder of a damaged file raises what it likes
        raise ValueError(f"cannot read the image {path}: {error}") from error
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2  # cut before it is resized: the rest of a long image would need room too
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1).contiguous()


def to_8_bits(image: Image.Image, mode: str | None = None) -> Image.Image:
    """The image as RGB or L, where ``mode`` says which; else as L if it has no colours.

    Raises:
        ValueError: integers beyond 16 bits, or floats outside [0, 1]: nothing says what is white.
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
                f"its pixels are floats from {low:.4g} to {high:.4g}, and only those in [0, 1] have a known white: save it with 8 or 16 bits"
            )
        return (pixels * 255 + 0.5).astype(np.uint8)
    if low < 0 or high > 65535:
        raise ValueError(f"its pixels are integers from {low} to {high}, and only 8 and 16 bits have a known white: save it with those")
    return ((pixels.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)


def is_pil(image: object) -> bool:
    """Whether it is an image of Pillow, which is not imported here."""
    return hasattr(image, "convert") and hasattr(image, "getbands")


def as_pixels(image: object, name: str) -> Tensor:
    """An image of a user's dataset as a tensor [C, H, W] of uint8 or floats: tensors [C, H, W], arrays [H, W] or [H, W, C], PIL images.

    uint8, and floats of any precision, stay as they are; uint16 and bool become float32 in [0, 1].

    Raises:
        TypeError, ValueError: another type, other integers (nothing says what is white), or another shape.
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
