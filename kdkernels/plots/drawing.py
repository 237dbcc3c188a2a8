"""What all pictures share: new figures, and files that are whole or not there. Needs matplotlib alone."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def subplots(rows: int = 1, columns: int = 1, **options):
    """``matplotlib.pyplot.subplots`` with a constrained layout, on a backend that needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, layout="constrained", **options)


def close(figure) -> None:
    """Frees a figure: pyplot keeps every figure until then."""
    import matplotlib.pyplot as plt

    plt.close(figure)


def picture_path(out: str | os.PathLike) -> Path:
    """``out`` as a path, once its suffix is known to be a format that can be drawn."""
    out = Path(out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out must end in .png, .svg or .pdf, got {out.name!r}")
    return out


def write_picture(figure, out: Path) -> Path:
    """Writes the figure and closes it. The file is whole or not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        temporary = Path(folder) / out.name
        figure.savefig(temporary, dpi=110)
        os.replace(temporary, out)
    close(figure)
    return out
