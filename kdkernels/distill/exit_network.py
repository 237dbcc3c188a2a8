"""Inference by the exits of a network: one exit, all of them, or as many as an image needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.exits import Exits
from ..models.taps import FeatureTaps
from ..ops.checks import fraction
from ..tasks import find_logits
from .base import Distiller
from .exits import ExitDistiller
from .restore import restore

__all__ = ["ExitNetwork", "exit_network"]


class ExitNetwork(nn.Module):
    """A network with trained exits: ``network(image)`` returns the logits of the chosen exit.

    Args:
        backbone: the network.
        taps: the layers of the exits, from the front to the back, and last the layer whose feature
            map the backbone itself classifies.
        exits: the trained exits.
        exit: the exit whose logits :meth:`forward` returns, from 1; ``None`` for the whole network;
            or "ensemble" for the mean of the logits of all exits and of the whole network.

    Raises:
        ValueError: there is no such exit.
    """

    def __init__(self, backbone: nn.Module, taps: Sequence[str], exits: Exits, exit: int | Literal["ensemble"] | None = None):
        super().__init__()
        FeatureTaps(backbone, taps)  # check the names
        if len(taps) != len(exits) + 1:
            raise ValueError(f"taps must be the layers of the {len(exits)} exits and the last layer, got {list(taps)}")
        self.backbone, self.exits, self.taps = backbone, exits, list(taps)
        is_number = isinstance(exit, int) and not isinstance(exit, bool)
        if not (exit is None or exit == "ensemble" or (is_number and 1 <= int(exit) <= len(exits))):
            raise ValueError(f"exit must be a number in [1, {len(exits)}], 'ensemble' or None, got {exit!r}")
        self.exit = exit

    def forward(self, image: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K], or [B, K, H, W] for label maps
        if self.exit is None:
            return find_logits(self.backbone(image))
        if isinstance(self.exit, int):
            return self._logits_of_exit(image, self.exit - 1)
        logits, exits = self.all_logits(image)
        return torch.stack([*exits, logits]).mean(0)

    def all_logits(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the logits of the whole network, and those of each exit."""
        output, features = FeatureTaps(self.backbone, self.taps)(image)
        return find_logits(output), self.exits(list(features.values()), image.shape[2:]).logits

    def _logits_of_exit(self, image: Tensor, i: int) -> Tensor:
        """Run the backbone up to exit i, counted from 0, and the exit."""
        if torch.compiler.is_compiling():  # or exporting: an exception cannot be traced, and unused layers are removed later
            return self.all_logits(image)[1][i]
        found = []

        def stop(feature: Tensor) -> Tensor:
            found.append(self.exits.exit(i, feature, image.shape[2:])[0])
            raise _Stop

        with self._at_layers({self.taps[i]: stop}):
            try:
                self.backbone(image)
            except _Stop:
                return found[0]
        raise RuntimeError(f"layer {self.taps[i]!r} of {type(self.backbone).__name__} did not run in its forward pass")

    @torch.no_grad()
    def adaptive(self, image: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
        """Classify each image by the first exit that is confident, and stop computing it there.

        An exit is confident if its largest probability is at least ``threshold``. The whole network
        classifies the remaining images. The layers behind an exit receive only these.

        Args:
            image: [B, C, H, W].
            threshold: in [0, 1]; 0 stops every image at the first exit.

        Returns:
            The logits [B, K], and the number of the exit [B] int64, from 1; the whole network has
            the number ``len(exits) + 1``.

        Raises:
            ValueError: the threshold is not in [0, 1], or the logits are not [B, K].
            RuntimeError: a later layer of the backbone reads more than the output of the exit's
                layer, so that images cannot be left out.
        """
        fraction("threshold", threshold)
        if self.exits.label_maps:
            raise ValueError("adaptive needs one class per image, but these exits return label maps")
        remaining = torch.arange(len(image), device=image.device)
        number = torch.full_like(remaining, len(self.exits) + 1)
        logits: list[Tensor] = []
        rows: list[Tensor] = []

        def leave(i: int, feature: Tensor) -> Tensor:
            nonlocal remaining
            self._check_rows(len(feature), len(remaining))
            z = self.exits.exit(i, feature, image.shape[2:])[0]
            confident = is_confident(z, threshold)
            logits.append(z[confident])
            rows.append(remaining[confident])
            number[remaining[confident]] = i + 1
            remaining = remaining[~confident]
            if not len(remaining):
                raise _Stop
            return feature[~confident]

        with self._at_layers({name: partial(leave, i) for i, name in enumerate(self.taps[:-1])}):
            try:
                z = find_logits(self.backbone(image))
                self._check_rows(len(z), len(remaining))
                logits.append(z)
                rows.append(remaining)
            except _Stop:
                pass
            except RuntimeError as error:
                if len(remaining) == len(image) or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise RuntimeError(self._reads_more()) from error
        found = torch.cat(logits)
        result = torch.empty_like(found)
        result[torch.cat(rows)] = found
        return result, number

    def _check_rows(self, count: int, expected: int) -> None:
        if count != expected:
            raise RuntimeError(self._reads_more())

    def _reads_more(self) -> str:
        return f"{type(self.backbone).__name__} reads more than the output of the tapped layers behind an exit, so images cannot be left out there"

    @contextmanager
    def _at_layers(self, functions: dict[str, Callable[[Tensor], Tensor]]):
        """Replace the output of each layer by that of its function while the context is active."""

        def hook(function: Callable[[Tensor], Tensor]) -> Any:
            return lambda module, inputs, output: function(output)

        handles = [self.backbone.get_submodule(name).register_forward_hook(hook(function)) for name, function in functions.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def operations(self, image: Tensor) -> tuple[list[int], list[int]]:
        """Count the floating-point operations for one image of this shape, [1, C, H, W].

        Returns:
            Two lists with a number for each exit and, last, for the whole backbone. The first are
            the operations of the backbone up to the exit, and of this exit alone. The second
            include all exits before it: these are the costs of :meth:`adaptive`.
        """
        from torch.utils.flop_counter import FlopCounterMode

        alone, adaptive, spent = [], [], 0
        for i, name in enumerate(self.taps[:-1]):
            features = FeatureTaps(self.backbone, [name])(image)[1][name]
            with FlopCounterMode(display=False) as counter:
                self._logits_of_exit(image, i)
            with FlopCounterMode(display=False) as own:
                self.exits.exit(i, features, image.shape[2:])
            alone.append(counter.get_total_flops())
            adaptive.append(spent + alone[-1])
            spent += own.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            self.backbone(image)
        alone.append(counter.get_total_flops())
        return alone, [*adaptive, spent + alone[-1]]


class _Stop(Exception):
    """Ends the forward pass of a backbone at an exit."""


def is_confident(logits: Tensor, threshold: float) -> Tensor:  # [B, K] -> [B] bool
    """Whether the largest probability is at least the threshold."""
    return logits.double().softmax(1).amax(1) >= threshold


def exit_network(ckpt: str | os.PathLike, exit: int | Literal["ensemble"] | None = None) -> ExitNetwork:
    """Return the network of a checkpoint of :class:`BYOT` or :class:`DeepSupervision`, with exits.

    >>> network = exit_network("runs/byot/best.ckpt").eval()
    >>> logits, exit = network.adaptive(images, threshold=0.9)

    Args:
        ckpt: checkpoint of ``kdkernels fit``.
        exit: see :class:`ExitNetwork`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the checkpoint was not written by such a method, or does not contain the config
            of its run.
    """
    return with_exits(restore(ckpt)[0], ckpt, exit)


def with_exits(method: Distiller, ckpt: str | os.PathLike, exit: int | Literal["ensemble"] | None = None) -> ExitNetwork:
    """Return the network of a restored method with its exits; ``ckpt`` is its name in errors."""
    if not isinstance(method, ExitDistiller) or not isinstance(method.branches, Exits):
        raise ValueError(f"{os.fspath(ckpt)!r} has no exits: it was trained with {type(method).__name__}; train with BYOT or DeepSupervision")
    return ExitNetwork(method.student, method.student_taps.names, method.branches, exit)
