"""Collect comparisons of ``kdkernels compare`` as results of this machine, and draw the picture of
the README.

Usage: python benches/comparison.py NAME=FOLDER [NAME=FOLDER ...] [--out FILE.json] [--picture FILE]

Each folder is the ``--out`` of a comparison. Of each training, the accuracy is kept, but not its
curve and its confusion matrix.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdkernels.benches.machine import commit, machine

from kdkernels.plots.drawing import subplots, write_picture


def collect(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return the comparisons by name, without what is large."""
    found = {}
    for name, folder in folders.items():
        comparison = json.loads((folder / "comparison.json").read_text())
        comparison["teacher"] = [100 * run["accuracy"] for run in comparison["teacher"]]
        comparison["commit"] = commit()
        del comparison["runs"]
        found[name] = comparison
    return found


def markdown(comparison: Mapping[str, Any]) -> str:
    """Return the table of a comparison for the docs: accuracies and differences in %."""
    lines = ["| row | weight | test accuracy | difference | 95 % interval | p (Holm) | better |", "|---|---|---|---|---|---|---|"]
    teacher = comparison["teacher"]
    lines.append(f"| teacher | | {statistics.mean(teacher):.2f} ± {statistics.stdev(teacher):.2f} | | | | |")
    for line in comparison["table"]:
        given, chosen = (set(text.split(":")[1:]) for text in (line["row"], line["chosen"]))
        weight = ", ".join(sorted(chosen - given))
        weight = weight or next((part for part in line["row"].split(":")[1:] if part.startswith(("alpha", "beta", "gamma"))), "")
        difference = line["difference"]
        cells = [line["title"], f"`{weight}`" if weight else "", f"{line['mean']:.2f} ± {line['std']:.2f}"]
        if difference is None:
            cells += ["", "", "", ""]
        else:
            known = difference["p"] is not None
            cells += [f"{difference['mean']:+.2f}", f"{difference['low']:+.2f} to {difference['high']:+.2f}" if known else ""]
            cells.append(f"{difference['p_holm']:.2g}" if known else "")
            cells.append(f"{difference['better']} of {difference['seeds']}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(line.replace("|  |", "| |").replace("|  |", "| |") for line in lines)


def draw(comparisons: Mapping[str, Any], rows: Mapping[str, str]):
    """Draw the differences of some rows, a panel for each comparison.

    Args:
        comparisons: of :func:`collect`.
        rows: names in the picture by the titles of rows.
    """
    figure, axes = subplots(1, len(comparisons), figsize=(4.4 * len(comparisons) + 1, 0.9 + 0.36 * len(rows)), squeeze=False, sharey=True)
    for ax, (name, comparison) in zip(axes[0], comparisons.items(), strict=True):
        lines = {line["title"]: line for line in comparison["table"]}
        for i, row in enumerate(rows):
            if row not in lines or lines[row]["difference"] is None:
                continue
            difference = lines[row]["difference"]
            colour = "#4c6ef5"
            if difference["low"] is not None:
                colour = "#2f9e44" if difference["low"] > 0 else "#c92a2a" if difference["high"] < 0 else colour
                ax.plot([difference["low"], difference["high"]], [i, i], color=colour, lw=3, zorder=3, solid_capstyle="butt")
            ax.scatter(lines[row]["differences"], [i] * len(lines[row]["differences"]), s=9, color="#adb5bd", zorder=2)
            ax.plot(difference["mean"], i, "D", ms=5, color=colour, zorder=4)
        ax.axvline(0, color="#212529", lw=1)
        ax.set_title(name, fontsize=10)
        ax.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(rows)), list(rows.values()), fontsize=9)
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel("test accuracy minus that of the student alone, percentage points", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparisons", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=Path(f"benches/results/{machine('cpu')}/comparison.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/comparison.png"))
    parser.add_argument("--rows", nargs="*", default=[], help="TITLE=NAME of the rows of the picture; by default all rows")
    options = parser.parse_args()
    found = collect({name: Path(folder) for name, _, folder in (text.partition("=") for text in options.comparisons)})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    rows = {title: name for title, _, name in (text.rpartition("=") for text in options.rows)}
    if not rows:
        rows = {line["title"]: line["title"] for comparison in found.values() for line in comparison["table"] if line["difference"]}
    write_picture(draw(found, rows), options.picture)
    for name, comparison in found.items():
        print(f"{name}\n\n{markdown(comparison)}\n")


if __name__ == "__main__":
    main()
