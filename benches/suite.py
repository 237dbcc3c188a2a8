"""Measurement of a row of the suite: all contenders for one op on one input in one direction.

First the op is checked against float64 on the inputs that are timed. After a warm-up, all
contenders are timed, interleaved round by round. Ratios are medians over the rounds, with a
bootstrap interval. If a contender fails, its error is recorded in the row, and the other contenders
are still timed.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import pytest
import torch
from torch import Tensor

from .limits import peak_memory, seconds_for
from .machine import commit, machine
from .timing import Prepared, ratio_interval, time_interleaved

# "full": all rows; "quick": the main rows, for a second each; "smoke": all rows on tiny inputs, as
# a test.
MODE = os.environ.get("KDKERNELS_BENCH", "full")
DEVICE = os.environ.get("KDKERNELS_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
SMOKE = MODE == "smoke"
DIRECTIONS = ("forward", "backward", "forward + backward")
Outputs = Tensor | tuple[Tensor, ...]


@dataclass
class Problem:
    """The inputs and the contenders of a cell.

    Args:
        functions: dict from contender to function of the inputs; "fused" is the op, "eager" its
            reference.
        inputs: the inputs; those that get gradients have ``requires_grad``.
        exact: the reference, called with float64 inputs.
        error_inputs: the inputs on which errors are measured, the first samples of ``inputs`` or
            all.
        tolerance: largest errors of "value" and "gradient" of the op, relative to their largest
            entries; AssertionError is raised if an error is larger.
        upstream: gradients of the outputs; ``None`` for a loss.
        moved: number of bytes that must be moved, by direction.
        work: dict from rate (:data:`benches.limits.RATES`) to the amount of work, by direction.
        errors: function from a contender's name to its errors, which replaces the comparison with
            ``exact``.
    """

    functions: dict[str, Callable[..., Outputs]]
    inputs: tuple[Tensor, ...]
    exact: Callable[..., Outputs] | None = None
    error_inputs: tuple[Tensor, ...] | None = None
    tolerance: dict[str, float] = field(default_factory=dict)
    upstream: tuple[Tensor, ...] | None = None
    moved: dict[str, int] = field(default_factory=dict)
    work: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    errors: Callable[[str], dict[str, float]] | None = None


@dataclass(frozen=True)
class Cell:
    """One op on one input.

    Args:
        op: name of the op.
        name: description of the input, unique for the op.
        make: function that builds the problem.
        seconds: time for the rounds of a direction.
        main: whether this is a main row, which a quick run times too.
        sweep, at: name of the sweep that contains this cell, and the value of the varied size.
    """

    op: str
    name: str
    make: Callable[[], Problem]
    seconds: float = 2.0
    main: bool = False
    sweep: str | None = None
    at: float | None = None

    def __str__(self) -> str:
        return self.name


def compiled(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """Return the function compiled by Inductor for the shapes of its first call."""
    return torch.compile(function, dynamic=False)


_compiled_ops: set[str] = set()


def drop_repeated_compilations(op: str, functions: dict[str, Callable]) -> None:
    """Remove the Inductor contenders, except for the first input of each op.

    Each compilation takes seconds, and a smoke run needs only one per op.
    """
    if op in _compiled_ops:
        for name in [name for name in functions if name.startswith("Inductor")]:
            del functions[name]
    _compiled_ops.add(op)


def limit_shape(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    """Return the shape; in a smoke run, with extents of at most ``n``."""
    return tuple(min(extent, n) for extent in shape) if SMOKE else shape


def backward(inputs: tuple[Tensor, ...], outputs: Outputs, upstream: tuple[Tensor, ...] | None) -> None:
    """Compute the gradients of the inputs, and free them."""
    torch.autograd.backward(outputs, upstream)
    for x in inputs:
        x.grad = None


class Measured:
    """A cell with its problem and the errors of its contenders, for the rows of its directions."""

    def __init__(self, cell: Cell):
        torch.manual_seed(0)
        self.cell, self.problem = cell, cell.make()
        if SMOKE:
            drop_repeated_compilations(cell.op, self.problem.functions)
        self.input_sets = self._copy_inputs()
        self.failed: dict[str, str] = {}
        self.errors = self._measure_errors()
        # The first call of each contender; compiled contenders compile here.
        self._for_each_contender(lambda name: (self._unprepared(name, "forward")(), self._unprepared(name, "forward + backward")()))

    def _for_each_contender(self, action: Callable[[str], object]) -> None:
        """Run the action for each contender.

        A contender that fails is removed and its error recorded; the fused op's errors are raised.
        """
        for name in list(self.problem.functions):
            try:
                action(name)
            except Exception as error:
                if name == "fused":
                    raise
                self.failed[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
                del self.problem.functions[name]
                for x in self.problem.inputs:
                    x.grad = None

    def _copy_inputs(self) -> list[tuple[Tensor, ...]]:
        """Return the inputs and, on a GPU, copies of them.

        With the copies, each call reads its inputs from memory and not from the L2 cache. Together
        they exceed twice the size of the cache; there are at most 32.
        """
        inputs = self.problem.inputs
        if DEVICE != "cuda":
            return [inputs]
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return copies_of(inputs, min(32, 1 + 2 * cache // max(1, sum(x.nbytes for x in inputs))))

    def _measure_errors(self) -> dict[str, dict[str, float]]:
        """Measure the errors of each contender, relative to the largest entry of exact results."""
        problem = self.problem
        found: dict[str, dict[str, float]] = {}
        if problem.errors is not None:
            errors_of = problem.errors
            self._for_each_contender(lambda name: found.update({name: errors_of(name)}))
            return found
        inputs = problem.error_inputs or problem.inputs
        all_samples = all(a.shape == b.shape for a, b in zip(inputs, problem.inputs, strict=True))
        values, gradients = value_and_gradients(
            problem.exact, [x.detach().double().requires_grad_(x.requires_grad) for x in inputs], self._upstream(inputs)
        )

        def measure(name: str) -> None:
            # For other shapes Inductor would compile another kernel than the one that is timed.
            if not all_samples and name.startswith("Inductor"):
                return
            v, g = value_and_gradients(
                problem.functions[name], [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs], self._upstream(inputs)
            )
            found[name] = {"value": distance(v, values)} | ({"gradient": distance(g, gradients)} if g else {})

        self._for_each_contender(measure)
        for kind, tolerance in problem.tolerance.items():
            error = found["fused"][kind]
            assert error <= tolerance, f"{self.cell}: the error of the {kind} is {error:.2e}, must be at most {tolerance:.2e}"
        return found

    def _upstream(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Return the gradients of the outputs for ``inputs``, the first samples of the problem."""
        if self.problem.upstream is None:
            return None
        return tuple(g[: len(inputs[0])] for g in self.problem.upstream)

    def call(self, name: str, direction: str) -> Callable[[], object] | Prepared:
        """Return a function that calls a contender, each time with the next copy of the inputs."""
        function, upstream = self.problem.functions[name], self.problem.upstream
        next_inputs = itertools.cycle(self.input_sets).__next__
        if direction == "forward":

            def forward() -> Outputs:
                with torch.no_grad():
                    return function(*next_inputs())

            return forward

        if direction == "backward":

            def prepare() -> tuple[tuple[Tensor, ...], Outputs]:
                inputs = next_inputs()
                return inputs, function(*inputs)

            def run(prepared: object) -> None:
                inputs, outputs = cast(tuple, prepared)
                backward(inputs, outputs, upstream)

            return Prepared(prepare, run)

        def both() -> None:
            inputs = next_inputs()
            backward(inputs, function(*inputs), upstream)

        return both

    def _unprepared(self, name: str, direction: str) -> Callable[[], object]:
        """Return :meth:`call` of a direction other than "backward", which alone is prepared."""
        return cast(Callable[[], object], self.call(name, direction))

    def row(self, direction: str) -> dict:
        """Measure the row of a direction; :mod:`benches.tables` shows it."""
        cell, problem = self.cell, self.problem
        seconds = min(cell.seconds, 1.0) if MODE == "quick" else cell.seconds
        calls = {name: self.call(name, direction) for name in problem.functions}
        row = timed_row(cell.op, cell.name, direction, calls, seconds, main=cell.main) | {
            "failed": self.failed,
            "errors": {name: _of_direction(errors, direction) for name, errors in self.errors.items()},
        }
        if cell.sweep is not None:
            row |= {"sweep": cell.sweep, "at": cell.at}
        limits = {"copy": seconds_for("copy", problem.moved[direction], DEVICE)} if direction in problem.moved else {}
        limits |= {rate: seconds_for(rate, amount, DEVICE) for rate, amount in problem.work.get(direction, {}).items()}
        if limits:
            row |= {"limits": limits, "moved": problem.moved.get(direction)}
        if direction != "backward":
            row["memory"] = {name: peak_memory(cast(Callable[[], object], call), DEVICE) for name, call in calls.items()}
            row["inputs"] = sum(x.nbytes for x in problem.inputs)
            if DEVICE == "cuda":
                row["replayed"] = self._replayed(direction)
        return row

    def _replayed(self, direction: str) -> dict[str, float | str]:
        """Time the replay of a CUDA graph of the calls: their cost without kernel launches.

        Returns the seconds per call, or the error if a contender cannot be captured.
        """
        graphs: dict[str, Callable[[], object]] = {}
        found: dict[str, float | str] = {}
        for name in self.problem.functions:
            if name not in ("fused", "eager", "Inductor"):
                continue
            try:
                graphs[name] = captured(self._unprepared(name, direction), len(self.input_sets))
            except Exception as error:  # host synchronisation, or a solver that cannot be captured
                torch.cuda.synchronize()
                found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if graphs:
            times = time_interleaved(graphs, seconds=0.5, device=DEVICE)
            found.update({name: statistics.median(t) / len(self.input_sets) for name, t in times.items()})
        return found


def timed_row(
    op: str, cell: str, direction: str, calls: Mapping[str, Callable[[], object] | Prepared], seconds: float, *, main: bool = False
) -> dict:
    """Time the contenders together and return their row: names, medians, and ratios to "fused"."""
    times = time_interleaved(calls, seconds=0.01 if SMOKE else seconds, warmup=1, device=DEVICE)
    return row_of(op, cell, direction, times, main=main)


def row_of(op: str, cell: str, direction: str, times: dict[str, list[float]], *, main: bool = False) -> dict:
    return {
        "op": op,
        "cell": cell,
        "direction": direction,
        "main": main,
        "rounds": len(times["fused"]),
        "seconds": {name: statistics.median(t) for name, t in times.items()},
        "ratios": {name: list(ratio_interval(times, name, "fused")) for name in times if name != "fused"},
        "times": times["fused"],
    }


def copies_of(inputs: tuple[Tensor, ...], n: int) -> list[tuple[Tensor, ...]]:
    """Return the inputs and n - 1 copies of them with the same strides."""
    return [inputs, *(tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs) for _ in range(n - 1))]


def captured(call: Callable[[], object], times: int) -> Callable[[], None]:
    """Capture a CUDA graph of ``times`` calls, and return the function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


def value_and_gradients(function, inputs: list[Tensor], upstream) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    outputs = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if not wanted:
        return outputs, ()
    upstream = upstream and [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
    return tuple(o.detach() for o in outputs), torch.autograd.grad(outputs, wanted, upstream)


def distance(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Return the largest difference relative to the largest entry of the exact tensor.

    The result is the maximum over all tensors, or NaN if one of them contains NaN.
    """
    tiny = torch.finfo(torch.float64).tiny
    each = [(a.double() - b).abs().max() / b.abs().max().clamp_min(tiny) for a, b in zip(got, exact, strict=True)]
    return torch.stack(each).max().item()


def _of_direction(errors: dict[str, float], direction: str) -> dict[str, float]:
    kinds = {"forward": ["value"], "backward": ["gradient"]}.get(direction, ["value", "gradient"])
    found = [errors[kind] for kind in kinds if kind in errors]
    error = {"error": math.nan if any(map(math.isnan, found)) else max(found)} if found else {}
    return error | {name: e for name, e in errors.items() if name not in ("value", "gradient")}


_current: list[Measured] = []


def measure(cell: Cell, direction: str) -> dict:
    """Measure the row of a cell in a direction. The cell is kept until another cell is measured."""
    if not _current or _current[0].cell is not cell:
        _current.clear()
        torch._dynamo.reset()
        gc.collect()
        gc.freeze()  # else each later gc.collect() would visit a million objects of imported modules, in 0.3 seconds
        _current.append(Measured(cell))
    return _current[0].row(direction)


def for_cells(cells: list[Cell], directions: tuple[str, ...] = DIRECTIONS):
    """Parametrize a bench by cells and by directions."""

    def decorate(function):
        selected = [c for c in cells if MODE != "quick" or c.main]
        function = pytest.mark.parametrize("cell", selected, ids=str)(function)
        return pytest.mark.parametrize("direction", directions)(function)

    return decorate


@functools.cache
def environment_info() -> dict:
    """Return the machine, the versions and the settings of this run."""
    info = {
        "machine": machine(DEVICE),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": DEVICE,
        "mode": MODE,
    }
    if DEVICE == "cuda":
        import triton

        info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return info
