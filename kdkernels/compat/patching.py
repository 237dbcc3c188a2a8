"""Put the losses of :mod:`kdkernels.compat` in the place of those of an installed package."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from . import liger, modelopt, torchdistill, trl

__all__ = ["Patch", "patch"]


class _LogitsDistillationLoss(modelopt.LogitsDistillationLoss):
    """With the default reduction of Model Optimizer 0.47."""

    def __init__(self, temperature: float = 1.0, reduction: Any = "mean"):
        super().__init__(temperature, reduction)


class _Target(NamedTuple):
    distribution: str  # as in pip install
    versions: tuple[str, ...]  # whose losses `make test-peers` has compared with ours
    replacements: dict[tuple[str, str], Any]  # by module and name; or class.name of a static method


_TARGETS = {
    "liger_kernel": _Target(
        "liger-kernel",
        ("0.8.5",),
        {
            ("liger_kernel.transformers.jsd", "LigerJSD"): liger.LigerJSD,
            ("liger_kernel.transformers.kl_div", "LigerKLDIVLoss"): liger.LigerKLDIVLoss,
        },
    ),
    "modelopt": _Target("nvidia-modelopt", ("0.47.0",), {("modelopt.torch.distill.losses", "LogitsDistillationLoss"): _LogitsDistillationLoss}),
    "torchdistill": _Target(
        "torchdistill",
        ("1.1.5",),
        {("torchdistill.losses.mid_level", name): getattr(torchdistill, name) for name in ("KDLoss", "ATLoss", "FSPLoss")},
    ),
    "trl": _Target(
        "trl", ("1.16.0",), {("trl.experimental.gkd.gkd_trainer", "GKDTrainer.generalized_jsd_loss"): staticmethod(trl.generalized_jsd_loss)}
    ),
}
_active: set[str] = set()


class Patch:
    """Replaced losses. ``undo`` takes them out again; so does the end of a ``with`` block."""

    def __init__(self, target: str, restore: list[Callable[[], None]]):
        self.target, self._restore = target, restore

    def undo(self) -> None:
        """Put the package's own losses back. A second call does nothing."""
        while self._restore:
            self._restore.pop()()
        _active.discard(self.target)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<kdkernels.patch({self.target!r}), {'active' if self._restore else 'undone'}>"


def patch(target: str) -> Patch:
    """Use the losses of this package in another package, until the patch is undone.

    Example: ``with kdkernels.patch("torchdistill"): ...``, or ``kdkernels.patch("torchdistill")``
    before the training script builds its losses. Losses that were built before are not changed.
    Names that a module outside the package has imported from it are not changed either: call
    ``patch`` before importing them.

    Args:
        target: "liger_kernel" (``LigerJSD``, ``LigerKLDIVLoss``), "modelopt"
            (``LogitsDistillationLoss``), "torchdistill" (``KDLoss``, ``ATLoss``, ``FSPLoss``) or
            "trl" (``GKDTrainer.generalized_jsd_loss``).

    Returns:
        The patch, with the method ``undo``. It is also a context manager.

    Raises:
        ImportError: the package is not installed, or a module of it cannot be imported.
        RuntimeError: its version is not one that the losses were compared with, or it is patched
            already.
        ValueError: the target is unknown.
    """
    if target not in _TARGETS:
        raise ValueError(f"target must be one of {', '.join(map(repr, _TARGETS))}, got {target!r}")
    if target in _active:
        raise RuntimeError(f"{target} is patched already: undo the first patch before another one")
    distribution, versions, replacements = _TARGETS[target]
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{distribution} is not installed, so that there is nothing to patch") from None
    if version not in versions:
        raise RuntimeError(
            f"{distribution} {version} is not a version whose losses were compared with ours ({', '.join(versions)}): "
            "its losses may have changed, so that it is not patched"
        )
    found = [(*_find(module, name), new) for (module, name), new in replacements.items()]
    applied = Patch(target, [])
    _active.add(target)
    try:
        for owner, name, old, new in found:
            if isinstance(owner, ModuleType):
                _replace_in_package(target, old, new, applied._restore)
            else:
                setattr(owner, name, new)
                applied._restore.append(lambda owner=owner, name=name, old=old: setattr(owner, name, old))  # type: ignore[misc]
    except BaseException:
        applied.undo()
        raise
    return applied


def _find(module: str, name: str) -> tuple[Any, str, Any]:
    """Return the module or class that has the name, the last part of the name, and its value."""
    owner: Any = importlib.import_module(module)
    *classes, last = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    return owner, last, vars(owner)[last]  # vars: the staticmethod itself, not its function


def _replace_in_package(package: str, old: Any, new: Any, restore: list[Callable[[], None]]) -> None:
    """Replace a value in all modules of a package, and in the dicts that are globals of them."""
    for name, module in list(sys.modules.items()):
        if name != package and not name.startswith(f"{package}."):
            continue
        namespaces = [vars(module), *(value for key, value in vars(module).items() if type(value) is dict and not key.startswith("__"))]
        for namespace in namespaces:
            for key in [key for key, value in namespace.items() if value is old]:
                namespace[key] = new
                restore.append(lambda namespace=namespace, key=key: namespace.__setitem__(key, old))  # type: ignore[misc]
