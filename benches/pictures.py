"""Log-log plots of the sweeps: time and memory of each contender, and the limit, against a size."""

from __future__ import annotations

import io
from pathlib import Path

from kdkernels.files import replaced_atomically

from .tables import CONTENDER_LABELS, rows_of, share_of_limit

COLOURS = {
    "fused": "#e8590c",
    "eager": "#868e96",
    "Inductor": "#4c6ef5",
    "textbook": "#adb5bd",
    "Inductor textbook": "#91a7ff",
    "linear in torch": "#2b8a3e",
    "Inductor linear": "#69db7c",
    "linalg.svd": "#adb5bd",
    "eigh": "#4c6ef5",
    "svd_lowrank": "#2b8a3e",
    "power iteration": "#9c36b5",
}


def sweeps_of(result: dict) -> dict[str, dict[str, list[dict]]]:
    """Return a dict from op to a dict from sweep to its rows in order."""
    found: dict[str, dict[str, list[dict]]] = {}
    for row in rows_of(result):
        if "sweep" in row:
            found.setdefault(row["op"], {}).setdefault(row["sweep"], []).append(row)
    return {op: {name: sorted(rows, key=lambda r: r["at"]) for name, rows in sweeps.items()} for op, sweeps in found.items()}


def draw(sweeps: dict[str, list[dict]], title: str):
    """Draw a figure with a column for each sweep: time above memory."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "kdkernels"
    matplotlib.rcParams["svg.fonttype"] = "none"
    import matplotlib.pyplot as plt
    from matplotlib.artist import Artist

    figure, axes = plt.subplots(2, len(sweeps), figsize=(4.1 * len(sweeps), 6.2), layout="constrained", squeeze=False, sharex="col")
    legend: dict[str, Artist] = {}
    for column, (name, rows) in enumerate(sweeps.items()):
        time, memory = axes[0, column], axes[1, column]
        at = [row["at"] for row in rows]
        for contender in dict.fromkeys(c for row in rows for c in row["seconds"]):
            style = dict(color=COLOURS.get(contender, "#000000"), marker="o", ms=3.5, lw=1.8 if contender == "fused" else 1.1)
            points = [(row["at"], 1e3 * row["seconds"][contender]) for row in rows if contender in row["seconds"]]
            (line,) = time.plot(*zip(*points, strict=True), **style)
            legend.setdefault(CONTENDER_LABELS.get(contender, contender), line)
            # On a CPU, less than a megabyte cannot be distinguished from zero.
            memory_points = [(row["at"], row["memory"][contender] / 1e6) for row in rows if (row.get("memory", {}).get(contender) or 0) >= 1 << 20]
            if memory_points:
                memory.plot(*zip(*memory_points, strict=True), **style)
        limits = [(row["at"], 1e3 * share[1] * row["seconds"]["fused"]) for row in rows if (share := share_of_limit(row))]
        if limits:
            (line,) = time.plot(*zip(*limits, strict=True), color="black", ls="--", lw=1)
            legend.setdefault("limit", line)
        (line,) = memory.plot(at, [row["inputs"] / 1e6 for row in rows], color="black", ls=":", lw=1)
        legend.setdefault("size of the inputs", line)
        for axis in (time, memory):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(at, [f"{v:g}" for v in at], rotation=45 if max(at) >= 1000 else 0)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        memory.set_xlabel(name)
    axes[0, 0].set_ylabel("forward + backward, ms")
    axes[1, 0].set_ylabel("peak of extra memory, MB")
    figure.legend(list(legend.values()), list(legend), loc="outside lower center", ncols=min(len(legend), 4), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    return figure


def title_of(op: str, result: dict) -> str:
    first = next(row for row in rows_of(result) if row["op"] == op and "sweep" in row)
    return f"{op}: {first['machine']}, {first['threads']} threads, torch {first['torch']}, commit {first['commit']}"


def write_pictures(result: dict, folder: Path) -> list[Path]:
    """Write <op>_sweeps.svg and .png of each op with sweeps; each file completely or not at all."""
    import matplotlib.pyplot as plt

    written = []
    for op, sweeps in sweeps_of(result).items():
        figure = draw(sweeps, title_of(op, result))
        for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 110, "metadata": {"Software": None}})):
            path = folder / f"{op}_sweeps.{kind}"
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, **options)
            with replaced_atomically(path) as temporary:
                temporary.write_bytes(buffer.getvalue())
            written.append(path)
        plt.close(figure)
    return written
