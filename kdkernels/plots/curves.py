"""Plot of a validation metric and of the training loss of several runs through the epochs."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..tasks import Classification, Segmentation
from .drawing import picture_path, subplots, write_picture

__all__ = ["Curves", "plot_curves"]

LOSS = "train/loss"
# Looked for in this order if no metric is given; the second name is that of the first of several
# validation loaders.
_NAMES = (Classification.main_metric, Segmentation.main_metric, "f1", "lane_iou")
MAIN_METRICS = tuple(f"val/{name}{suffix}" for name in _NAMES for suffix in ("", "/dataloader_idx_0"))


class Curves(NamedTuple):
    """The points of one run, as pairs of epoch and value. The end of an epoch is a whole number."""

    name: str
    metric: list[tuple[float, float]]
    loss: list[tuple[float, float]]


class _Log(NamedTuple):
    """The logged values of one run, by metric and step."""

    name: str
    values: dict[str, dict[int, float]]
    epochs: dict[int, float]  # number of finished epochs at the last step of each epoch


def plot_curves(runs: Sequence[str | os.PathLike], out: str | os.PathLike, metric: str | None = None) -> tuple[Path, str, list[Curves]]:
    """Write a picture of a metric (left) and of the training loss (right) against the epochs.

    The values are read from the CSV logs of ``kdkernels fit``, ``RUN/version_*/metrics.csv``. Each
    time a run is resumed, it writes a new version; versions are joined, and a version replaces the
    steps of the earlier ones from its first step on. Versions without training, which
    ``kdkernels validate`` and ``kdkernels test`` write, are left out.

    Args:
        runs: folders of runs, each a line of the picture with the name of the folder.
        out: file to write.
        metric: column of the logs, for example "val/cross_entropy"; by default the main metric of
            the task, for example "val/accuracy".

    Returns:
        The file, the metric, and the points of each run.

    Raises:
        FileNotFoundError: a folder does not exist, or contains no log.
        ValueError: a log is damaged or does not contain the metric, a run is given twice, or the
            suffix of ``out`` is not a known format.
    """
    out = picture_path(out)
    paths = [Path(run) for run in runs]
    twice = next((path for i, path in enumerate(paths) if path in paths[:i]), None)
    if twice is not None:
        raise ValueError(f"runs: {str(twice)!r} is given twice")
    names = [path.resolve().name for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
    logs = [_read_run(path, name) for path, name in zip(paths, names, strict=True)]
    metric = metric or next((name for name in MAIN_METRICS if all(name in log.values for log in logs)), MAIN_METRICS[0])
    for path, log in zip(paths, logs, strict=True):
        if metric not in log.values:
            raise ValueError(f"metric: the log of {str(path)!r} has no {metric!r}; it has {', '.join(sorted(log.values))}")
    curves = [Curves(log.name, _points(log, metric), _points(log, LOSS)) for log in logs]
    return write_picture(draw(curves, metric), out), metric, curves


def _read_run(run: Path, name: str) -> _Log:
    """Join the logs of all versions of a run."""
    if not run.is_dir():
        raise FileNotFoundError(f"runs: there is no folder {str(run)!r}; give the folder of a run of kdkernels fit, its trainer.default_root_dir")
    files = sorted(run.glob("version_*/metrics.csv"), key=_version) or [file for file in (run / "metrics.csv",) if file.is_file()]
    versions = [(file, _read_log(file)) for file in files]
    trained = [(file, rows) for file, rows in versions if any(name.startswith("train/") for row in rows for name in row)]
    if not trained:
        found = "only logs without a training" if files else "no log"
        raise FileNotFoundError(f"runs: {str(run)!r} contains {found}; kdkernels fit writes one, version_0/metrics.csv, unless trainer.logger is set")
    values: dict[str, dict[int, float]] = {}
    ends: dict[int, int] = {}  # the last step of each epoch
    for _, rows in trained:
        first = int(min(row["step"] for row in rows))
        if min(row["epoch"] for row in rows if "epoch" in row) == 0:  # a new run in the same folder
            first = -1
        values = {metric: {step: value for step, value in logged.items() if step < first} for metric, logged in values.items()}
        ends = {epoch: step for epoch, step in ends.items() if step < first}
        for row in rows:
            step = int(row["step"])
            for metric, value in row.items():
                if metric not in ("step", "epoch"):
                    values.setdefault(metric, {})[step] = value
            if "epoch" in row and any(metric.startswith("train/") for metric in row):
                ends[int(row["epoch"])] = step
    return _Log(name, {metric: logged for metric, logged in values.items() if logged}, {step: epoch + 1 for epoch, step in ends.items()})


def _version(file: Path) -> int:
    number = re.fullmatch(r"version_(\d+)", file.parent.name)
    return int(number.group(1)) if number else -1


def _read_log(file: Path) -> list[dict[str, float]]:
    """Return the rows of a CSV log without their empty cells."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            if "step" not in header:
                raise ValueError(f"the log {str(file)!r} is damaged: its first line must name the columns, among them 'step', got {header}")
            rows = []
            for cells in reader:
                if len(cells) != len(header):
                    found = f"line {reader.line_num} has {len(cells)} columns, the first line {len(header)}"
                    raise ValueError(f"the log {str(file)!r} is damaged: {found}")
                row = {name: float(cell) for name, cell in zip(header, cells, strict=True) if cell}
                if not (math.isfinite(row.get("step", math.nan)) and math.isfinite(row.get("epoch", 0))):
                    raise ValueError(f"the log {str(file)!r} is damaged: line {reader.line_num} has no number of its step or epoch")
                rows.append(row)
            return rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"the log {str(file)!r} is damaged: {error}") from error
    except ValueError as error:
        if "could not convert" not in str(error):
            raise
        raise ValueError(f"the log {str(file)!r} is damaged: line {reader.line_num}: {error}") from error


def _points(log: _Log, metric: str) -> list[tuple[float, float]]:
    """Return epoch and value of each logged step, with fractions of an epoch."""
    steps = sorted(log.values.get(metric, {}))
    ends = {-1: 0.0, **dict(sorted(log.epochs.items()))}
    known, epochs = list(ends), list(ends.values())
    found = np.interp(steps, known, epochs)
    if len(known) > 1:  # validation within an epoch that is not finished: as many steps as in the epoch before it
        rate = (epochs[-1] - epochs[-2]) / (known[-1] - known[-2])
        found = found + np.maximum(np.array(steps) - known[-1], 0) * rate
    return [(float(epoch), log.values[metric][step]) for epoch, step in zip(found, steps, strict=True)]


def draw(curves: Sequence[Curves], metric: str):
    panels = [(metric, [c.metric for c in curves])]
    if any(c.loss for c in curves):
        panels.append((LOSS, [c.loss for c in curves]))
    figure, axes = subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2 + 0.16 * math.ceil(len(curves) / 4)), squeeze=False)
    colours = _colours(len(curves))
    for ax, (title, lines) in zip(axes[0], panels, strict=True):
        for c, points, colour in zip(curves, lines, colours, strict=True):
            ax.plot([x for x, _ in points], [y for _, y in points], "o-", ms=3, lw=1.4, color=colour, label=c.name)
        ax.set_xlabel("epoch")
        ax.set_title(title, fontsize=11)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    values = [y for c in curves for _, y in c.loss if math.isfinite(y)]
    if len(panels) == 2 and values and min(values) > 0 and max(values) > 20 * min(values):
        axes[0, 1].set_yscale("log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(curves)), fontsize=9, frameon=False)
    return figure


def _colours(count: int) -> list:
    """Return distinct colours: for up to ten lines, those of matplotlib's cycle."""
    import matplotlib

    if count <= 10:
        return [f"C{i}" for i in range(count)]
    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * i / (count - 1)) for i in range(count)]


def table(curves: Sequence[Curves], metric: str) -> str:
    """Return the last and the extreme values of the metric as a table of plain text."""
    width = max(5, *(len(c.name) + 2 for c in curves))
    lines = [metric, f"{'run':{width}}{'epochs':>8}{'last':>10}{'highest':>10}{'epoch':>8}{'lowest':>10}{'epoch':>8}"]
    for c in curves:
        finite = [point for point in c.metric if math.isfinite(point[1])] or c.metric
        high, low = max(finite, key=lambda p: p[1]), min(finite, key=lambda p: p[1])
        lines.append(f"{c.name:{width}}{c.metric[-1][0]:>8g}{c.metric[-1][1]:>10.4f}{high[1]:>10.4f}{high[0]:>8g}{low[1]:>10.4f}{low[0]:>8g}")
    return "\n".join(lines)
