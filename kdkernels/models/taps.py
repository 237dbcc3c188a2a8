"""The outputs of named layers of any module, caught as it runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import Tensor, nn


class FeatureTaps:
    """Catches what the layers ``names`` of ``module`` return, without a change to the module.

    >>> taps = FeatureTaps(student, ["block1", "block3"])
    >>> logits, features = taps(images)  # features: {"block1": [B, C, H, W], "block3": ...}

    Args:
        module: any ``nn.Module``.
        names: layer names as in ``module.named_modules()``.

    Raises:
        ValueError: a name that the module does not have; the nearest ones are given.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]):
        self.module = module
        self.names = list(names)
        layers = dict(module.named_modules())
        for name in self.names:
            if name not in layers or name == "":
                near = difflib.get_close_matches(name, layers, n=3, cutoff=0.3)
                raise ValueError(f"{type(module).__name__} has no layer {name!r}; did you mean one of {near or [k for k in layers if k][:8]}?")

    def __call__(self, *args, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        """The module's output, and the output of each tapped layer."""
        caught: dict[str, Tensor] = {}
        handles = [
            self.module.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, name=name: caught.__setitem__(name, output))
            for name in self.names
        ]
        try:
            output = self.module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.names if name not in caught]
        if missing:
            raise RuntimeError(f"layers {missing} of {type(self.module).__name__} did not run in its forward")
        return output, caught
