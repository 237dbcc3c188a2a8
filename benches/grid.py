"""The search for the worst cells: the inputs on which an op is slowest relative to its peers.

All cells of a grid are measured (:mod:`benches.grid_cells`), and the cells are sorted by the time
of the fastest peer divided by the time of the fused op. Only peers that are as accurate as the
fused op count. ``kdkernels bench --worst`` runs this module.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from kdkernels.files import replaced_atomically

from .grid_cells import FORWARD, Comparison, Errors, GridCell, cells_of, require_gradients
from .grid_results import merged
from .machine import commit, machine, processor
from .timing import forward_backward, ratio, time_interleaved

SLACK = 3  # a peer whose errors are at most this many times those of the fused op is as accurate
SAVE_EVERY = 10.0  # seconds


def environment(threads: int, smoke: bool = False) -> dict:
    """Return the machine, the versions and the settings of a run."""
    return {
        "machine": machine("cpu"),
        "processor": processor(),
        "torch": torch.__version__,
        "threads": threads,
        "device": "cpu",
        "mode": "smoke" if smoke else "full",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def peers_that_count(errors: dict[str, Errors]) -> list[str]:
    """Return the peers that are as accurate as the fused op.

    A peer is as accurate if all its errors are at most 1, which means that it passes the tests of
    the op, or if each is at most :data:`SLACK` times that of the fused op. NaN is never accurate.
    """
    fused = errors["fused"]
    peers = {name: found for name, found in errors.items() if name != "fused"}
    return [
        name
        for name, found in peers.items()
        if all(error <= 1 for error in found.values()) or all(error <= SLACK * fused[kind] for kind, error in found.items())
    ]


def fastest_peer(seconds: dict[str, float], counted: Sequence[str]) -> str:
    """Return the fastest of the peers that count; if none counts, the first peer."""
    peers = [name for name in seconds if name != "fused"]
    return min(counted, key=lambda name: seconds[name]) if counted else peers[0]


def measure(cell: GridCell, comparison: Comparison, direction: str, seconds: float) -> dict:
    """Measure the row of a cell in a direction.

    Raises:
        RuntimeError: the fused op or all of its peers failed.
    """
    errors, failed = _errors(comparison, direction)
    if "fused" in failed or len(errors) == 1:
        raise RuntimeError(f"{cell.op}: {cell.name}, {direction}: {failed.get('fused', failed)}")
    calls = {name: _call(comparison, name, direction) for name in errors}
    times = time_interleaved(calls, seconds=seconds, warmup=1, device="cpu")
    medians = {name: statistics.median(t) for name, t in times.items()}
    counted = peers_that_count(errors)
    peer = fastest_peer(medians, counted)
    return {
        "op": cell.op,
        "cell": cell.name,
        "direction": direction,
        "rounds": len(times["fused"]),
        "seconds": medians,
        "ratio": ratio(times, peer, "fused"),
        "peer": peer,
        "counted": counted,
        "errors": {name: {kind: error if math.isfinite(error) else None for kind, error in found.items()} for name, found in errors.items()},
        "failed": failed,
    } | ({"group": cell.group} if cell.group else {})


def _errors(comparison: Comparison, direction: str) -> tuple[dict[str, Errors], dict[str, str]]:
    """Return the errors of the contenders, and the messages of those that failed."""
    errors: dict[str, Errors] = {}
    failed: dict[str, str] = {}
    for name, function in comparison.contenders.items():
        try:
            errors[name] = comparison.errors(function, direction)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
    return errors, failed


def _call(comparison: Comparison, name: str, direction: str) -> Callable[[], object]:
    function, inputs = comparison.contenders[name], comparison.inputs
    if direction == FORWARD:
        return lambda: function(*inputs)
    return forward_backward(function, *require_gradients(inputs, comparison.gradients))


def rows_of_cell(cell: GridCell, directions: Sequence[str], seconds: float) -> list[dict]:
    """Measure the rows of a cell."""
    torch._dynamo.reset()  # else Inductor would stop compiling after eight cells
    gc.collect()
    comparison = cell.make()
    return [measure(cell, comparison, direction, seconds) for direction in directions]


def selected(op: str, texts: Sequence[str] = (), smoke: bool = False) -> list[tuple[GridCell, list[str]]]:
    """Return the cells of an op, each with the directions for which "op: cell, direction" contains
    one of the texts.
    """
    found = [(cell, [d for d in cell.directions if not texts or any(t in f"{op}: {cell.name}, {d}" for t in texts)]) for cell in cells_of(op, smoke)]
    return [(cell, directions) for cell, directions in found if directions]


def measure_grid(
    op: str,
    path: Path,
    earlier: list[dict],
    *,
    select: Sequence[str] = (),
    threads: int = 1,
    smoke: bool = False,
) -> list[dict]:
    """Measure the cells of an op, and write their rows together with earlier ones.

    The file is replaced every ten seconds and at the end, also after an error or Ctrl-C. Measured
    rows replace earlier rows of the same name. If all cells of the op are measured, other earlier
    rows of the op are dropped at the end.

    Args:
        op: name of the op.
        path: the file, grid.json.
        earlier: the rows that the file contains already.
        select: texts of which "op: cell, direction" must contain one.
        threads: number of threads of torch and of the fused op.
        smoke: measure two tiny cells for a moment.

    Returns:
        All rows of the file.
    """
    fresh: list[dict] = []
    about, saved = environment(threads, smoke), time.monotonic()
    try:
        with _threads(threads):
            for cell, directions in selected(op, select, smoke):
                rows = rows_of_cell(cell, directions, 0.005 if smoke else 0.25)
                fresh += [row | {"commit": about["commit"]} for row in rows]
                if time.monotonic() > saved + SAVE_EVERY:
                    _save(path, about, merged(earlier, fresh))
                    saved = time.monotonic()
        if not select:
            earlier = [row for row in earlier if row["op"] != op]
    finally:
        if fresh:
            _save(path, about, merged(earlier, fresh))
    return merged(earlier, fresh)


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _save(path: Path, about: dict, rows: list[dict]) -> None:
    with replaced_atomically(path) as temporary:
        temporary.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
