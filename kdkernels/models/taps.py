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
        ValueError: a name that the module does not have; the nearest ones are given. A name given twice. A layer inside of what
            ``torch.compile`` made one piece of.
        RuntimeError: when called: a layer did not run, or what it returned was overwritten by a layer that works in place.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]):
        self.module = module
        self.names = list(names)
        twice = {name for name in self.names if self.names.count(name) > 1}
        if twice:
            raise ValueError(f"layers must be named once each, got {sorted(twice)} more than once")
        layers = dict(module.named_modules())
        for name in self.names:
            _check_not_compiled(module, name)
            if name not in layers or name == "":
                near = difflib.get_close_matches(name, layers, n=3, cutoff=0.3)
                raise ValueError(f"{type(module).__name__} has no layer {name!r}; did you mean one of {near or [k for k in layers if k][:8]}?")

    def __call__(self, *args, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
        """The module's output, and the output of each tapped layer."""
        caught: dict[str, Tensor] = {}
        versions: dict[str, int] = {}

        def catch(name: str, output: object) -> None:
            caught[name] = output
            if isinstance(output, Tensor) and not output.is_inference():
                versions[name] = output._version

        handles = [
            self.module.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, name=name: catch(name, output))
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
        changed = [name for name, version in versions.items() if caught[name]._version != version]
        if changed:
            raise RuntimeError(
                f"what layers {changed} of {type(self.module).__name__} returned was overwritten in place by a later layer, for example "
                "ReLU(inplace=True); tap that layer instead, or set its inplace to False"
            )
        return output, {name: caught[name] for name in self.names}


def _check_not_compiled(module: nn.Module, name: str) -> None:
    """Hooks on layers inside of a compiled module are not called, or compiled away."""
    layer = module
    for part in ["", *name.split(".")]:
        inside = part != "" and hasattr(layer, "_orig_mod")
        layer = getattr(layer, part, None) if part else layer
        if layer is None and not inside:
            return
        if inside or (getattr(layer, "_compiled_call_impl", None) is not None and not hasattr(layer, "_orig_mod")):
            raise ValueError(
                f"layer {name!r} of {type(getattr(module, '_orig_mod', module)).__name__} cannot be tapped: torch.compile hides the layers of what "
                "it compiles. Give the network itself, or compile only parts without taps"
            )


def pair_features(
    student: dict[str, Tensor], teacher: dict[str, Tensor], *, channels: bool = False, space: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Features of student and teacher, tap by tap in the order of their names' lists, after a look at whether they can be compared.

    Args:
        student, teacher: what :class:`FeatureTaps` caught: maps [B, C, *spatial].
        channels: whether a pair must have as many channels.
        space: whether a pair must have the same extents in space.

    Raises:
        ValueError: not as many taps on both sides, or a pair whose shapes cannot match; names both taps and their shapes.
    """
    if len(student) != len(teacher):
        raise ValueError(f"student_taps and teacher_taps must pair up: {len(student)} ({list(student)}) against {len(teacher)} ({list(teacher)})")
    pairs = []
    for (student_name, s), (teacher_name, t) in zip(student.items(), teacher.items(), strict=True):
        shown = f"student tap {student_name!r} {list(s.shape)} and teacher tap {teacher_name!r} {list(t.shape)}"
        if s.dim() < 3 or s.dim() != t.dim():
            raise ValueError(f"{shown} must both be maps [B, C, *spatial] of as many dimensions")
        if channels and s.shape[1] != t.shape[1]:
            raise ValueError(f"{shown} cannot match: they need as many channels, got {s.shape[1]} and {t.shape[1]}")
        if space and s.shape[2:] != t.shape[2:]:
            raise ValueError(f"{shown} cannot match: they need the same extents in space, got {list(s.shape[2:])} and {list(t.shape[2:])}")
        pairs.append((s, t))
    return pairs
