"""The HTML report of ``kdkernels quantify``."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..analysis import TrainingKnowledge
from ..files import replaced_atomically
from ..plots.knowledge import concept_curves, concept_maps
from ..plots.page import STYLE, image_tag


def write_report(
    path: Path,
    results: Mapping[str, TrainingKnowledge],
    table: list[dict[str, Any]],
    accuracies: Mapping[str, float],
    settings: Mapping[str, Any],
    images: Tensor,
    mask: Tensor,
    total: int,
) -> Path:
    """Write a self-contained HTML page."""
    names = list(results)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{html.escape(row['quantity'])}</td>"
        + "".join(f"<td>{row[name]:.3f}</td>" for name in names)
        + f"<td>{row['difference']:+.3f}</td><td>{_interval(row['interval'])}</td></tr>"
        for row in table
    )
    accuracy = ", ".join(f"{html.escape(name)} {100 * value:.2f} %" for name, value in accuracies.items())
    ends = " and ".join(f"{result.distances[-1]:.2f} for the {html.escape(name)}" for name, result in results.items())
    used = ", ".join(f"{html.escape(name)} {html.escape(str(value))}" for name, value in settings.items())
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>What the student knows</title><style>{STYLE}</style></head><body>
<h1>What the student knows, compared with the baseline</h1>
<p>The method is that of Cheng et al., <i>Explaining Knowledge Distillation by Quantifying the Knowledge</i> (CVPR 2020). Noise is added to blocks of
an image, as much as the feature of the analysed layer does not notice. A block of small entropy is one whose information the layer keeps. A block is
a <b>visual concept</b> if its entropy is smaller than the mean of the background by more than a threshold.</p>
<p>{len(images)} of {total} images are analysed: those whose foreground has the smaller mean entropy at all late checkpoints of both trainings.
{"Test accuracy: " + accuracy + "." if accuracy else ""}</p>
<h2>Quantities</h2>
<p>Concepts are those of the last checkpoint. The paper's hypotheses: distillation makes a network learn more concepts of the foreground and a larger
share of them (1), all at once, so that D<sub>mean</sub> and D<sub>std</sub> are small (2), and along a steadier path, so that rho is large (3).</p>
<table><tr><th>mean over images</th>{head}<th>difference</th><th>95 % interval</th></tr>{rows}</table>
<h2>Concepts through the epochs</h2>
<p>For each image, the upper row is the {html.escape(names[0])} and the lower row the {html.escape(names[1])}. Frames are concepts; the numbers are
those in the foreground + in the background. The line in the image is the edge of the foreground.</p>
{image_tag(concept_maps(results, images, mask), "entropies of the blocks of some images through the epochs")}
<h2>Curves</h2>
<p class="note">The weight distance is the length of the path of the layer's weights relative to their first norm; it ends at
{ends}. Thin lines are images.</p>
{image_tag(concept_curves(results), "numbers of concepts against the weight distance")}
<p class="note">Settings: {used}.</p>
</body></html>
"""
    with replaced_atomically(path) as temporary:
        temporary.write_text(page)
    return path


def _interval(interval: list[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"
