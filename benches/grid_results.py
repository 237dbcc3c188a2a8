"""The results of the search for worst cells: the file grid.json, and its tables.

The file contains the environment of the last run and rows. A row is a cell in one direction.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from .tables import CONTENDER_LABELS, EMPTY, TITLES, Entry, Table, key_of, short

FUNCTIONS = {"attention_pool": "attention_transfer_loss", "rbf_correlation": "rbf_correlation_loss"}  # measured for these ops
LOST = 1 / 1.1  # the fused op is more than a tenth slower than the peer
TARGET = 2.0  # smallest ratio of the cells of a group


def load(path: str | os.PathLike) -> dict:
    """Load a file of :func:`benches.grid.measure_grid`.

    Raises:
        ValueError: the file was not written by it.
        OSError: the file cannot be read.
    """
    try:
        result = json.loads(Path(path).read_text())
        result["environment"]["machine"], result["environment"]["mode"], result["environment"]["threads"]
        for row in result["rows"]:
            key_of(row), row["seconds"]["fused"], row["ratio"], row["counted"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not a file of worst cells: {type(error).__name__} {error}") from error
    return result


def merged(earlier: list[dict], fresh: list[dict]) -> list[dict]:
    """Replace earlier rows by fresh rows of the same name, and append the other fresh rows."""
    return list(({key_of(row): row for row in earlier} | {key_of(row): row for row in fresh}).values())


def is_lost(row: dict) -> bool:
    """Whether the fused op is slower than a peer, beyond the noise of the measurement."""
    return row["ratio"] < LOST


def is_inaccurate(row: dict) -> bool:
    """Whether the fused op has an error that is larger than the tests allow, or not finite."""
    return any(error is None or error > 1 for error in row["errors"]["fused"].values())


def ops_of(rows: list[dict]) -> list[str]:
    return [op for op in TITLES if any(row["op"] == op for row in rows)]


def summary(rows: list[dict]) -> list[str]:
    """Return sentences with the number of rows of an op, and of those that are lost."""
    cells = {row["cell"] for row in rows}
    lost = [row for row in rows if is_lost(row)]
    lines = [f"{len(cells)} cells, {len(rows)} rows, {len(lost)} lost (ratio below {LOST:.2f})."]
    for group in dict.fromkeys(row["group"] for row in rows if row.get("group")):
        ratios = [row["ratio"] for row in rows if row.get("group") == group]
        below = sum(ratio < TARGET for ratio in ratios)
        lines.append(f"Of the {len(ratios)} rows with {group}, {below} have a ratio below {TARGET:g}.")
    inaccurate = sum(map(is_inaccurate, rows))
    if inaccurate:
        lines.append(f"In {inaccurate} rows, the fused op is less accurate than the tests allow.")
    return lines


def worst(rows: list[dict], n: int = 10) -> list[dict]:
    """Return the ``n`` rows of the smallest ratios, the smallest first."""
    return sorted(rows, key=lambda row: row["ratio"])[:n]


def worst_table(rows: list[dict], n: int = 10) -> Table:
    """Return the table of the worst rows of one op, with the times of all contenders."""
    chosen = worst(rows, n)
    peers = list(dict.fromkeys(name for row in rows for name in [*row["seconds"], *row["failed"]] if name != "fused"))
    columns = ["input", "direction", "fused, ms", *(f"{CONTENDER_LABELS.get(name, name)}, ms" for name in peers), "ratio"]
    lines = [
        [Entry(row["cell"]), Entry(row["direction"]), _milliseconds(row, "fused"), *(_milliseconds(row, name) for name in peers), _ratio(row)]
        for row in chosen
    ]
    return Table("", columns, lines)


def _milliseconds(row: dict, name: str) -> Entry:
    if name in row["failed"]:
        return Entry(f"failed: {row['failed'][name].split(':')[0]}")
    if name not in row["seconds"]:
        return EMPTY
    value = 1e3 * row["seconds"][name]
    return Entry(f"{value:.3g}" if name in ("fused", *row["counted"]) else f"({value:.3g})", value)


def _ratio(row: dict) -> Entry:
    text = f"{short(row['ratio'])}x"
    return Entry(text if row["counted"] else f"({text})", row["ratio"])


def about(result: dict) -> str:
    """Return a line with the machine, versions, commits and date of a result."""
    environment = result["environment"]
    commits = list(dict.fromkeys(row["commit"] for row in result["rows"]))
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    return (
        f"{environment['processor']}, {threads}, torch {environment['torch']}, "
        f"commit {' and '.join(f'`{commit}`' for commit in commits)}, {environment['date']}"
    )
