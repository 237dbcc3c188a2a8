"""Training of a network together with exits at its inner layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..models.exits import Branch, ExitOutputs, Exits
from .self_distiller import SelfDistiller


class ExitDistiller(SelfDistiller):
    """Base class of methods that train a network together with exits at its inner layers.

    The branches are :class:`kdkernels.models.Exits`. Validation evaluates the student, each exit
    (``val/accuracy_exit_1``, ...) and the mean of all logits (``val/accuracy_ensemble``).

    Args:
        student: maps images [B, C, H, W] to logits in the shape of ``task``.
        student_taps: names of the layers of the exits, from the front to the back, and last the
            layer whose feature map the student itself classifies.
        exit_options: ``branch`` and ``adapters`` of :class:`kdkernels.models.Exits`.
        image_shape: see :class:`SelfDistiller`.
        **options: the other arguments of :class:`Distiller`. There is no teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        student_taps: Iterable[str],
        exit_options: dict[str, Any],
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        super().__init__(student, student_taps, partial(_make_exits, **exit_options), image_shape, **options)

    def new_branches(self, image: Tensor) -> nn.Module:
        check_runs_once(self.student, self.student_taps.names[:-1], image)
        return super().new_branches(image)

    def run_exits(self, image: Tensor) -> tuple[Tensor, ExitOutputs]:
        """Return the student's logits, and the outputs of the exits."""
        logits, features = self.student_outputs({"image": image})
        return logits, cast(Exits, self.branches)(list(features.values()), image.shape[2:])

    def predictions(self, image: Tensor) -> dict[str, Tensor]:
        logits, outputs = self.run_exits(image)
        exits = {f"_exit_{i}": z for i, z in enumerate(outputs.logits, 1)}
        return {"": logits, **exits, "_ensemble": torch.stack([logits, *outputs.logits]).mean(0)}

    def prediction_names(self) -> list[str]:
        return ["", *(f"_exit_{i}" for i in range(1, len(self.student_taps.names))), "_ensemble"]


def check_runs_once(network: nn.Module, names: Sequence[str], image: Tensor) -> None:
    """Raise ValueError if a layer runs several times: inference stops at its first run."""
    runs = dict.fromkeys(names, 0)

    def count(name: str) -> None:
        runs[name] += 1

    handles = [network.get_submodule(name).register_forward_hook(lambda *_, name=name: count(name)) for name in names]
    try:
        network(image)
    finally:
        for handle in handles:
            handle.remove()
    for name, number in runs.items():
        if number > 1:
            raise ValueError(
                f"student_taps: layer {name!r} of {type(network).__name__} runs {number} times for an image, so it cannot have an exit: "
                "tap another layer"
            )


def _make_exits(shapes: dict[str, tuple[int, ...]], logits: Tensor, branch: Branch, adapters: bool = False) -> Exits:
    return Exits(shapes, logits.shape[1], logits.dim() == 4, branch, adapters)
