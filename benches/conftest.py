"""pytest configuration of the suite: selection of rows, the fixture that measures a row, the JSON
file, and the table at the end. ``kdkernels bench`` runs pytest with it.
"""

import gc
import os
from collections.abc import Iterator
from typing import cast

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .machine import processor
from .suite import DEVICE, MODE, Cell, environment_info, measure
from .tables import plain

ROWS: list[dict] = []


class ReplayTimer:
    """Timer for pytest-benchmark that replays given durations.

    pytest-benchmark then computes its statistics of the interleaved rounds, which are measured
    before.
    """

    def __init__(self):
        self.now = 0.0
        self.increments: Iterator[float] = iter(())

    def play(self, seconds: list[float]) -> None:
        self.increments = iter([0.0, *(step for s in seconds for step in (s, 0.0))])

    def __call__(self) -> float:
        self.now += next(self.increments, 1e-9)
        return self.now


TIMER = ReplayTimer()


def pytest_unconfigure():
    gc.unfreeze()  # suite.py freezes what exists


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_collection_modifyitems(config, items):
    ops, texts = (os.environ.get(f"KDKERNELS_BENCH_{name}", "").split("\n") for name in ("OPS", "SELECT"))

    def is_selected(item) -> bool:
        if not isinstance(item.callspec.params.get("cell"), Cell | None):  # pytest's placeholder if a quick run has no cell of this bench
            return False
        op, name = _name(item)
        return (ops == [""] or op in ops) and any(text in name for text in texts)

    deselected = [item for item in items if not is_selected(item)]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=TIMER, warmup=False))


def _name(item) -> tuple[str, str]:
    """Return the op of a row, and the full name of the row as in comparisons."""
    values = item.callspec.params
    cell = values.get("cell")
    op = cell.op.removesuffix("_implementations") if cell is not None else item.path.stem.removeprefix("bench_")
    return op, f"{op}: {cell if cell is not None else values['name']}, {values.get('direction', 'step')}"


def pytest_benchmark_update_machine_info(config, machine_info):
    # Keep only the entries on which results depend, and none that identify the machine.
    for key in set(machine_info) - {"machine", "python_version", "cpu"}:
        del machine_info[key]
    machine_info["cpu"] = {"brand_raw": processor()}


@pytest.fixture
def bench(benchmark: BenchmarkFixture):
    """Function ``bench(cell, direction)`` or ``bench(row)`` that adds a row to the table and the
    JSON.
    """

    def run(cell_or_row: Cell | dict, direction: str | None = None) -> dict:
        row = measure(cell_or_row, cast(str, direction)) if isinstance(cell_or_row, Cell) else cell_or_row
        times = row.pop("times")
        TIMER.play(times)
        benchmark.pedantic(lambda: None, rounds=len(times))
        benchmark.extra_info.update(row, **environment_info())
        ROWS.append(row)
        return row

    return run


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        about = environment_info()
        smoke = ", smoke run: no timing means anything" if MODE == "smoke" else ""
        terminalreporter.section(f"{about['machine']}, {DEVICE}, commit {about['commit']}{smoke}")
        for line in plain(ROWS):
            terminalreporter.write_line(line)
