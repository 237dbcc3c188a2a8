"""Figures of visual concepts: maps over images through the epochs, and curves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..analysis import TrainingKnowledge
from .drawing import subplots

__all__ = ["concept_curves", "concept_maps"]

COLOURS = ("#e8590c", "#4c6ef5", "#2f9e44", "#ae3ec9")


def concept_maps(results: Mapping[str, TrainingKnowledge], images: Tensor, mask: Tensor, count: int = 4, epochs: int = 6):
    """Draw the entropies of some images through the epochs, with a frame around each concept.

    Args:
        results: of :func:`kdkernels.analysis.knowledge_of_trainings`.
        images: [N, C, H, W] in [0, 1], the kept images.
        mask: [N, H, W], their foreground.
        count: number of images.
        epochs: number of checkpoints.
    """
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().tolist()
    rows = [(image, name) for image in chosen for name in results]
    columns = max(len(_some(result.epochs, epochs)) for result in results.values())
    figure, axes = subplots(len(rows), 1 + columns, figsize=(1.35 * (1 + columns) + 1.2, 1.35 * len(rows) + 0.8), squeeze=False)
    finite = torch.cat([result.entropy[:, chosen].flatten() for result in results.values()])
    low, high = finite.quantile(0.01).item(), finite.quantile(0.99).item()
    same_epochs = len({tuple(result.epochs) for result in results.values()}) == 1
    shown = None
    for row, (image, name) in zip(axes, rows, strict=True):
        result = results[name]
        picture = images[image].permute(1, 2, 0).expand(-1, -1, 3)
        row[0].imshow(picture)
        row[0].contour(mask[image].float(), levels=[0.5], colors="#e8590c", linewidths=1)
        row[0].set_ylabel(name, fontsize=9)
        for ax, m in zip(row[1:], _some(result.epochs, epochs), strict=False):
            shown = ax.imshow(result.entropy[m, image], cmap="viridis", vmin=low, vmax=high)
            for y, x in result.concepts.concepts[m, image].nonzero().tolist():
                ax.add_patch(_frame(x, y))
            if row[0] is axes[0, 0] or not same_epochs:
                ax.set_title(f"epoch {result.epochs[m]}", fontsize=8)
            ax.set_xlabel(f"{int(result.concepts.foreground[m, image])} + {int(result.concepts.background[m, image])}", fontsize=7)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    figure.colorbar(shown, ax=axes, label="entropy in nats; small: the layer keeps the block", shrink=0.6)
    return figure


def _frame(x: int, y: int):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#e8590c", linewidth=0.8)


def _some(epochs: list[int], count: int) -> list[int]:
    """Return the indices of ``count`` checkpoints, with the first and the last one."""
    return sorted(set(torch.linspace(0, len(epochs) - 1, min(count, len(epochs))).round().long().tolist()))


def concept_curves(results: Mapping[str, TrainingKnowledge]):
    """Draw the numbers of concepts and their share in the foreground against the weight distance.

    The thin lines are images, the thick ones their means. The last picture shows where each image
    has its most concepts of the foreground.
    """
    figure, axes = subplots(1, 4, figsize=(15, 3.6))
    for (name, result), colour in zip(results.items(), COLOURS, strict=False):
        path = result.distances
        values = (result.concepts.foreground, result.concepts.background, result.concepts.ratio)
        for ax, value in zip(axes, values, strict=False):
            ax.plot(path, value, color=colour, lw=0.4, alpha=0.3)
            ax.plot(path, value.double().mean(1), "o-", color=colour, ms=3, lw=2, label=name)
        axes[3].scatter(result.speed.distances, result.concepts.foreground.amax(0), color=colour, s=14, alpha=0.6, label=name)
        axes[3].axvline(result.speed.mean, color=colour, lw=1.2)
    names = ("concepts in the foreground", "concepts in the background", "share in the foreground", "most concepts in the foreground")
    for ax, name in zip(axes, names, strict=True):
        ax.set_xlabel("weight distance")
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[3].set_xlabel("weight distance there; lines: means")
    return figure
