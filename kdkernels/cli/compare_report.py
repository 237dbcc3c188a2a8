"""The HTML report of ``kdkernels compare``: a single file that loads nothing else."""

from __future__ import annotations

import html
import statistics
from pathlib import Path
from typing import Any

from ..files import replaced_atomically
from ..plots.comparison import accuracy_differences, reliability, tuning_curves, validation_curves
from ..plots.page import STYLE, image_tag
from .comparison.methods import METHODS

WIDE = "body { max-width: 68rem } .wide { font-size: .82rem; white-space: nowrap } .wide th, .wide td { padding: .3rem .55rem }"


def write_report(path: Path, comparison: dict[str, Any], before: str = "", after: str = "", title: str = "Distillation methods compared") -> Path:
    """Write the page, completely or not at all, and return its path.

    ``before`` and ``after`` are HTML at the beginning and the end of the page.
    """
    settings, lines = comparison["settings"], comparison["table"]
    titles = {line["row"]: line["title"] for line in lines}
    trained = {line["row"]: line for line in lines if "mean" in line}
    baseline = comparison["baseline"]
    labelled = settings["labelled"]
    images = f"{settings['training_images']:,} images" if labelled is None else f"{labelled:,} of {settings['training_images']:,} images"
    runs = {titles[row]: comparison["runs"][row] for row in trained}
    pictures = [
        "<h2>Differences</h2>",
        image_tag(
            accuracy_differences([line for line in trained.values() if line["difference"]]), "differences of the test accuracy to the baseline"
        ),
        "<p class='note'>A dot is a seed, the line the 95 % interval of the mean over the seeds.</p>",
        "<h2>Validation accuracy through the epochs</h2>",
        image_tag(validation_curves({name: [run["validation"] for run in found] for name, found in runs.items()}), "validation accuracy by epoch"),
        "<p class='note'>Means over the seeds.</p>",
        "<h2>Calibration</h2>",
        image_tag(reliability({name: [run["reliability"] for run in found] for name, found in runs.items()}), "accuracy against confidence"),
        "<p class='note'>Below the diagonal, the student is more confident than right.</p>",
    ]
    if comparison["tuning"]:
        tuning = {titles[row]: group for row, group in comparison["tuning"].items()}
        pictures += [
            "<h2>Choice of the weights</h2>",
            f"<p>Each weight was trained with {len(comparison['tuning_seeds'])} seeds that are not used in the table; the one with the best mean "
            "validation accuracy after the last epoch was chosen. No test image was used.</p>",
            image_tag(tuning_curves(tuning), "validation accuracy against the weight"),
            _tuning_table(tuning),
        ]
    used = ", ".join(f"{name} {value}" for name, value in settings.items() if name not in ("quick", "classes"))
    versions = ", ".join(f"{name} {version}" for name, version in comparison["versions"].items())
    trained_for = (
        "the weights of a given file" if settings["teacher_weights"] else f"been trained for {_epochs(settings['teacher_epochs'])} on all images"
    )
    cost = ""
    if comparison["cost"]:
        cost = f"A training step has {settings['batch_size']} images; time and peak memory of the process were measured one row at a time."
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}{WIDE}</style></head><body>
<h1>{html.escape(title)}</h1>
{before}
<p>All students ({html.escape(settings["student"])}) were trained for {_epochs(settings["epochs"])} on {images} of
{html.escape(Path(settings["data"]).name)}, with the same optimizer, and for each seed with the same initial weights, images and order.
The teacher ({html.escape(settings["teacher"])}) has {trained_for}.
{"<b>Quick run on few images: the numbers mean nothing.</b>" if settings["quick"] else ""}</p>
<h2>Results</h2>
{_table(comparison)}
<p class="note">Accuracies are those of the test images. Differences are those to “{html.escape(titles[baseline])}” in percentage points, paired
over {len(comparison["seeds"])} seeds, with the 95 % interval and the p-value of a paired t-test; p (Holm) is corrected for the number of rows.
Better: seeds in which the row is better. Fidelity: % of the test images for which student and teacher predict the same class. ECE: expected
calibration error in %, 15 bins. {cost}</p>
{"".join(pictures)}
{after}
<p class="note">Settings: {html.escape(used)}; seeds {html.escape(str(comparison["seeds"]))}; {html.escape(versions)}. All numbers are in
comparison.json.</p>
</body></html>
"""
    with replaced_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _table(comparison: dict[str, Any]) -> str:
    heads = ["", "weight", "accuracy, %", "difference", "95 % interval", "p", "p (Holm)", "better", "fidelity", "ECE"]
    if comparison["cost"]:
        heads += ["step, ms", "step", "MB"]
    teacher = comparison["teacher"]
    accuracies = [100 * run["accuracy"] for run in teacher]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    error = sum(100 * run["calibration_error"] for run in teacher) / len(teacher)
    rows = [_cells(["teacher", "", f"{statistics.mean(accuracies):.2f}{spread}", "", "", "", "", "", "", f"{error:.2f}", "", "", ""][: len(heads)])]
    for line in comparison["table"]:
        weight = _weight(line)
        if "mean" not in line:
            rows.append(_cells([line["title"], weight, f"failed: {line['error']}"]))
            continue
        spread = "" if line["std"] is None else f" ± {line['std']:.2f}"
        cost = comparison["cost"].get(line["row"]) or {}
        difference = line["difference"]
        cells = [line["title"], weight, f"{line['mean']:.2f}{spread}"]
        cells += ["", "", "", "", ""] if difference is None else _difference(difference)
        cells += [f"{line['fidelity']:.2f}", f"{line['calibration_error']:.2f}"]
        cells += [f"{cost['milliseconds']:.1f}", f"{cost['ratio']:.2f}x"] if cost else ["", ""]
        cells.append(f"{cost['megabytes']:.0f}" if cost.get("megabytes") else "")
        rows.append(_cells(cells[: len(heads)]))
    return f"<table class='wide'><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{''.join(rows)}</table>"


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"


def _weight(line: dict[str, Any]) -> str:
    """Return the weight of a row, as ``beta=10``."""
    name = METHODS[line["row"].partition(":")[0]].weight
    return next((part for part in (line["chosen"] or "").split(":") if part.startswith(f"{name}=")), "")


def _difference(difference: dict[str, Any]) -> list[str]:
    better = f"{difference['better']}/{difference['seeds']}"
    if difference["p"] is None:  # one seed, or the same difference in all seeds
        return [f"{difference['mean']:+.2f}", "", "", "", better]
    interval = f"{difference['low']:+.2f} to {difference['high']:+.2f}"
    return [f"{difference['mean']:+.2f}", interval, f"{difference['p']:.2g}", f"{difference['p_holm']:.2g}", better]


def _cells(values: list[str]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(value)}</td>" for value in values) + "</tr>"


def _tuning_table(tuning: dict[str, dict[str, list[float | None]]]) -> str:
    rows = []
    for title, group in tuning.items():
        for candidate, values in group.items():
            known = [100 * value for value in values if value is not None]
            shown = f"{sum(known) / len(known):.2f}" if len(known) == len(values) else "failed"
            rows.append(_cells([title, candidate, shown]))
    return f"<table><tr><th></th><th>row</th><th>validation accuracy, %</th></tr>{''.join(rows)}</table>"
