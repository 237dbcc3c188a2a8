"""The default optimizer and learning rate, two optimizers that step together, and a check that a
resumed run keeps its optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

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


class JointOptimizer(torch.optim.Optimizer):
    """Two optimizers as one: schedules change the options of the first only.

    Lightning's automatic optimization, gradient scaling and gradient clipping, and the checkpoints
    of torch see one optimizer with the parameter groups and the state of both.

    Args:
        scheduled: its learning rate and other options may be changed by a schedule.
        constant: keeps its options; for other parameters than ``scheduled``.
    """

    def __init__(self, scheduled: torch.optim.Optimizer, constant: torch.optim.Optimizer):
        self.scheduled, self.constant = scheduled, constant
        self.constant_options = [{name: value for name, value in group.items() if name != "params"} for group in constant.param_groups]
        super().__init__([*scheduled.param_groups, *constant.param_groups], scheduled.defaults)
        self._share()

    def _share(self) -> None:
        """Let the optimizers work on the parameter groups and the state of this one."""
        self.restore_constant()
        count = len(self.scheduled.param_groups)
        for optimizer, groups in ((self.scheduled, self.param_groups[:count]), (self.constant, self.param_groups[count:])):
            optimizer.__setstate__({"state": self.state, "param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        parts = ("scheduled", "constant", "constant_options")
        return super().__getstate__() | {name: getattr(self, name) for name in parts}

    def restore_constant(self) -> None:
        """Undo what a schedule has done to the options of the second optimizer."""
        for group, options in zip(self.param_groups[len(self.scheduled.param_groups) :], self.constant_options, strict=True):
            group.update(options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.restore_constant()
        loss = self.scheduled.step(closure)
        self.constant.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Return the class name, or those of the two optimizers of a :class:`JointOptimizer`."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # LightningOptimizer wraps one
    if isinstance(optimizer, JointOptimizer):
        return f"{optimizer_name(optimizer.scheduled)} with {optimizer_name(optimizer.constant)}"
    return type(optimizer).__name__


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
