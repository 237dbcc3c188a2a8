"""Timing contenders side by side: interleaved in random order, compared by the ratios of a round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

Call = Callable[[], object]


class Prepared(NamedTuple):
    """A contender of which only the second half is timed: ``run(prepare())``."""

    prepare: Callable[[], object]
    run: Callable[[object], object]


class Ratio(NamedTuple):
    """How many times as long one contender takes as another: the median over the rounds, and the 95 % interval of that median."""

    median: float
    low: float
    high: float


def time_interleaved(
    contenders: dict[str, Call | Prepared],
    *,
    seconds: float = 1.0,
    rounds: int = 200,
    seed: int = 0,
    warmup: int = 3,
    device: str | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call, round by round. All contenders run once per round, in random order, for at most ``seconds`` in all, and at least five
    rounds, after ``warmup`` calls of each. On a GPU the time between two events on the stream, the queue empty before.

    Args:
        contenders: name to call, or to :class:`Prepared`.
        device: "cpu" or "cuda"; by default "cuda" where there is one.
    """
    gpu = torch.cuda.is_available() if device is None else device == "cuda"
    once = _once_on_gpu if gpu else _once
    pairs = {name: c if isinstance(c, Prepared) else Prepared(lambda: None, lambda _, c=c: c()) for name, c in contenders.items()}
    order = list(pairs)
    shuffle = random.Random(seed).shuffle
    for prepare, run in pairs.values():  # warm-up, compilation
        for _ in range(warmup):
            run(prepare())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds
    for i in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(once(*pairs[name]))
        if i >= 4 and time.perf_counter() > deadline:
            break
    return times


def _once(prepare: Callable[[], object], run: Callable[[object], object]) -> float:
    prepared = prepare()
    start = time.perf_counter()
    run(prepared)
    return time.perf_counter() - start


def _once_on_gpu(prepare: Callable[[], object], run: Callable[[object], object]) -> float:
    prepared = prepare()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(prepared)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over the rounds of time(slow) / time(fast)."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def ratio_interval(times: dict[str, list[float]], slow: str, fast: str, *, resamples: int = 1000, seed: int = 0) -> Ratio:
    """:func:`ratio`, with the interval that 95 % of its bootstrap resamples lie in: rounds are drawn with replacement, and the median taken again."""
    ratios = torch.tensor([a / b for a, b in zip(times[slow], times[fast], strict=True)], dtype=torch.float64)
    drawn = torch.randint(len(ratios), (resamples, len(ratios)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(ratios[drawn].median(1).values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    median = statistics.median(ratios.tolist())
    return Ratio(median, min(low, median), max(high, median))


def forward_backward(loss: Callable[..., torch.Tensor], student: torch.Tensor, *others) -> Callable[[], None]:
    """A call of loss(student, *others).backward() with a fresh gradient, as in a training step; it frees its own gradient, not its neighbour's."""

    def run() -> None:
        loss(student, *others).backward()
        for x in (student, *others):
            x.grad = None

    return run
