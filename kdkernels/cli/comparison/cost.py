"""Time and peak memory of a training step, measured one method at a time."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from ...benches.timing import ratio
from .methods import BASELINE, Row
from .runs import Settings, build, quiet_trainer, student_data

STEPS = 12  # per round; the first two are not counted
ROUNDS = 3


class _Times(Callback):
    """Records the seconds of each training step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        _synchronize()
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self._start)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_cost(settings: Settings, folder: Path, name: str, seed: int) -> dict[str, float | None]:
    """Measure the training steps of a row in this process, which has done nothing else.

    The row and the student alone take turns. The time includes forward, backward and the optimizer.

    Returns:
        ``milliseconds``, ``ratio`` to the student alone, and ``megabytes``: the peak memory of the
        process (on a GPU of torch's allocator) while the row is trained, ``None`` if the system
        does not report it.
    """
    seconds: dict[str, list[float]] = {name: [], BASELINE: []}
    megabytes = None
    for turn in range(ROUNDS):
        for each in seconds:
            seconds[each] += _steps(settings, folder, each, seed)
            if turn == 0 and each == name:
                megabytes = _peak(settings.device)
        if name == BASELINE:
            seconds = {name: seconds[name]}
    return {
        "milliseconds": 1e3 * statistics.median(seconds[name]),
        "ratio": 1.0 if name == BASELINE else ratio(seconds, name, BASELINE),
        "megabytes": megabytes,
    }


def _steps(settings: Settings, folder: Path, name: str, seed: int) -> list[float]:
    data = student_data(settings, seed)
    method = build(settings, folder, Row.parse(name), seed, data, steps=0)  # with the terms that begin late
    times = _Times()
    trainer = quiet_trainer(
        settings.device, max_steps=STEPS, callbacks=[times], enable_checkpointing=False, limit_val_batches=0, default_root_dir=folder
    )
    trainer.fit(method.to(memory_format=torch.channels_last), data)
    return times.seconds[2:]


def _peak(device: str) -> float | None:
    """Return the peak memory in MB."""
    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform != "linux":
        return None
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    return None
