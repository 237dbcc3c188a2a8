"""Plots for the report of the demo: accuracy by epoch, times of the loss, and sample images."""

from __future__ import annotations

from typing import Any

from ..data import ClutterDigits
from .drawing import subplots

COLOURS = ("#4c6ef5", "#868e96", "#e8590c")  # teacher, student alone, distilled student


def accuracy_curves(curves: dict[str, list[list[float]]]):
    """Plot the validation accuracy against epochs, with a curve for each stage and seed."""
    figure, axes = subplots(figsize=(8, 4.2))
    for (title, seed_curves), colour in zip(curves.items(), COLOURS, strict=True):
        for i, curve in enumerate(seed_curves):
            epochs = range(1, len(curve) + 1)
            axes.plot(epochs, [100 * v for v in curve], "o-", ms=3, lw=1.2, alpha=0.85, color=colour, label=title if i == 0 else None)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def loss_times(bench: dict):
    """Plot the times of the reference and of torch.compile relative to the fused op, by shape."""
    figure, axes = subplots(figsize=(8, 0.8 + 0.9 * len(bench)))
    for i, row in enumerate(bench.values()):
        for k, (contender, colour) in enumerate((("reference", "#868e96"), ("compiled", "#4c6ef5"))):
            if contender in row["ratios"]:
                bar = axes.barh(
                    i + 0.36 * k - 0.18,
                    row["ratios"][contender],
                    0.34,
                    color=colour,
                    label={"compiled": "torch.compile"}.get(contender, contender) if i == 0 else None,
                )
                axes.bar_label(bar, fmt="%.1fx", padding=3)
    axes.axvline(1, color="#e8590c", lw=1.5, label="fused")
    axes.set_yticks(range(len(bench)), list(bench))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("time relative to the fused op")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def sample_images(data: ClutterDigits):
    """Plot eight test images above the masks of their digits."""
    split: Any = data.splits["test"]  # a TensorImages: the demo keeps its images in memory
    images, count = split.fields, 8
    figure, axes = subplots(2, count, figsize=(9, 2.6))
    for i in range(count):
        axes[0, i].imshow(images["image"][i].permute(1, 2, 0).numpy())
        axes[0, i].set_title(str(int(images["label"][i])), fontsize=10)
        axes[1, i].imshow(images["mask"][i].numpy(), cmap="gray")
    for ax in axes.flat:
        ax.axis("off")
    return figure
