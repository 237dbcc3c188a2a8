"""Tables of results for the terminal, docs/performance.md and report.html."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

TITLES = {
    "temperature_kl": "temperature_kl of logits [rows, classes]",
    "attention_pool": "attention_transfer_loss and attention_pool of features [B, C, H, W]",
    "rbf_correlation": "rbf_correlation_loss and rbf_correlation of [B, M, K] and [B, N, K]",
    "truncated_svd": "truncated_svd of feature maps as matrices [spatial positions, channels], batch 128 unless given",
    "truncated_svd_implementations": "Implementations of truncated_svd, and drivers of torch.linalg.svd",
    "svd_kd": "The whole SVD-KD loss on the taps of the paper's networks",
    "teacher_cache": "A training step of KD with the teacher's outputs read from the cache on disk",
    "step": "A whole training step, in parts",
}
CONTENDER_LABELS = {
    "eager": "eager",
    "Inductor": "Inductor",
    "textbook": "textbook form",
    "Inductor textbook": "Inductor of the textbook form",
    "linear in torch": "linear form in torch",
    "Inductor linear": "Inductor of the linear form",
    "eigh": "eigh of the Gram matrix",
    "the teacher run": "with the teacher computed",
}
CONTENDER_ORDER = [*CONTENDER_LABELS, "linalg.svd", "svd_lowrank", "power iteration"]


class Entry(NamedTuple):
    """Text of a table cell, and the number by which it is sorted."""

    text: str
    value: float | None = None


EMPTY = Entry("-")


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[Entry]]


def key_of(row: dict) -> tuple[str, str, str]:
    """Return the key of a row; rows of two files with the same key are the same measurement."""
    return row["op"], row["cell"], row["direction"]


def tables(rows: list[dict]) -> list[Table]:
    """Return a table for each op, without the cells of sweeps."""
    found = []
    for op, title in TITLES.items():
        op_rows = [row for row in rows if row["op"] == op and "sweep" not in row]
        if op_rows:
            found.append(_step_table(title, op_rows) if op == "step" else _table(title, op_rows))
    return found


def contenders_of(rows: list[dict]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in [*row["ratios"], *row.get("failed", {})])
    return sorted(names, key=lambda name: CONTENDER_ORDER.index(name) if name in CONTENDER_ORDER else len(CONTENDER_ORDER))


def _table(title: str, rows: list[dict]) -> Table:
    names = contenders_of(rows)
    columns: list[tuple[str, Callable[[dict], Entry]]] = [
        ("input", lambda row: Entry(row["cell"])),
        ("direction", lambda row: Entry(row["direction"])),
        ("ms", lambda row: _number(1e3 * row["seconds"]["fused"], "{:.3g}")),
        *((CONTENDER_LABELS.get(name, name), lambda row, name=name: _ratio(row, name)) for name in names),
        ("share of the limit", _share),
        ("bytes moved, MB", lambda row: _number(row["moved"] / 1e6, "{:.3g}") if row.get("moved") else EMPTY),
        ("error", lambda row: _error(row, "fused", "error")),
        ("smallest error of a peer", _smallest_peer_error),
        ("sine", lambda row: _error(row, "fused", "sine")),
        ("sine of linalg.svd", lambda row: _error(row, "linalg.svd", "sine")),
        ("sine of eigh", lambda row: _error(row, "eigh", "sine")),
        ("memory, MB", lambda row: _memory(row, "fused")),
        ("memory of eager, MB", lambda row: _memory(row, "eager")),
        ("memory of Inductor, MB", lambda row: _memory(row, "Inductor")),
        ("replayed, ms", lambda row: _replayed(row, "fused")),
        ("eager replayed", lambda row: _replayed(row, "eager")),
        ("Inductor replayed", lambda row: _replayed(row, "Inductor")),
    ]
    cells = [(name, [make(row) for row in rows]) for name, make in columns]
    cells = [(name, column) for name, column in cells if name in ("input", "direction", "ms") or any(c != EMPTY for c in column)]
    return Table(title, [name for name, _ in cells], [list(line) for line in zip(*(column for _, column in cells), strict=True)])


def _step_table(title: str, rows: list[dict]) -> Table:
    parts = list(rows[0]["parts"]["fused"])
    columns = ["input", "ops", "step, ms", *(f"{part}, ms" for part in parts), "share of the loss", "ratio with references"]
    lines = []
    for row in rows:
        for name, label in (("fused", "fused"), ("eager", "references")):
            seconds = row["parts"][name]
            share = seconds["loss"] / sum(seconds.values())
            lines.append(
                [Entry(row["cell"]), Entry(label), _number(1e3 * row["seconds"][name], "{:.4g}")]
                + [_number(1e3 * seconds[part], "{:.3g}") for part in parts]
                + [Entry(f"{100 * share:.1f} %", share), _ratio(row, "eager") if name == "fused" else EMPTY]
            )
    return Table(title, columns, lines)


def _number(value: float, form: str) -> Entry:
    return Entry(form.format(value), value)


def _ratio(row: dict, name: str) -> Entry:
    if name in row.get("failed", {}):
        return Entry(f"failed: {row['failed'][name].split(':')[0]}")
    if name not in row["ratios"]:
        return EMPTY
    median, low, high = row["ratios"][name]
    return Entry(f"{short(median)}x ({short(low)} to {short(high)})", median)


def short(x: float) -> str:
    """Format a ratio, with two decimals if it is small."""
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def _share(row: dict) -> Entry:
    share = share_of_limit(row)
    return EMPTY if share is None else Entry(f"{100 * share[1]:.0f} % {share[0]}", share[1])


def share_of_limit(row: dict) -> tuple[str, float] | None:
    """Return the longest limit, and the ratio of its time to the time of the fused op."""
    if not row.get("limits"):
        return None
    name, seconds = max(row["limits"].items(), key=lambda item: item[1])
    return name, seconds / row["seconds"]["fused"]


def _error(row: dict, name: str, kind: str) -> Entry:
    value = row.get("errors", {}).get(name, {}).get(kind)
    return EMPTY if value is None else Entry(f"{value:.0e}", value)


def _smallest_peer_error(row: dict) -> Entry:
    others = [e["error"] for name, e in row.get("errors", {}).items() if name != "fused" and not math.isnan(e.get("error", math.nan))]
    return Entry(f"{min(others):.0e}", min(others)) if others else EMPTY


def _memory(row: dict, name: str) -> Entry:
    value = row.get("memory", {}).get(name)
    if value is None:
        return EMPTY
    floor = 0 if row.get("device") == "cuda" else 1 << 20  # the resolution of the measurement
    return Entry("< 1" if value < floor else f"{value / 1e6:.3g}", value)


def _replayed(row: dict, name: str) -> Entry:
    value = row.get("replayed", {}).get(name)
    if value is None:
        return EMPTY
    if isinstance(value, str):
        return Entry(f"failed: {value.split(':')[0]}")
    fused = row["replayed"].get("fused")
    if name == "fused" or not isinstance(fused, float):
        return Entry(f"{1e3 * value:.3g}", value)
    return Entry(f"{short(value / fused)}x", value / fused)


def plain(rows: list[dict]) -> list[str]:
    """Return the lines of all tables for a terminal."""
    return [line for table in [*tables(rows), *_sweep_table(rows)] for line in ["", table.title, *aligned(table)]]


def aligned(table: Table) -> list[str]:
    """Return the lines of a table for a terminal, in columns. The first two columns are words."""
    texts = [table.columns, *([cell.text for cell in line] for line in table.rows)]
    widths = [max(len(line[i]) for line in texts) for i in range(len(table.columns))]
    return ["  ".join(t.ljust(w) if i < 2 else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths, strict=True))) for line in texts]


def _sweep_table(rows: list[dict]) -> list[Table]:
    sweep_rows = [row for row in rows if "sweep" in row]
    return [_table("Sweeps", sweep_rows)] if sweep_rows else []


def markdown(table: Table) -> list[str]:
    return [
        "| " + " | ".join(table.columns) + " |",
        "|" + "---|" * len(table.columns),
        *("| " + " | ".join(cell.text for cell in line) + " |" for line in table.rows),
    ]


def load(path: str | os.PathLike) -> dict:
    """Load a file of results, as pytest-benchmark writes it.

    Raises:
        ValueError: the file was not written by this suite.
        OSError: the file cannot be read.
    """
    try:
        result = json.loads(Path(path).read_text())
        for row in rows_of(result):
            key_of(row), row["seconds"]["fused"], row["ratios"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not a file of results of this suite: {type(error).__name__} {error}") from error
    return result


def rows_of(result: dict) -> list[dict]:
    return [benchmark["extra_info"] for benchmark in result["benchmarks"]]


def about(result: dict) -> str:
    """Return a line with the machine, versions, commits and date of a file of results."""
    rows = rows_of(result)
    first = rows[0]
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    device = first.get("gpu") or result["machine_info"]["cpu"].get("brand_raw", first["machine"])
    versions = f"torch {first['torch']}" + (f", triton {first['triton']}, CUDA {first['cuda']}" if "cuda" in first else "")
    threads = f", {first['threads']} threads" if first["device"] == "cpu" else ""
    return f"{device}{threads}, {versions}, commit {' and '.join(f'`{c}`' for c in commits)}, {result['datetime'][:10]}"
