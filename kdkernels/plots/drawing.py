"""Helpers for all plots: figures, and files that are written completely or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def subplots(rows: int = 1, columns: int = 1, **options):
    """Call ``matplotlib.pyplot.subplots`` with a constrained layout, without using a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, layout="constrained", **options)


def close(figure) -> None:
    """Free a figure: pyplot keeps each figure until it is closed."""
    import matplotlib.pyplot as plt

    plt.close(figure)


def picture_path(out: str | os.PathLike) -> Path:
    """Return ``out`` as a path; raise ValueError if its suffix is not a supported format."""
    out = Path(out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out must end in .png, .svg or .pdf, got {out.name!r}")
    return out


def write_picture(figure, out: Path) -> Path:
    """Write the figure, completely or not at all, and close it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        temporary = Path(folder) / out.name
        figure.savefig(temporary, dpi=110)
        os.replace(temporary, out)
    close(figure)
    return out
