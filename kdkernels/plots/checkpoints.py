"""What a checkpoint holds for a picture: the layers to look at, and images of the validation split."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..data import ImageData
from ..distill import Distiller
from ..distill.restore import restore
from ..models import TAPS
from ..models.taps import FeatureTaps


def restore_with_images(ckpt: str | os.PathLike) -> tuple[Distiller, ImageData]:
    """:func:`kdkernels.distill.restore.restore`, for data whose validation images can be looked at one by one.

    Raises:
        FileNotFoundError, ValueError: as :func:`restore`; or the data are not of :mod:`kdkernels.data`.
    """
    method, data = restore(ckpt)
    if not isinstance(data, ImageData):
        raise ValueError(f"{os.fspath(ckpt)!r} was trained on {type(data).__name__}; pictures need data of kdkernels.data (see FromDatasets)")
    return method, data


def taps_of(method: Distiller, layers: list[str] | None, teacher_layers: list[str] | None) -> dict[str, FeatureTaps]:
    """Of the student and, if there is one, the teacher: as named, else the method's, else those of the networks' families."""
    nets = {"student": method.student.eval()} | ({"teacher": method.teacher} if method.teacher is not None else {})
    taps = {}
    for name, net in nets.items():
        given = layers if name == "student" else teacher_layers
        names = given or getattr(method, f"{name}_taps").names or TAPS.get(type(net)) or (layers if name == "teacher" else None)
        if not names:
            raise ValueError(f"layers: {type(net).__name__} is of no family whose layers are known; name them, for example --layers '[features.3]'")
        taps[name] = FeatureTaps(net, names)
    if len({len(t.names) for t in taps.values()}) > 1:
        raise ValueError(f"layers and teacher_layers must pair up, got {[t.names for t in taps.values()]}")
    return taps


def count_images(data: ImageData) -> int:
    """How many images the validation split holds."""
    split: Any = data.splits["val"]  # a Dataset with a length, which its type does not say
    return len(split)


def batch_of(data: ImageData, images: list[int]) -> tuple[Tensor, dict]:
    """Images of the validation split to look at [N, C, H, W] in [0, 1], and the batch as the networks see it."""
    batch = data.splits["val"][images]
    raw = batch["image"]
    raw = raw / 255 if raw.dtype == torch.uint8 else (raw - raw.amin()) / (raw.amax() - raw.amin()).clamp(min=1e-12)
    return raw, data.finish(batch)
