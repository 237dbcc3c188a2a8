"""``report.html`` of the demo: the comparison of the methods, and the ops at work."""

from __future__ import annotations

import html
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .. import config
from ..models import load_weights
from ..plots.demo import loss_times, ops_at_work, sample_images
from ..plots.page import image_tag
from .compare_report import write_report
from .comparison.networks import network_from
from .comparison.runs import TEACHER, Settings, data_of, run_path


def write_demo(path: Path, comparison: dict[str, Any], times: dict[str, Any], folder: Path, settings: Settings) -> Path:
    """Write the page, completely or not at all, and return its path."""
    data = data_of(settings)
    teacher = network_from(settings.teacher, TEACHER, 10)
    load_weights(teacher, run_path(folder, TEACHER, comparison["seeds"][0]).with_suffix(".pt"))
    info = config.build_info()
    before = f"""<p>Four methods distil the same teacher into the same small student. KD uses <b>temperature_kl</b>, AT
<b>attention_transfer_loss</b>, and SVD-KD <b>truncated_svd</b> and <b>rbf_correlation_loss</b>.</p>
<h2>The images</h2>
{image_tag(sample_images(data), "eight images and the masks of their digits")}
<h2>What the ops compute</h2>
{image_tag(ops_at_work(teacher, data), "softened probabilities, attention maps, singular vectors and an RBF correlation of one image")}
<p class="note">The teacher's outputs for one test image. Top left: its probabilities at three temperatures; <b>temperature_kl</b> compares them
with the student's. Top right: <b>attention_pool</b>, the mean square over the channels of each layer. Bottom left: the spatial vectors of the
largest singular values of the last layer, from <b>truncated_svd</b>. Bottom right: <b>rbf_correlation</b> of the channel vectors of two layers,
which SVD-KD compares.</p>"""
    after = f"""<h2>Time of the ops, forward + backward</h2>
<table><tr><th>op and shape</th><th>fused, ms</th><th>reference, ms</th><th>torch.compile, ms</th>
<th>reference / fused</th><th>torch.compile / fused</th></tr>
{_time_rows(times)}</table>
{image_tag(loss_times(times), "time of reference and torch.compile relative to the fused op")}
<p class="note">{datetime.now():%Y-%m-%d %H:%M}, CPU kernels {info["cpu_isa"]}, {torch.get_num_threads()} threads. Ratios are medians over interleaved
rounds in one process.</p>"""
    return write_report(path, comparison, before, after, title="kdkernels: four methods and four ops")


def _time_rows(times: dict[str, Any]) -> str:
    def cell(value: float | None, form: str) -> str:
        return f"<td>{format(value, form) if value is not None else '&ndash;'}</td>"

    lines = []
    for name, row in times.items():
        milliseconds, ratios = row["milliseconds"], row["ratios"]
        cells = [cell(milliseconds.get(k), ".3f") for k in ("fused", "reference", "compiled")]
        cells += [cell(ratios.get(k), ".1f") for k in ("reference", "compiled")]
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    return "\n".join(lines)
