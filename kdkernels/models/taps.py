"""Get the outputs of named layers of any module."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


class FeatureTaps:
    """Wrapper of ``module`` that returns its output and the outputs of the layers ``names``.

    The module itself is not changed. If a layer runs several times, its last output is returned.

    >>> taps = FeatureTaps(student, ["block1", "block3"])
    >>> logits, features = taps(images)  # features: {"block1": [B, C, H, W], "block3": ...}

    Args:
        module: any ``nn.Module``.
        names: layer names as in ``module.named_modules()``.

    Raises:
        ValueError: the module has no layer of a name (the error lists similar names), a name is
            given twice, or a layer is inside a module that ``torch.compile`` has compiled.
        RuntimeError: when called: a layer did not run, or its output was overwritten by a later
            layer that works in place.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]):
        self.module = module
        self.names = list(names)
        duplicates = {name for name in self.names if self.names.count(name) > 1}
        if duplicates:
            raise ValueError(f"layers must be named once each, got {sorted(duplicates)} more than once")
        layers = dict(module.named_modules())
        first_names = {layer: name for name, layer in layers.items()}
        for name in self.names:
            if name == "" or not isinstance(name, str):
                raise ValueError(f"layers must be given by their names in {type(module).__name__}, got {name!r}")
            _check_not_compiled(module, name)
            same = dict(module.named_modules(remove_duplicate=False)).get(name)
            if name not in layers and same is not None:
                raise ValueError(
                    f"layer {name!r} of {type(module).__name__} is the same module as {first_names[same]!r}, and its outputs cannot be told apart"
                )
            if name not in layers:
                similar = difflib.get_close_matches(name, layers, n=3, cutoff=0.3)
                raise ValueError(f"{type(module).__name__} has no layer {name!r}; did you mean one of {similar or [k for k in layers if k][:8]}?")

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the module; return its output, and the output of each tapped layer."""
        features: dict[str, Any] = {}
        versions: dict[str, int] = {}

        def record(name: str, output: object) -> None:
            features[name] = output
            if isinstance(output, Tensor) and not output.is_inference():
                versions[name] = output._version

        handles = [
            self.module.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, name=name: record(name, output))
            for name in self.names
        ]
        try:
            output = self.module(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.names if name not in features]
        if missing:
            raise RuntimeError(f"layers {missing} of {type(self.module).__name__} did not run in its forward pass: tap other layers")
        changed = [name for name, version in versions.items() if features[name]._version != version]
        if changed:
            raise RuntimeError(
                f"the outputs of layers {changed} of {type(self.module).__name__} were overwritten in place by a later layer, for example "
                "ReLU(inplace=True): tap the later layer instead, or set its inplace to False"
            )
        return output, {name: features[name] for name in self.names}


def _check_not_compiled(module: nn.Module, name: str) -> None:
    """Raise ValueError for a layer inside a compiled module, where hooks may not be called."""
    layer: Any = module
    for part in ["", *name.split(".")]:
        inside = part != "" and hasattr(layer, "_orig_mod")
        layer = getattr(layer, part, None) if part else layer
        if layer is None and not inside:
            return
        if inside or (getattr(layer, "_compiled_call_impl", None) is not None and not hasattr(layer, "_orig_mod")):
            raise ValueError(
                f"layer {name!r} of {type(getattr(module, '_orig_mod', module)).__name__} cannot be tapped: torch.compile hides the layers inside "
                "a compiled module. Give the network without torch.compile, or compile only parts without taps"
            )


def pair_features(
    student: dict[str, Tensor], teacher: dict[str, Tensor], *, channels: bool = False, space: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Pair the features of student and teacher in the order of the taps, and check their shapes.

    Args:
        student, teacher: feature maps [B, C, *spatial] from :class:`FeatureTaps`.
        channels: whether the two maps of a pair must have the same number of channels.
        space: whether the two maps of a pair must have the same spatial size.

    Raises:
        ValueError: the numbers of taps differ, or the shapes of a pair do not match; names both
            taps and their shapes.
    """
    if len(student) != len(teacher):
        raise ValueError(f"student_taps and teacher_taps must pair up, got {len(student)} ({list(student)}) and {len(teacher)} ({list(teacher)})")
    pairs = []
    for (student_name, s), (teacher_name, t) in zip(student.items(), teacher.items(), strict=True):
        taps = f"student tap {student_name!r} {list(s.shape)} and teacher tap {teacher_name!r} {list(t.shape)}"
        if s.dim() < 3 or s.dim() != t.dim():
            raise ValueError(f"{taps} must both be maps [B, C, *spatial] with the same number of dimensions")
        if channels and s.shape[1] != t.shape[1]:
            raise ValueError(f"{taps} do not match: they must have the same number of channels, got {s.shape[1]} and {t.shape[1]}")
        if space and s.shape[2:] != t.shape[2:]:
            raise ValueError(f"{taps} do not match: they must have the same spatial size, got {list(s.shape[2:])} and {list(t.shape[2:])}")
        pairs.append((s, t))
    return pairs
