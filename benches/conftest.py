"""How pytest runs the suite: options, the fixture that measures a row, the JSON, and a table at the end. ``kdkernels bench`` calls it."""

import os

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .machine import processor
from .suite import DEVICE, MODE, Cell, circumstances, measure
from .tables import plain

ROWS: list[dict] = []


class Replay:
    """A timer whose rounds take as long as they are told: pytest-benchmark's statistics are those of the interleaved rounds."""

    def __init__(self):
        self.now, self.ahead = 0.0, iter(())

    def play(self, seconds: list[float]) -> None:
        self.ahead = iter([0.0, *(step for s in seconds for step in (s, 0.0))])

    def __call__(self) -> float:
        self.now += next(self.ahead, 1e-9)
        return self.now


REPLAY = Replay()


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_collection_modifyitems(config, items):
    ops, texts = (os.environ.get(f"KDKERNELS_BENCH_{name}", "").split("\n") for name in ("OPS", "SELECT"))

    def wanted(item) -> bool:
        if not isinstance(item.callspec.params.get("cell"), Cell | None):  # what pytest puts where a quick run has no cell
            return False
        op, name = _name(item)
        return (ops == [""] or op in ops) and any(text in name for text in texts)

    dropped = [item for item in items if not wanted(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY, warmup=False))


def _name(item) -> tuple[str, str]:
    """The op of a row, and the whole name, as comparisons print it."""
    values = item.callspec.params
    cell = values.get("cell")
    op = cell.op.removesuffix("_implementations") if cell is not None else item.path.stem.removeprefix("bench_")
    return op, f"{op}: {cell if cell is not None else values['name']}, {values.get('direction', 'step')}"


def pytest_benchmark_update_machine_info(config, machine_info):
    for key in set(machine_info) - {"machine", "python_version", "cpu"}:  # what a number depends on, not whose machine it is
        del machine_info[key]
    machine_info["cpu"] = {"brand_raw": processor()}


@pytest.fixture
def bench(benchmark: BenchmarkFixture):
    """bench(cell, direction), or bench(row): a row of the table and of the JSON."""

    def run(what: Cell | dict, direction: str | None = None) -> dict:
        row = measure(what, direction) if isinstance(what, Cell) else what
        times = row.pop("times")
        REPLAY.play(times)
        benchmark.pedantic(lambda: None, rounds=len(times))
        benchmark.extra_info.update(row, **circumstances())
        ROWS.append(row)
        return row

    return run


def pytest_terminal_summary(terminalreporter):
    if ROWS:
        about = circumstances()
        smoke = ", smoke run: no timing means anything" if MODE == "smoke" else ""
        terminalreporter.section(f"{about['machine']}, {DEVICE}, commit {about['commit']}{smoke}")
        for line in plain(ROWS):
            terminalreporter.write_line(line)
