"""Timing contenders side by side: interleaved in random order, compared by ratios of medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch


def time_interleaved(
    contenders: dict[str, Callable[[], object]], *, seconds: float = 1.0, rounds: int = 200, seed: int = 0, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of each call. All contenders run once per round, in random order, for at most ``seconds`` in all, and at least five rounds,
    after ``warmup`` calls of each."""
    order = list(contenders)
    shuffle = random.Random(seed).shuffle
    for run in contenders.values():  # warm-up, compilation
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds
    for i in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(_once(contenders[name]))
        if i >= 4 and time.perf_counter() > deadline:
            break
    return times


def _once(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over the rounds of time(slow) / time(fast)."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def forward_backward(loss: Callable[..., torch.Tensor], student: torch.Tensor, *others) -> Callable[[], None]:
    """A call of loss(student, *others).backward() with a fresh gradient, as in a training step; it frees its own gradient, not its neighbour's."""

    def run() -> None:
        loss(student, *others).backward()
        for x in (student, *others):
            x.grad = None

    return run
