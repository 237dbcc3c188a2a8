"""Measures what binds the ops on a CPU: bytes, arithmetic, the start of threads, or dispatch.

python -m benches.cpu_profile --out FILE

For each main row of the suite and some small ones, forward + backward: the time on all threads and
on one; the time of the same call on a few numbers, which is Python, torch's dispatcher and
autograd; and the time to copy the bytes that the op must move. The start of the threads is timed
without any op. `python -m benches.performance` shows the file as a table.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kdkernels.files import replaced_atomically

from . import bench_attention_pool, bench_rbf_correlation, bench_temperature_kl, bench_truncated_svd
from .limits import copy_seconds
from .suite import DEVICE, SMOKE, Cell, Problem, backward, environment_info
from .timing import Prepared, time_interleaved

CELLS: list[Cell] = [
    *bench_temperature_kl.CELLS[:5],
    *bench_attention_pool.CELLS[:5],
    *bench_rbf_correlation.CELLS[:3],
    *(cell for cell in bench_truncated_svd.CELLS if cell.main),
]
FEW = 4  # the extents of the inputs whose time is that of Python, dispatch and autograd


def few(x: Tensor) -> Tensor:
    """Return the first numbers of a tensor, with the same layout."""
    return x.detach()[tuple(slice(0, FEW) for _ in x.shape)].clone().requires_grad_(x.requires_grad)


def step(problem: Problem, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """Return the forward and the backward pass of the fused op."""
    fused, upstream = problem.functions["fused"], None
    if problem.upstream is not None:
        upstream = tuple(torch.ones_like(y) for y in fused(*inputs))
    return lambda: backward(inputs, fused(*inputs), upstream)


def on_threads(count: int, run: Callable[[], object]) -> Prepared:
    return Prepared(lambda: torch.set_num_threads(count), lambda _: run())


def profile(cell: Cell) -> dict:
    """Measure a cell: seconds of each kind."""
    torch.manual_seed(0)
    problem = cell.make()
    threads = torch.get_num_threads()
    calls = {
        "all threads": on_threads(threads, step(problem, problem.inputs)),
        "one thread": on_threads(1, step(problem, problem.inputs)),
        "few numbers": on_threads(threads, step(problem, tuple(map(few, problem.inputs)))),
    }
    try:
        times = time_interleaved(calls, seconds=0.01 if SMOKE else max(1.0, cell.seconds / 2), rounds=100, device="cpu")
    finally:
        torch.set_num_threads(threads)
    row = {"op": cell.op, "cell": cell.name, "seconds": {name: statistics.median(t) for name, t in times.items()}}
    moved = problem.moved.get("forward + backward")
    return row | {"copy": None if moved is None else copy_seconds(moved // 2, "cpu")}


def thread_start(pause: float) -> float | None:
    """Measure the seconds in which an empty function runs on all threads, less those on one thread.

    Before each run, the threads have been idle for ``pause`` seconds. ``None`` if torch does not
    use GNU's OpenMP runtime.
    """
    maps = Path("/proc/self/maps")
    found = [line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line] if maps.exists() else []
    if not found:
        return None
    parallel = ctypes.CDLL(found[0]).GOMP_parallel
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing

    def median(threads: int) -> float:
        times = []
        for _ in range(5 if SMOKE else 50):
            deadline = time.perf_counter() + pause
            while time.perf_counter() < deadline:
                pass
            start = time.perf_counter()
            parallel(nothing, None, threads, 0)
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    median(torch.get_num_threads())  # creates the threads
    return median(torch.get_num_threads()) - median(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.cpu_profile", description="Measure what binds the ops on a CPU.")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    out = parser.parse_args().out
    if DEVICE != "cpu":
        parser.error("set KDKERNELS_BENCH_DEVICE=cpu: the inputs would be on the GPU")
    result = {
        "environment": environment_info(),
        "thread start": {"right after other work": thread_start(0.0), "after 20 ms of one thread": thread_start(0.02)},
        "rows": [profile(cell) for cell in CELLS],
    }
    with replaced_atomically(out) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
