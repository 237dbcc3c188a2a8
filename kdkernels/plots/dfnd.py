"""Plot of a DFND run: the selected and the noisiest images, the matrix Q, and the classes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data import SampleIndex, SelectedImages
from ..data.image_pool import images_of
from ..distill import DFND
from .checkpoints import restore_with_images
from .drawing import new_figure, picture_path, write_picture

__all__ = ["plot_dfnd"]


class Shown(NamedTuple):
    """What the plot shows."""

    classes: list[str]
    least: Tensor  # [N, C, H, W] in [0, 1]
    least_values: list[float]
    noisiest: Tensor
    noisiest_values: list[float]
    matrix: Tensor | None  # Q [K, K]
    pool_share: Tensor  # [K], of the teacher's most probable classes
    selected_share: Tensor


def plot_dfnd(ckpt: str | os.PathLike, out: str | os.PathLike, images: int = 40) -> tuple[Path, str]:
    """Write a picture of the images that a run of DFND selected, and of its matrix Q.

    Left: the images of the pool with the smallest and with the largest noise values. Right: the
    learned elements of Q, and for each class, as the teacher sees it, its share of the pool and of
    the selected images.

    Args:
        ckpt: checkpoint of ``kdkernels fit`` with the method ``DFND`` and the data module
            ``SelectedImages`` with an index file.
        out: file to write.
        images: number of images of each kind, at most 100.

    Returns:
        The file, and the shares of the classes as a table of plain text.

    Raises:
        FileNotFoundError: the checkpoint or the index file does not exist.
        ValueError: the checkpoint is of another method or of other data, or the pool has changed.
    """
    out = picture_path(out)
    if not 1 <= images <= 100:
        raise ValueError(f"images must lie in [1, 100], got {images}")
    method, data = restore_with_images(ckpt)
    if not isinstance(method, DFND):
        raise ValueError(f"{os.fspath(ckpt)!r} must be a run of DFND, got {type(method).__name__}")
    if not isinstance(data, SelectedImages):
        raise ValueError(f"{os.fspath(ckpt)!r} must be a run on SelectedImages, got {type(data).__name__}")
    if data.index is None:
        raise ValueError(f"{os.fspath(ckpt)!r} is a run on SelectedImages without the option index: no images were selected")
    index = SampleIndex.load(data.index)
    index.check(pool=data.pool, name=f"{os.fspath(data.index)!r}")
    size: Any = None if data.image_shape is None else data.image_shape[1:]
    counts = index.labels.bincount(minlength=len(index.class_counts))
    with torch.no_grad():
        shown = Shown(
            classes=[str(name) for name in data.classes or range(len(index.class_counts))],
            least=_displayed(images_of(data.pool, index.indices[:images].tolist(), size)),
            least_values=index.values[:images].tolist(),
            noisiest=_displayed(images_of(data.pool, index.noisiest[:images].tolist(), size)),
            noisiest_values=index.noisiest_values[:images].tolist(),
            matrix=None if method.noise is None else method.noise.matrix().cpu(),
            pool_share=index.class_counts / index.class_counts.sum(),
            selected_share=counts / counts.sum(),
        )
    return write_picture(draw(shown), out), table(shown)


def _displayed(images: Tensor) -> Tensor:
    return images / 255 if images.dtype == torch.uint8 else (images - images.amin()) / (images.amax() - images.amin()).clamp(min=1e-12)


def draw(shown: Shown):
    figure = new_figure(figsize=(13, 7.2))
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    sheets = left.subfigures(2, 1)
    _sheet(sheets[0], "images with the smallest noise values", shown.least, shown.least_values)
    _sheet(sheets[1], "images with the largest noise values", shown.noisiest, shown.noisiest_values)
    upper, lower = right.subplots(2, 1, height_ratios=(1.5, 1))
    few = len(shown.classes) <= 20
    if shown.matrix is None:
        upper.set_axis_off()
        upper.text(0.5, 0.5, "trained without Q", ha="center", va="center")
    else:
        errors = shown.matrix.masked_fill(torch.eye(len(shown.matrix), dtype=torch.bool), torch.nan)
        upper.set_facecolor("0.85")
        picture = upper.imshow(errors, cmap="viridis")
        right.colorbar(picture, ax=upper, label="probability")
        diagonal = shown.matrix.diagonal()
        values = f"{diagonal[0]:.4g}" if bool((diagonal == diagonal[0]).all()) else f"{diagonal.min():.4g} to {diagonal.max():.4g}"
        upper.set_title(f"Q beside its diagonal ({values}, grey)", fontsize=10)
        upper.set_xlabel("class predicted by the teacher")
        upper.set_ylabel("class")
        if few:
            upper.set_xticks(range(len(shown.classes)), shown.classes)
            upper.set_yticks(range(len(shown.classes)), shown.classes)
    place = torch.arange(len(shown.pool_share)).float()
    lower.bar(place - 0.2, 100 * shown.pool_share, 0.4, label="of the pool", color="0.7")
    lower.bar(place + 0.2, 100 * shown.selected_share, 0.4, label="of the selected images", color="#1c7ed6")
    lower.set_xlabel("class predicted by the teacher")
    lower.set_ylabel("share in %")
    if few:
        lower.set_xticks(place, shown.classes[: len(place)])
    lower.legend(fontsize=8)
    lower.grid(axis="y", alpha=0.3)
    return figure


def _sheet(part, title: str, images: Tensor, values: list[float]) -> None:
    columns = min(10, len(images))
    rows = -(-len(images) // columns)
    axes = part.subplots(rows, columns, squeeze=False)
    part.suptitle(title, fontsize=10)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image, value in zip(axes.flat, images, values, strict=False):
        ax.imshow(image.permute(1, 2, 0).expand(-1, -1, 3), interpolation="nearest")
        ax.set_title(f"{value:.1e}" if value < 0.01 else f"{value:.2f}", fontsize=6, pad=2)


def table(shown: Shown) -> str:
    """Return the shares of the classes in % as a table of plain text."""
    width = max(5, *(len(name) for name in shown.classes))
    lines = [f"{'class':{width}}  of the pool  of the selected images"]
    for name, pool, selected in zip(shown.classes, shown.pool_share.tolist(), shown.selected_share.tolist(), strict=False):
        lines.append(f"{name:{width}}  {100 * pool:11.2f}  {100 * selected:22.2f}")
    return "\n".join(lines)
