"""Plot of the accuracy of a network with exits against its computation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..distill.exit_curve import THRESHOLDS, CurvePoint, exit_curve
from ..distill.exit_network import with_exits
from .checkpoints import restore_with_images
from .drawing import picture_path, subplots, write_picture

__all__ = ["plot_exits"]


def plot_exits(ckpt: str | os.PathLike, out: str | os.PathLike, thresholds: Sequence[float] = THRESHOLDS) -> tuple[Path, list[CurvePoint]]:
    """Write a picture of accuracy against operations, for the validation images of a run.

    It shows each exit, the whole network, the ensemble, and adaptive depth for each threshold.

    Args:
        ckpt: checkpoint of BYOT or DeepSupervision.
        out: file to write.
        thresholds: confidences in [0, 1] at which adaptive depth stops.

    Returns:
        The file, and the points of the picture.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: it has no exits or no config of its run, a threshold is out of range, or the
            suffix of ``out`` is not a known format.
    """
    out = picture_path(out)
    method, data = restore_with_images(ckpt)
    network = with_exits(method, ckpt).eval()
    points = exit_curve(network, map(data.finish, data.val_dataloader()), thresholds)
    return write_picture(draw(points), out), points


def draw(points: Sequence[CurvePoint]):
    figure, ax = subplots(figsize=(7, 4.2))
    adaptive = [p for p in points if p.name.startswith("threshold")]
    fixed = [p for p in points if p not in adaptive]
    ax.plot([p.operations / 1e6 for p in adaptive], [100 * p.accuracy for p in adaptive], "o-", color="tab:blue", ms=4, label="adaptive depth")
    for point in (adaptive[0], adaptive[-1]) if adaptive else ():
        position = (point.operations / 1e6, 100 * point.accuracy)
        ax.annotate(point.name.removeprefix("threshold "), position, (4, -11), textcoords="offset points", fontsize=8)
    ax.plot([p.operations / 1e6 for p in fixed], [100 * p.accuracy for p in fixed], "s", color="tab:orange", label="one exit, or the ensemble")
    for point in fixed:
        ax.annotate(point.name, (point.operations / 1e6, 100 * point.accuracy), (5, 5), textcoords="offset points", fontsize=9)
    ax.set_xlabel("million floating-point operations per image")
    ax.set_ylabel("validation accuracy in %")
    ax.margins(x=0.2, y=0.12)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    return figure


def table(points: Sequence[CurvePoint]) -> str:
    """Return the points as a table of plain text."""
    count = len(points[0].shares)
    exits = [f"exit {i}" for i in range(1, count)] + ["end"]
    lines = [f"{'inference':16}{'accuracy':>10}{'MFLOP':>10}   " + "".join(f"{name:>8}" for name in exits)]
    for p in points:
        lines.append(f"{p.name:16}{p.accuracy:>10.4f}{p.operations / 1e6:>10.3f}   " + "".join(f"{share:>8.1%}" for share in p.shares))
    return "\n".join(lines)
