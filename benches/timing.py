"""Timing of contenders: interleaved in random order, and compared by the ratios of each round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Call = Callable[[], object]


class Prepared(NamedTuple):
    """A contender ``run(prepare())`` of which only ``run`` is timed."""

    prepare: Callable[[], object]
    run: Callable[[object], object]


class Ratio(NamedTuple):
    """Ratio of the times of two contenders: median over the rounds, and its 95 % interval."""

    median: float
    low: float
    high: float


def time_interleaved(
    contenders: Mapping[str, Call | Prepared],
    *,
    seconds: float = 1.0,
    rounds: int = 200,
    seed: int = 0,
    warmup: int = 3,
    device: str | None = None,
) -> dict[str, list[float]]:
    """Time the contenders, each once per round in random order.

    On a GPU, the time between two events on the stream is measured, starting with an empty queue.

    Args:
        contenders: dict from name to function without arguments, or to :class:`Prepared`.
        seconds: no round is started after this time, but there are at least five rounds.
        rounds: largest number of rounds.
        seed: seed of the order.
        warmup: number of calls of each contender before the first round.
        device: "cpu" or "cuda"; by default "cuda" if there is a GPU.

    Returns:
        Dict from name to the seconds of each round.
    """
    gpu = torch.cuda.is_available() if device is None else device == "cuda"
    time_once = _time_once_on_gpu if gpu else _time_once
    pairs = {name: c if isinstance(c, Prepared) else _without_preparation(c) for name, c in contenders.items()}
    order = list(pairs)
    shuffle = random.Random(seed).shuffle
    for prepare, run in pairs.values():  # warm-up; compiled contenders compile here
        for _ in range(warmup):
            run(prepare())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds
    for i in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(time_once(*pairs[name]))
        if i >= 4 and time.perf_counter() > deadline:
            break
    return times


def _without_preparation(call: Call) -> Prepared:
    return Prepared(lambda: None, lambda _: call())


def _time_once(prepare: Callable[[], object], run: Callable[[object], object]) -> float:
    prepared = prepare()
    start = time.perf_counter()
    run(prepared)
    return time.perf_counter() - start


def _time_once_on_gpu(prepare: Callable[[], object], run: Callable[[object], object]) -> float:
    prepared = prepare()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(prepared)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Return the median over the rounds of time(slow) / time(fast)."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def ratio_interval(times: dict[str, list[float]], slow: str, fast: str, *, resamples: int = 1000, seed: int = 0) -> Ratio:
    """Return :func:`ratio` with its 95 % bootstrap interval.

    Each resample draws rounds with replacement and takes the median of their ratios. The interval
    contains 95 % of these medians.
    """
    ratios = torch.tensor([a / b for a, b in zip(times[slow], times[fast], strict=True)], dtype=torch.float64)
    drawn = torch.randint(len(ratios), (resamples, len(ratios)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(ratios[drawn].median(1).values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    median = statistics.median(ratios.tolist())
    return Ratio(median, min(low, median), max(high, median))


def forward_backward(loss: Callable[..., torch.Tensor], student: torch.Tensor, *others) -> Callable[[], None]:
    """Return a function that runs ``loss(student, *others).backward()`` as in a training step.

    Each call computes new gradients and frees them.
    """

    def run() -> None:
        loss(student, *others).backward()
        for x in (student, *others):
            x.grad = None

    return run
