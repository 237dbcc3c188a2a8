"""Plot of the confusion matrices of students, and of the difference of two of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..tasks import Classification
from .checkpoints import restore_with_images
from .drawing import picture_path, subplots, write_picture

__all__ = ["Confusion", "plot_confusion"]

MAX_CLASSES_WITH_NUMBERS = 20
MAX_CLASSES_WITH_NAMES = 100
BAR: dict[str, Any] = {"orientation": "horizontal", "fraction": 0.05, "pad": 0.02, "aspect": 50, "shrink": 0.8}


class Confusion(NamedTuple):
    """The confusion matrix of one checkpoint."""

    name: str  # folder and file of the checkpoint
    classes: list[str]
    counts: Tensor  # [K, K] int64: images of the class (row) with the prediction (column)

    @property
    def shares(self) -> Tensor:
        """The counts divided by the number of images of their row's class; NaN without images."""
        return self.counts / self.counts.sum(1, keepdim=True)

    @property
    def accuracy(self) -> float:
        return int(self.counts.trace()) / int(self.counts.sum())


def plot_confusion(ckpt: Sequence[str | os.PathLike], out: str | os.PathLike, split: Literal["val", "test"] = "val") -> tuple[Path, list[Confusion]]:
    """Write a picture of the confusion matrix of each student.

    A row is a class and a column a prediction. A cell shows the share of the images of its row, in
    percent, and their number. With two checkpoints, a third matrix shows by how many percentage
    points the shares of the second one are higher.

    Args:
        ckpt: checkpoints of ``kdkernels fit`` on classification, on data with the same classes.
        out: file to write.
        split: "val" or "test", the images of the data module of each checkpoint.

    Returns:
        The file, and the matrix of each checkpoint.

    Raises:
        FileNotFoundError: a checkpoint does not exist.
        ValueError: a checkpoint does not contain the config of its run or is not of a
            classification, the classes differ, the data have no such split or no labels, or the
            suffix of ``out`` is not a known format.
    """
    out = picture_path(out)
    if split not in ("val", "test"):
        raise ValueError(f"split must be val or test, got {split!r}")
    results = [confusion(path, split) for path in ckpt]
    for path, result in zip(ckpt, results, strict=True):
        if result.classes != results[0].classes:
            raise ValueError(
                f"all checkpoints must have the same classes: {os.fspath(ckpt[0])!r} has {_brief(results[0].classes)}, "
                f"{os.fspath(path)!r} has {_brief(result.classes)}"
            )
    return write_picture(draw(results), out), results


@torch.no_grad()
def confusion(ckpt: str | os.PathLike, split: Literal["val", "test"] = "val") -> Confusion:
    """Count the predictions of the student of a checkpoint."""
    method, data = restore_with_images(ckpt)
    if not isinstance(method.task, Classification):
        raise ValueError(f"{os.fspath(ckpt)!r} must be a run of a classification, its task is {type(method.task).__name__}")
    method.eval()
    counts = torch.zeros(0, 0, dtype=torch.int64)
    for batch in map(data.finish, data.val_dataloader() if split == "val" else data.test_dataloader()):
        if "label" not in batch:
            raise ValueError(f"{os.fspath(ckpt)!r}: the images of the split {split!r} have no labels")
        logits = method.task.logits(method.predictions(batch["image"])[""])
        method.task.check_labels(batch["label"], batch["image"], logits.shape[1], split)
        prediction, label = method.task.metric_inputs(logits, batch)
        k = logits.shape[1]
        counts = torch.bincount(label * k + prediction, minlength=k * k).view(k, k) + (counts if len(counts) else 0)
    if not counts.sum():
        raise ValueError(f"{os.fspath(ckpt)!r}: the split {split!r} has no images")
    names = list(map(str, getattr(data, "classes", None) or []))
    name = "/".join(Path(ckpt).parts[-2:]).removesuffix(".ckpt")
    return Confusion(name, names if len(names) == len(counts) else [str(i) for i in range(len(counts))], counts)


def _brief(classes: list[str]) -> str:
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"


def draw(results: Sequence[Confusion]):
    from matplotlib.colors import PowerNorm

    classes = results[0].classes
    side = min(max(3.6, 1.2 + 0.42 * len(classes)), 9.5)
    num_panels = len(results) + (len(results) == 2)
    figure, axes = subplots(1, num_panels, figsize=(side * num_panels, side + 1.5), squeeze=False)
    figure.set_layout_engine("compressed")
    for ax, result in zip(axes[0], results, strict=False):
        # The square root makes the few confusions of an accurate network visible.
        image = ax.imshow((100 * result.shares).numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 100))
        _label(ax, classes, first=ax is axes[0, 0])
        ax.set_title(f"{result.name}\naccuracy {100 * result.accuracy:.2f} %, {int(result.counts.sum())} images", fontsize=10)
        _write_numbers(
            ax, [[_cell(*cell) for cell in zip(*row, strict=True)] for row in zip(result.shares, result.counts, strict=True)], result.shares
        )
        figure.colorbar(image, ax=ax, ticks=[0, 5, 20, 50, 100], **BAR).set_label("% of the images of a class", fontsize=9)
    if len(results) == 2:
        ax, difference = axes[0, 2], 100 * (results[1].shares - results[0].shares)
        limit = max(1.0, float(difference.nan_to_num().abs().max()))
        image = ax.imshow(difference.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        _label(ax, classes, first=False)
        change = 100 * (results[1].accuracy - results[0].accuracy)
        ax.set_title(f"second minus first\naccuracy {change:+.2f} percentage points", fontsize=10)
        _write_numbers(ax, [[_signed(float(d)) for d in row] for row in difference], difference.abs() / limit)
        figure.colorbar(image, ax=ax, **BAR).set_label("percentage points", fontsize=9)
    return figure


def _label(ax, classes: list[str], first: bool) -> None:
    every = -(-len(classes) // MAX_CLASSES_WITH_NAMES)
    size = 9 if len(classes) <= MAX_CLASSES_WITH_NUMBERS else max(4.5, 9 - len(classes) / 20)
    vertical = len(classes) * max(map(len, classes)) > 40
    ax.set_xticks(range(0, len(classes), every), classes[::every], fontsize=size, rotation=90 if vertical else 0)
    ax.set_yticks(range(0, len(classes), every), classes[::every] if first else [""] * len(classes[::every]), fontsize=size)
    ax.set_xlabel("prediction")
    if first:
        ax.set_ylabel("class")


def _cell(share: Tensor, count: Tensor) -> str:
    return f"{100 * float(share):.0f}\n({int(count)})" if count else ""


def _signed(points: float) -> str:
    return f"{points:+.0f}" if abs(points) >= 0.5 else ""


def _write_numbers(ax, cells: list[list[str]], strength: Tensor) -> None:
    """Write a text into each cell, in white where the colour is dark."""
    if len(cells) > MAX_CLASSES_WITH_NUMBERS:
        return
    size = 9 if len(cells) <= 5 else 7
    for i, row in enumerate(cells):
        for j, text in enumerate(row):
            ax.text(j, i, text, ha="center", va="center", fontsize=size, color="white" if strength[i, j] > 0.45 else "black")


def most_frequent(result: Confusion, count: int = 5) -> str:
    """Return the accuracy and the most frequent confusions as plain text."""
    lines = [f"{result.name}: accuracy {result.accuracy:.4f}, {int(result.counts.sum())} images"]
    wrong = result.counts.clone().fill_diagonal_(0)
    for cell in wrong.flatten().argsort(descending=True, stable=True)[:count].tolist():
        row, column = divmod(cell, len(wrong))
        if not wrong[row, column]:
            break
        share = float(result.shares[row, column])
        lines.append(
            f"  {int(wrong[row, column])} of {int(result.counts[row].sum())} images of {result.classes[row]!r} ({share:.1%}) are "
            f"predicted as {result.classes[column]!r}"
        )
    return "\n".join(lines if len(lines) > 1 else [*lines, "  no confusions"])
