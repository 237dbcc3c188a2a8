"""What the benches share: one table at the end, the copy bandwidth of this machine, and a smoke mode for CI."""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the benches time the tests' inputs
SMOKE = os.environ.get("KDKERNELS_BENCH_SMOKE") == "1"  # tiny inputs: shows that every bench runs, and its gate holds
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS: list[dict] = []


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch._dynamo.reset()


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")
    torch.set_num_threads(min(2, os.cpu_count() or 1))


KEPT = ("machine", "python_version", "cpu")  # of the machine: what a number depends on, not whose it is


def pytest_benchmark_update_machine_info(config, machine_info):
    for key in set(machine_info) - set(KEPT):
        del machine_info[key]


def copy_seconds(nbytes: int) -> float:
    """Median time to copy a tensor of nbytes: twice nbytes move."""
    from kdkernels.timing import time_interleaved

    source = torch.randn(max(1, nbytes // 4), device=DEVICE)
    target = torch.empty_like(source)
    return statistics.median(time_interleaved({"copy": lambda: target.copy_(source)}, seconds=0.3)["copy"])


@pytest.fixture
def report(benchmark):
    """report(name, ours, times, **columns): a row of the table, and of the JSON that pytest-benchmark writes."""

    def add(name: str, ours, times: dict[str, list[float]], **columns) -> None:
        from kdkernels.timing import ratio

        row = {"name": name, "ms": 1e3 * statistics.median(times["fused"])}
        row |= {f"vs {other}": ratio(times, other, "fused") for other in times if other != "fused"}
        row |= columns
        benchmark.extra_info.update(row, machine=_machine(), commit=_commit(), torch=torch.__version__, threads=torch.get_num_threads())
        benchmark.pedantic(ours, rounds=3, warmup_rounds=0)
        ROWS.append(row)

    return add


def pytest_terminal_summary(terminalreporter):
    columns = list(dict.fromkeys(key for row in ROWS for key in row))
    cells = [columns, *([_cell(row.get(c)) for c in columns] for row in ROWS)]
    if not ROWS:
        return
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    terminalreporter.section(f"{_machine()}, {DEVICE}, commit {_commit()}" + (", smoke run: no timing means anything" if SMOKE else ""))
    for line in cells:
        terminalreporter.write_line(
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        )


def _cell(value) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def _machine() -> str:
    from machine import machine

    return machine()


def _commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return run.stdout.strip() or "unknown"
