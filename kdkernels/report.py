"""report.html of the demo: one file, pictures inside, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
import os
from datetime import datetime
from pathlib import Path

import torch

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; color: #1d2433; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #d8dde6 } th:first-child, td:first-child { text-align: left }
img { max-width: 100%; height: auto } .note { color: #5a6475; font-size: .9rem }
"""
COLOURS = {"teacher": "#4c6ef5", "student_alone": "#868e96", "student_distilled": "#e8590c"}


def write_report(path: Path, results: dict, data, seeds: int) -> Path:
    """Writes the page as a whole or not at all; returns its path."""
    from . import config, demo

    rows = "".join(
        f"<tr><td>{html.escape(title)}</td><td>{demo.mean_and_spread(values).replace('+-', '&plusmn;')}</td>"
        + "".join(f"<td>{v:.2f}</td>" for v in values)
        + "</tr>"
        for title, values in demo.summary(results, seeds)
    )
    info = config.build_info()
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>kdkernels demo</title><style>{STYLE}</style></head><body>
<h1>Distilling a small CNN through temperature_kl</h1>
<p>A teacher (TinyCNN, width {demo.TEACHER_WIDTH}) and a student (width {demo.STUDENT_WIDTH}) on ClutterDigits:
{data.sizes["train"]:,} training images of 3&times;32&times;32. The student is trained on the
labels alone, then again, from the same initial weights, with the teacher's softened predictions (T = 4, 0.1 cross-entropy + 0.9 T&sup2; KL).
{"<b>Quick run: the numbers mean nothing.</b>" if results["settings"]["quick"] else ""}</p>
<h2>Test accuracy, %</h2>
<table><tr><th></th><th>mean &plusmn; std</th>{"".join(f"<th>seed {i}</th>" for i in range(seeds))}</tr>{rows}</table>
<h2>Validation accuracy by epoch</h2>
{_picture(_curves(results, seeds), "validation accuracy of teacher, student alone and student distilled against epochs")}
<h2>The loss: forward + backward</h2>
<table><tr><th>logits</th><th>fused, ms</th><th>reference, ms</th><th>torch.compile, ms</th>
<th>reference / fused</th><th>torch.compile / fused</th></tr>
{_bench_rows(results["bench"])}</table>
{_picture(_bench_bars(results["bench"]), "time of reference and torch.compile relative to the fused op")}
<h2>The images</h2>
{_picture(_samples(data), "eight images and the masks of their digits")}
<p class="note">{datetime.now():%Y-%m-%d %H:%M}, kdkernels {info["version"]}, torch {html.escape(info["torch"])}, CPU kernels {info["cpu_isa"]},
{torch.get_num_threads()} threads. Ratios are medians over interleaved rounds in one process.</p>
</body></html>
"""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
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


def _figure(*args, **kwargs):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*args, layout="constrained", **kwargs)


def _curves(results: dict, seeds: int):
    from .demo import STAGES

    figure, axes = _figure(figsize=(8, 4.2))
    for stage in STAGES:
        curves = [results["stages"][f"{stage.name}/{seed}"]["curve"] for seed in range(seeds)]
        for i, curve in enumerate(curves):
            epochs = range(1, len(curve) + 1)
            axes.plot(
                epochs, [100 * v for v in curve], "o-", ms=3, lw=1.2, alpha=0.85, color=COLOURS[stage.name], label=stage.title if i == 0 else None
            )
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy, %")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def _bench_bars(bench: dict):
    figure, axes = _figure(figsize=(8, 0.8 + 0.9 * len(bench)))
    for i, row in enumerate(bench.values()):
        for k, (other, colour) in enumerate((("reference", "#868e96"), ("compiled", "#4c6ef5"))):
            if other in row["ratios"]:
                bar = axes.barh(
                    i + 0.36 * k - 0.18,
                    row["ratios"][other],
                    0.34,
                    color=colour,
                    label={"compiled": "torch.compile"}.get(other, other) if i == 0 else None,
                )
                axes.bar_label(bar, fmt="%.1fx", padding=3)
    axes.axvline(1, color="#e8590c", lw=1.5, label="fused")
    axes.set_yticks(range(len(bench)), list(bench))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("time relative to the fused op")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _samples(data):
    images, count = data.splits["test"].fields, 8
    figure, axes = _figure(2, count, figsize=(9, 2.6))
    for i in range(count):
        axes[0, i].imshow(images["image"][i].permute(1, 2, 0).numpy())
        axes[0, i].set_title(str(int(images["label"][i])), fontsize=10)
        axes[1, i].imshow(images["mask"][i].numpy(), cmap="gray")
    for ax in axes.flat:
        ax.axis("off")
    return figure


def _picture(figure, description: str) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
