"""Plot of predicted and labelled lanes next to the attention maps of a network's layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import TAPS
from ..models.taps import FeatureTaps
from ..ops.attention_pool import attention_pool
from ..tasks import Lanes
from ..tasks.lane_curves import culane_rows
from .checkpoints import batch_of, count_images, restore_with_images, taps_of
from .drawing import picture_path, subplots, write_picture

__all__ = ["plot_lanes"]

COLOURS = ("#e8590c", "#2f9e44", "#1c7ed6", "#ae3ec9", "#f08c00", "#0ca678")


def plot_lanes(ckpt: Sequence[str | os.PathLike], out: str | os.PathLike, layers: list[str] | None = None, images: int = 4) -> Path:
    """Write a picture of validation images, their lanes, and attention maps.

    Each image has a row for each checkpoint, for example before and after self attention
    distillation. A row shows the image with the labelled lanes, the predicted lanes, and the map of
    each layer: the sum of squares over the channels, of which Self Attention Distillation takes the
    softmax.

    Args:
        ckpt: checkpoints of ``kdkernels fit`` with the task ``Lanes`` and the same data.
        out: file to write.
        layers: names of the layers; by default the taps of the first checkpoint's method or, if it
            has none, those of the network's family. Without any, only the lanes are drawn.
        images: number of images of the validation split.

    Raises:
        FileNotFoundError: a checkpoint does not exist.
        ValueError: a checkpoint is not of a run with the task ``Lanes`` or does not contain its
            config, the images have another shape than those of the first checkpoint, a layer does
            not exist, or the suffix of ``out`` is not a known format.
    """
    out = picture_path(out)
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    rows: list[tuple[str, Tensor, Tensor, dict[str, Tensor]]] = []
    raw, batch, shape = torch.empty(0), dict[str, Tensor](), None
    for path in ckpt:
        method, data = restore_with_images(path)
        if not isinstance(method.task, Lanes) or method.task.lanes < 2:
            raise ValueError(f"{os.fspath(path)!r} must be a run with the task Lanes and at least two lanes, got {type(method.task).__name__}")
        if not rows:  # all checkpoints show the images and the layers of the first one
            count = count_images(data)
            raw, batch = batch_of(data, list(range(0, count, max(1, count // images)))[:images])
            named = layers or method.student_taps.names or TAPS.get(type(method.student))
            layers = taps_of(method, layers, None)["student"].names if named else []
        elif data.image_shape != shape:
            raise ValueError(
                f"{os.fspath(path)!r} was trained on images {data.image_shape}, and {os.fspath(ckpt[0])!r} on images {shape}: plot them apart"
            )
        shape = data.image_shape
        with torch.no_grad():
            output, features = FeatureTaps(method.student.eval(), layers or [])(batch["image"])
        predicted, labelled = method.task.output_metric_inputs(output, batch)
        lines = culane_rows(raw.shape[2])
        rows.append((f"{Path(path).parent.name}\n({type(method).__name__})", predicted.curves(lines), labelled.curves(lines), features))
    return write_picture(_draw(raw, rows, culane_rows(raw.shape[2])), out)


def _draw(raw: Tensor, rows: list[tuple[str, Tensor, Tensor, dict[str, Tensor]]], lines: list[int]):
    layers = list(rows[0][3])
    size = (raw.shape[2], raw.shape[3])
    titles = ["labelled lanes", "predicted lanes", *layers]
    count = len(raw) * len(rows)
    width = 2.4
    height = width * size[0] / size[1]
    figure, axes = subplots(count, len(titles), figsize=(width * len(titles) + 0.6, height * count + 0.8), squeeze=False)
    for i, title in enumerate(titles):
        axes[0, i].set_title(title, fontsize=9)
    for image in range(len(raw)):
        picture = raw[image].permute(1, 2, 0).numpy()
        for k, (name, predicted, labelled, features) in enumerate(rows):
            row = axes[image * len(rows) + k]
            row[0].set_ylabel(name, fontsize=7)
            for ax, curves in ((row[0], labelled), (row[1], predicted)):
                ax.imshow(picture)
                for lane, columns in enumerate(curves[image]):
                    ax.plot(columns.numpy(), lines, color=COLOURS[lane % len(COLOURS)], lw=1.6)
            for ax, layer in zip(row[2:], layers, strict=True):
                attention = F.interpolate(attention_pool(features[layer][image : image + 1].float(), 2.0, reduce="sum")[None], size, mode="nearest")[
                    0, 0
                ]
                ax.imshow(picture.mean(2), cmap="gray", vmin=0, vmax=1)
                ax.imshow(attention / attention.amax().clamp(min=1e-30), cmap="inferno", vmin=0, vmax=1, alpha=0.75)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlim(-0.5, size[1] - 0.5)
        ax.set_ylim(size[0] - 0.5, -0.5)
    figure.supxlabel("maps: sum of squares over the channels, divided by the maximum of the map", fontsize=8)
    return figure
