"""Plot of validation images next to the attention maps of a student and its teacher."""

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
    """Write a picture of validation images and of their attention maps.

    Each row shows an image and, for each layer, the maps of the student and of the teacher.

    Args:
        ckpt: checkpoint of ``kdkernels fit``.
        out: file to write.
        layers, teacher_layers: names of the layers, which are paired in order; by default the taps
            of the method or, if it has none, those of the network's family.
        images: number of images of the validation split.
        p: exponent of the attention maps, which are means of |x|^p over the channels.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the checkpoint does not contain the config of method and data, a layer does not
            exist, or the suffix of ``out`` is not a known format.
    """
    out = picture_path(out)
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    method, data = restore_with_images(ckpt)
    taps = taps_of(method, layers, teacher_layers)
    count = count_images(data)
    raw, batch = batch_of(data, list(range(0, count, max(1, count // images)))[:images])
    with torch.no_grad():
        outputs = {name: tap(batch["image"]) for name, tap in taps.items()}
    figure = _draw(raw, batch, outputs, p, data)
    return write_picture(figure, out)


def _draw(raw: Tensor, batch: dict, outputs: dict, p: float, data: ImageData):
    classes = getattr(data, "classes", None) or [str(k) for k in range(data.num_classes or int(batch["label"].max()) + 1)]
    columns = [(name, i) for i in range(len(next(iter(outputs.values()))[1])) for name in outputs]
    rows = len(raw)
    figure, axes = subplots(rows, 1 + len(columns), figsize=(1.5 * (1 + len(columns)), 1.55 * rows + 0.8), squeeze=False)
    for row in range(rows):
        axes[row, 0].imshow(raw[row].permute(1, 2, 0).expand(-1, -1, 3).numpy())
        axes[row, 0].set_ylabel(classes[int(batch["label"][row])], fontsize=10)
    axes[0, 0].set_title("image", fontsize=10)
    for column, (name, i) in enumerate(columns, start=1):
        logits, features = outputs[name]
        layer = list(features)[i]
        if features[layer].dim() != 4:
            raise ValueError(f"layers: layer {layer!r} of the {name} must return [B, C, H, W], it returned {list(features[layer].shape)}")
        maps = attention_pool(features[layer], p)
        maps = F.interpolate(maps[:, None], raw.shape[2:], mode="nearest")[:, 0]
        axes[0, column].set_title(f"{name}\n{layer}, {features[layer].shape[1]} x {features[layer].shape[2]}²", fontsize=9)
        for row in range(rows):
            axes[row, column].imshow(raw[row].mean(0), cmap="gray", vmin=0, vmax=1)
            overlay = axes[row, column].imshow(maps[row] / maps[row].amax().clamp(min=1e-30), cmap="inferno", vmin=0, vmax=1, alpha=0.75)
            if i == len(features) - 1:
                axes[row, column].set_xlabel(f"predicted: {classes[int(logits[row].argmax())]}", fontsize=8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    bar = figure.colorbar(overlay, ax=axes, orientation="horizontal", fraction=0.02, pad=0.02, aspect=60)
    bar.set_label(f"mean over channels of |x|^{p:g}, each map divided by its maximum", fontsize=9)
    return figure
