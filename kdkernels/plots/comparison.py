"""Figures of ``kdkernels compare``: differences, curves, calibration, and the choice of weights."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .drawing import subplots

__all__ = ["accuracy_differences", "reliability", "tuning_curves", "validation_curves"]

COLOURS = ("#868e96", "#4c6ef5", "#e8590c", "#2f9e44", "#ae3ec9", "#1098ad", "#f08c00", "#d6336c", "#5c940d", "#364fc7")


def accuracy_differences(lines: Sequence[Mapping[str, Any]]):
    """Draw the paired difference of each row, its interval, and its seeds as dots.

    Args:
        lines: of the table, with ``title``, ``difference`` and ``differences`` by seed.
    """
    figure, axes = subplots(figsize=(8, 1.2 + 0.38 * max(1, len(lines))))
    for i, line in enumerate(lines):
        difference = line["difference"]
        axes.scatter(line["differences"], [i] * len(line["differences"]), s=14, color="#868e96", alpha=0.7, zorder=2)
        colour = "#4c6ef5"
        if difference["low"] is not None:
            colour = "#2f9e44" if difference["low"] > 0 else "#c92a2a" if difference["high"] < 0 else colour
            axes.plot([difference["low"], difference["high"]], [i, i], color=colour, lw=3, zorder=3, solid_capstyle="butt")
        axes.plot(difference["mean"], i, "D", ms=6, color=colour, zorder=4)
    axes.axvline(0, color="#212529", lw=1)
    axes.set_yticks(range(len(lines)), [line["title"] for line in lines])
    axes.set_ylim(max(len(lines), 1) - 0.4, -0.6)
    axes.set_xlabel("difference of the test accuracy to the baseline, percentage points")
    axes.grid(axis="x", alpha=0.3)
    return figure


def validation_curves(curves: Mapping[str, Sequence[Sequence[float]]]):
    """Draw the validation accuracy against epochs, the mean over the seeds of each row."""
    figure, axes = subplots(figsize=(8, 4.4))
    for i, (title, of_seeds) in enumerate(curves.items()):
        means = [100 * statistics.fmean(values) for values in zip(*of_seeds, strict=True)]
        style = "--" if i >= len(COLOURS) else "-"
        axes.plot(range(1, len(means) + 1), means, style, marker="o", ms=3, lw=1.5, color=COLOURS[i % len(COLOURS)], label=title)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8, ncols=2 if len(curves) > 8 else 1)
    return figure


def reliability(tables: Mapping[str, Sequence[Sequence[Sequence[float]]]]):
    """Draw the accuracy against the confidence, over all seeds of each row.

    Args:
        tables: for each row and seed, the number of images in each bin of the confidence, the sum
            of their confidences, and the number of right ones.
    """
    figure, axes = subplots(figsize=(8, 4.6))
    axes.plot([0, 100], [0, 100], color="#212529", lw=1)
    for i, (title, of_seeds) in enumerate(tables.items()):
        counts, confidences, right = ([sum(bins) for bins in zip(*quantity, strict=True)] for quantity in zip(*of_seeds, strict=True))
        points = [(100 * c / n, 100 * r / n) for n, c, r in zip(counts, confidences, right, strict=True) if n >= 10]
        if points:
            style = "--" if i >= len(COLOURS) else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", ms=3, lw=1.5, color=COLOURS[i % len(COLOURS)], label=title)
    axes.set_xlabel("confidence, %")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def tuning_curves(tuning: Mapping[str, Mapping[str, Sequence[float | None]]]):
    """Draw the validation accuracy against the weight, a panel for each row.

    Args:
        tuning: for each row, the candidates (as ``at:beta=10``) and the accuracies of their seeds.
    """
    columns = min(4, len(tuning))
    lines = -(-len(tuning) // columns)
    figure, axes = subplots(lines, columns, figsize=(2.7 * columns + 0.6, 2.3 * lines), squeeze=False, sharey=False)
    for ax, (title, group) in zip(axes.flat, tuning.items(), strict=False):
        labels = [candidate.rpartition("=")[2] for candidate in group]
        for i, values in enumerate(group.values()):
            known = [100 * value for value in values if value is not None]
            ax.scatter([i] * len(known), known, s=14, color="#868e96")
        means = [100 * statistics.fmean(v for v in values if v is not None) if None not in values else math.nan for values in group.values()]
        ax.plot(range(len(means)), means, "o-", color="#4c6ef5", lw=1.5, ms=4)
        ax.set_xticks(range(len(labels)), labels, fontsize=8)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(next(iter(group)).rpartition("=")[0].rpartition(":")[2], fontsize=8)
        ax.grid(alpha=0.3)
    for ax in axes.flat[len(tuning) :]:
        ax.axis("off")
    figure.supylabel("validation accuracy, %", fontsize=9)
    return figure
