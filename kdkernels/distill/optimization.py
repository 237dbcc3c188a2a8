"""The default optimizer and learning rate, and a check that a resumed run keeps its optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def default_optimizer(parameters: Iterable[nn.Parameter] | list[dict]) -> torch.optim.Optimizer:
    """The default of ``Distiller(optimizer=...)`` as a function: pickle cannot store the lambda."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def warm_up_and_decay(progress: float) -> float:
    """Learning rate factor: from 1/25 to 1 in the first fifth, then to 0, both along a cosine."""
    if progress < 0.2:
        return 1 - 0.96 * (0.5 + 0.5 * math.cos(math.pi * progress / 0.2))
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - 0.2) / 0.8))


def check_resumed(used: list[str], optimizer: torch.optim.Optimizer, previous: list[str] | None, states: list | None) -> None:
    """Check that a resumed run uses the optimizer and the schedule of the checkpoint.

    Without this check, the states of some other optimizers would be loaded without an error.

    Args:
        used: class names of the optimizer and of the schedule.
        optimizer: the optimizer.
        previous: the class names in the checkpoint; ``None`` for one that does not contain them.
        states: the states of the optimizers in the checkpoint; ``None`` if no run is resumed.

    Raises:
        ValueError: they differ.
    """
    differs = previous is not None and previous != used
    if previous is None and states:  # a checkpoint of an old version, without the class names
        previous = [f"an optimizer with {', '.join(sorted(k for k in states[0]['param_groups'][0] if k != 'params'))}"]
        differs = not set(optimizer.defaults) <= set(states[0]["param_groups"][0])
    if previous is not None and differs:
        raise ValueError(
            f"the checkpoint was trained with {' and '.join(previous)}, and cannot be resumed with {' and '.join(used)}: "
            "use the same optimizer and schedule, or start a new run from its weights (student_weights)"
        )
