"""Helpers for all plots: figures and their files."""

from __future__ import annotations

import os
from pathlib import Path

from ..files import replaced_atomically


def subplots(rows: int = 1, columns: int = 1, **options):
    """Call ``matplotlib.pyplot.subplots`` with a constrained layout, without using a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, layout="constrained", **options)


def new_figure(**options):
    """Return an empty figure with a constrained layout, without using a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.figure(layout="constrained", **options)


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
    with replaced_atomically(out) as temporary:
        figure.savefig(temporary, dpi=110)
    close(figure)
    return out
