"""``report.html`` of the demo: a single file with embedded pictures that loads nothing else."""

from __future__ import annotations

import html
from datetime import datetime
from pathlib import Path

import torch

from .. import config
from ..files import replaced_atomically
from ..plots.demo import accuracy_curves, loss_times, sample_images
from ..plots.page import STYLE, image_tag
from .demo_results import STAGES, STUDENT_WIDTH, TEACHER_WIDTH, mean_and_spread, summary


def write_report(path: Path, results: dict, data, seeds: int) -> Path:
    """Write the page, completely or not at all, and return its path."""
    rows = "".join(
        f"<tr><td>{html.escape(title)}</td><td>{mean_and_spread(values).replace('+-', '&plusmn;')}</td>"
        + "".join(f"<td>{v:.2f}</td>" for v in values)
        + "</tr>"
        for title, values in summary(results, seeds)
    )
    curves = {stage.title: [results["stages"][f"{stage.name}/{seed}"]["curve"] for seed in range(seeds)] for stage in STAGES}
    info = config.build_info()
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>kdkernels demo</title><style>{STYLE}</style></head><body>
<h1>Distilling a small CNN through temperature_kl</h1>
<p>A teacher (TinyCNN, width {TEACHER_WIDTH}) and a student (width {STUDENT_WIDTH}) on ClutterDigits:
{data.sizes["train"]:,} training images of 3&times;32&times;32. The student is trained on the
labels alone, then again, from the same initial weights, with the teacher's softened predictions (T = 4, 0.1 cross-entropy + 0.9 T&sup2; KL).
{"<b>Quick run on few images: the accuracies mean nothing.</b>" if results["settings"]["quick"] else ""}</p>
<h2>Test accuracy, %</h2>
<table><tr><th></th><th>mean &plusmn; std</th>{"".join(f"<th>seed {i}</th>" for i in range(seeds))}</tr>{rows}</table>
<h2>Validation accuracy after each epoch</h2>
{image_tag(accuracy_curves(curves), "validation accuracy of teacher, student alone and student distilled against epochs")}
<h2>Time of the loss, forward + backward</h2>
<table><tr><th>logits</th><th>fused, ms</th><th>reference, ms</th><th>torch.compile, ms</th>
<th>reference / fused</th><th>torch.compile / fused</th></tr>
{_bench_rows(results["bench"])}</table>
{image_tag(loss_times(results["bench"]), "time of reference and torch.compile relative to the fused op")}
<h2>The images</h2>
{image_tag(sample_images(data), "eight images and the masks of their digits")}
<p class="note">{datetime.now():%Y-%m-%d %H:%M}, kdkernels {info["version"]}, torch {html.escape(info["torch"])}, CPU kernels {info["cpu_isa"]},
{torch.get_num_threads()} threads. Ratios are medians over interleaved rounds in one process.</p>
</body></html>
"""
    with replaced_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _bench_rows(bench: dict) -> str:
    def cell(value: float | None, form: str) -> str:
        return f"<td>{format(value, form) if value is not None else '&ndash;'}</td>"

    lines = []
    for name, row in bench.items():
        times, ratios = row["milliseconds"], row["ratios"]
        cells = [cell(times.get(k), ".3f") for k in ("fused", "reference", "compiled")] + [
            cell(ratios.get(k), ".1f") for k in ("reference", "compiled")
        ]
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    return "\n".join(lines)
