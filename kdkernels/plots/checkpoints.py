"""Loading of checkpoints for plots: the networks, the layers to plot, and validation images."""

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
    """Restore method and data from a checkpoint, by :func:`kdkernels.distill.restore.restore`.

    Raises:
        FileNotFoundError, ValueError: as :func:`restore`.
        ValueError: the data module is not a class of :mod:`kdkernels.data`.
    """
    method, data = restore(ckpt)
    if not isinstance(data, ImageData):
        raise ValueError(
            f"{os.fspath(ckpt)!r} was trained on {type(data).__name__}; plots need a data module of kdkernels.data, for example FromDatasets"
        )
    return method, data


def taps_of(method: Distiller, layers: list[str] | None, teacher_layers: list[str] | None) -> dict[str, FeatureTaps]:
    """Return the taps of the student and, if there is one, of the teacher.

    The layers are those given or, in this order, the taps of the method or those of the network's
    family. The teacher without any of these has the names given for the student.
    """
    nets = {"student": method.student.eval()} | ({"teacher": method.teacher} if method.teacher is not None else {})
    taps = {}
    for name, net in nets.items():
        given = layers if name == "student" else teacher_layers
        names = given or getattr(method, f"{name}_taps").names or TAPS.get(type(net)) or (layers if name == "teacher" else None)
        if not names:
            raise ValueError(f"layers: there are no default layers for {type(net).__name__}; give their names, for example --layers '[features.3]'")
        taps[name] = FeatureTaps(net, names)
    if len({len(t.names) for t in taps.values()}) > 1:
        raise ValueError(f"layers and teacher_layers must have the same length, got {[t.names for t in taps.values()]}")
    return taps


def count_images(data: ImageData) -> int:
    """Return the number of images of the validation split."""
    split: Any = data.splits["val"]  # the type Dataset does not declare __len__
    return len(split)


def batch_of(data: ImageData, images: list[int]) -> tuple[Tensor, dict]:
    """Return validation images [N, C, H, W] in [0, 1] for display, and the normalised batch."""
    batch = data.splits["val"][images]
    raw = batch["image"]
    raw = raw / 255 if raw.dtype == torch.uint8 else (raw - raw.amin()) / (raw.amax() - raw.amin()).clamp(min=1e-12)
    return raw, data.finish(batch)
