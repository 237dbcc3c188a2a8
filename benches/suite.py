"""A row of the suite: one op on one input in one direction, all contenders side by side.

First the gate (the op against float64 on the inputs that are timed), then warm-up, then all contenders interleaved round by round; ratios are
medians over the rounds, with a bootstrap interval. A contender that fails is named in its cell, and the others go on.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from .limits import peak_memory, seconds_for
from .machine import commit, machine
from .timing import Prepared, ratio_interval, time_interleaved

MODE = os.environ.get("KDKERNELS_BENCH", "full")  # "full"; "quick": the main rows, briefly; "smoke": tiny inputs, shows that all of it runs
DEVICE = os.environ.get("KDKERNELS_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
SMOKE = MODE == "smoke"
DIRECTIONS = ("forward", "backward", "forward + backward")
Outputs = Tensor | tuple[Tensor, ...]


@dataclass
class Problem:
    """The inputs and the contenders of a cell.

    Args:
        functions: contender to function of the inputs; "fused" is the op, "eager" its reference.
        inputs: those that get gradients require them.
        exact: the reference, for float64.
        few: the inputs that errors are measured on, the first samples of `inputs` or all of them.
        tolerance: of "value" and "gradient" relative to their largest number; wider than it and the row is not timed.
        upstream: gradients of the outputs; None for a loss.
        moved: bytes that must move, by direction.
        work: rate (:data:`benches.limits.RATES`) to amount of it that must be done, by direction.
        errors: measures the errors of a contender in another way: name to number.
    """

    functions: dict[str, Callable[..., Outputs]]
    inputs: tuple[Tensor, ...]
    exact: Callable[..., Outputs] | None = None
    few: tuple[Tensor, ...] | None = None
    tolerance: dict[str, float] = field(default_factory=dict)
    upstream: tuple[Tensor, ...] | None = None
    moved: dict[str, int] = field(default_factory=dict)
    work: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: Callable[[str], dict[str, float]] | None = None


@dataclass(frozen=True)
class Cell:
    """One op on one input.

    Args:
        op: stem of the op.
        name: what the input is; unique for the op.
        make: builds it.
        seconds: how long the rounds of a direction may take.
        main: one of targets' rows, which a quick run times too.
        sweep, at: the sweep this is a point of, and where.
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
    """The function compiled by Inductor for the shapes of its first call."""
    return torch.compile(function, dynamic=False)


_compiled_ops: set[str] = set()


def drop_repeated_compilations(op: str, functions: dict[str, Callable]) -> None:
    """Remove Inductor's contenders, except from the first input of each op: each compilation takes seconds, which tell a smoke run nothing."""
    if op in _compiled_ops:
        for name in [name for name in functions if name.startswith("Inductor")]:
            del functions[name]
    _compiled_ops.add(op)


def at_most(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    """The shape, or in a smoke run a small one of its kind."""
    return tuple(min(extent, n) for extent in shape) if SMOKE else shape


class Measured:
    """A cell that is built: contenders that run, errors, memory. Kept for the rows of the cell's directions."""

    def __init__(self, cell: Cell):
        torch.manual_seed(0)
        self.cell, self.problem = cell, cell.make()
        if SMOKE:
            drop_repeated_compilations(cell.op, self.problem.functions)
        self.sets = self._rotation()
        self.failed: dict[str, str] = {}
        self.errors = self._gate()
        # A first look at each contender; the compiled ones compile here.
        self._try(lambda name: (self.call(name, "forward")(), self.call(name, "forward + backward")()))

    def _try(self, action: Callable[[str], object]) -> None:
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

    def _rotation(self) -> list[tuple[Tensor, ...]]:
        """On a GPU as many copies of the inputs as together outgrow the L2 cache twice, at most 32: each call finds its own in memory."""
        inputs = self.problem.inputs
        if DEVICE != "cuda":
            return [inputs]
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        return copies_of(inputs, min(32, 1 + 2 * cache // max(1, sum(x.nbytes for x in inputs))))

    def _gate(self) -> dict[str, dict[str, float]]:
        """Errors of each contender: relative to the largest number of the exact value and of the exact gradient."""
        problem = self.problem
        if problem.errors is not None:
            found: dict[str, dict[str, float]] = {}
            self._try(lambda name: found.update({name: problem.errors(name)}))
            return found
        few = problem.few or problem.inputs
        whole = all(a.shape == b.shape for a, b in zip(few, problem.inputs, strict=True))
        values, gradients = value_and_gradients(
            problem.exact, [x.detach().double().requires_grad_(x.requires_grad) for x in few], self._upstream(few)
        )
        found = {}

        def measure(name: str) -> None:
            if not whole and name.startswith("Inductor"):  # would be compiled for another shape, and be another kernel
                return
            v, g = value_and_gradients(
                problem.functions[name], [x.detach().clone().requires_grad_(x.requires_grad) for x in few], self._upstream(few)
            )
            found[name] = {"value": distance(v, values)} | ({"gradient": distance(g, gradients)} if g else {})

        self._try(measure)
        for what, allowed in problem.tolerance.items():
            assert found["fused"][what] <= allowed, f"{self.cell}: the error of the {what} is {found['fused'][what]:.2e}, allowed {allowed:.2e}"
        return found

    def _upstream(self, few: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.problem.upstream is None:
            return None
        return tuple(g[: len(few[0])] for g in self.problem.upstream)

    def call(self, name: str, direction: str) -> Callable[[], object] | Prepared:
        """A call of a contender, each time on the next set of inputs."""
        function, upstream = self.problem.functions[name], self.problem.upstream
        following = itertools.cycle(self.sets).__next__
        if direction == "forward":

            def forward() -> Outputs:
                with torch.no_grad():
                    return function(*following())

            return forward

        def back(inputs: tuple[Tensor, ...], outputs: Outputs) -> None:
            torch.autograd.backward(outputs, upstream)
            for x in inputs:
                x.grad = None

        if direction == "backward":

            def prepare() -> tuple:
                inputs = following()
                return inputs, function(*inputs)

            return Prepared(prepare, lambda prepared: back(*prepared))

        def both() -> None:
            inputs = following()
            back(inputs, function(*inputs))

        return both

    def row(self, direction: str) -> dict:
        """What is told of a direction, see :mod:`benches.tables`."""
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
            row["memory"] = {name: peak_memory(call, DEVICE) for name, call in calls.items()}
            row["inputs"] = sum(x.nbytes for x in problem.inputs)
            if DEVICE == "cuda":
                row["replayed"] = self._replayed(direction)
        return row

    def _replayed(self, direction: str) -> dict[str, float | str]:
        """Seconds of a call when a CUDA graph of one call on each set of inputs is replayed: what it costs without its launches."""
        graphs, found = {}, {}
        for name in self.problem.functions:
            if name not in ("fused", "eager", "Inductor"):
                continue
            try:
                graphs[name] = captured(self.call(name, direction), len(self.sets))
            except Exception as error:  # a host sync, or a solver that cannot be captured
                torch.cuda.synchronize()
                found[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if graphs:
            times = time_interleaved(graphs, seconds=0.5, device=DEVICE)
            found |= {name: statistics.median(t) / len(self.sets) for name, t in times.items()}
        return found


def timed_row(op: str, cell: str, direction: str, calls: dict[str, Callable | Prepared], seconds: float, *, main: bool = False) -> dict:
    """Names, medians, and ratios to "fused" of contenders that are timed together."""
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
    """The inputs, and n - 1 copies of them with the same strides."""
    return [inputs, *(tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs) for _ in range(n - 1))]


def captured(call: Callable[[], object], times: int) -> Callable[[], None]:
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
    """The largest difference, relative to the largest number; the worst of several tensors; NaN where one of them holds a NaN."""
    tiny = torch.finfo(torch.float64).tiny
    each = [(a.double() - b).abs().max() / b.abs().max().clamp_min(tiny) for a, b in zip(got, exact, strict=True)]
    return torch.stack(each).max().item()


def _of_direction(errors: dict[str, float], direction: str) -> dict[str, float]:
    wanted = {"forward": ["value"], "backward": ["gradient"]}.get(direction, ["value", "gradient"])
    found = [errors[w] for w in wanted if w in errors]
    own = {"error": math.nan if any(map(math.isnan, found)) else max(found)} if found else {}
    return own | {name: e for name, e in errors.items() if name not in ("value", "gradient")}


_current: list[Measured] = []


def measure(cell: Cell, direction: str) -> dict:
    """The row of a cell in a direction. A cell stays built until another one is measured."""
    if not _current or _current[0].cell is not cell:
        _current.clear()
        gc.collect()
        torch._dynamo.reset()
        _current.append(Measured(cell))
    return _current[0].row(direction)


def over(cells: list[Cell], directions: tuple[str, ...] = DIRECTIONS):
    """Parametrizes a bench by cells and, for each, by directions."""

    def decorate(function):
        chosen = [c for c in cells if MODE != "quick" or c.main]
        function = pytest.mark.parametrize("cell", chosen, ids=str)(function)
        return pytest.mark.parametrize("direction", directions)(function)

    return decorate


@functools.cache
def circumstances() -> dict:
    """Where and with what the rows were measured."""
    about = {
        "machine": machine(DEVICE),
        "commit": commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": DEVICE,
        "mode": MODE,
    }
    if DEVICE == "cuda":
        import triton

        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return about
