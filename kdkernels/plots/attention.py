"""Images of the validation split beside attention maps of a student and its teacher."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import ImageData
from ..ops.attention_pool import attention_pool
from .checkpoints import batch_of, count_images, restore_with_images, taps_of
from .drawing import picture_path, subplots, write_picture

__all__ = ["plot_attention"]


def plot_attention(
    ckpt: str | os.PathLike,
    out: str | os.PathLike,
    layers: list[str] | None = None,
    teacher_layers: list[str] | None = None,
    images: int = 6,
    p: float = 2.0,
) -> Path:
    """Writes a picture: a row for each image, and in it the image and for each layer the map of the student and of the teacher.

    Args:
        ckpt: checkpoint of ``kdkernels fit``.
        out: file of the picture.
        layers, teacher_layers: names of layers, pair by pair; by default the method's taps, else those of the networks' families.
        images: how many images of the validation split.
        p: exponent of the maps, means over the channels of |x|^p.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or it does not say how method and data are made; layers that are not there; a file
            name whose format is unknown.
    """
    out = picture_path(out)
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    method, data = restore_with_images(ckpt)
    taps = taps_of(method, layers, teacher_layers)
    count = count_images(data)
    raw, batch = batch_of(data, list(range(0, count, max(1, count // images)))[:images])
    with torch.no_grad():
        found = {name: tap(batch["image"]) for name, tap in taps.items()}
    figure = _draw(raw, batch, found, p, data)
    return write_picture(figure, out)


def _draw(raw: Tensor, batch: dict, found: dict, p: float, data: ImageData):
    classes = getattr(data, "classes", None) or [str(k) for k in range(data.num_classes or int(batch["label"].max()) + 1)]
    columns = [(name, i) for i in range(len(next(iter(found.values()))[1])) for name in found]
    rows = len(raw)
    figure, axes = subplots(rows, 1 + len(columns), figsize=(1.5 * (1 + len(columns)), 1.55 * rows + 0.8), squeeze=False)
    for row in range(rows):
        axes[row, 0].imshow(raw[row].permute(1, 2, 0).expand(-1, -1, 3).numpy())
        axes[row, 0].set_ylabel(classes[int(batch["label"][row])], fontsize=10)
    axes[0, 0].set_title("image", fontsize=10)
    for column, (name, i) in enumerate(columns, start=1):
        logits, features = found[name]
        layer = list(features)[i]
        if features[layer].dim() != 4:
            raise ValueError(f"layers: {layer!r} of the {name} gives {tuple(features[layer].shape)}; a picture needs maps [B, C, H, W]")
        maps = attention_pool(features[layer], p)
        maps = F.interpolate(maps[:, None], raw.shape[2:], mode="nearest")[:, 0]
        axes[0, column].set_title(f"{name}\n{layer}, {features[layer].shape[1]} x {features[layer].shape[2]}²", fontsize=9)
        for row in range(rows):
            axes[row, column].imshow(raw[row].mean(0), cmap="gray", vmin=0, vmax=1)
            shown = axes[row, column].imshow(maps[row] / maps[row].amax().clamp(min=1e-30), cmap="inferno", vmin=0, vmax=1, alpha=0.75)
            if i == len(features) - 1:
                axes[row, column].set_xlabel(f"says {classes[int(logits[row].argmax())]}", fontsize=8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    bar = figure.colorbar(shown, ax=axes, orientation="horizontal", fraction=0.02, pad=0.02, aspect=60)
    bar.set_label(f"mean over channels of |x|^{p:g}, each map relative to its largest", fontsize=9)
    return figure
