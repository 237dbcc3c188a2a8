"""Put the losses of :mod:`kdkernels.compat` in the place of those of an installed package."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import io
import sys
import textwrap
import threading
import tokenize
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from . import liger, mdistiller, modelopt, repdistiller, torchdistill, trl

__all__ = ["Patch", "patch"]


class _LogitsDistillationLoss(modelopt.LogitsDistillationLoss):
    """With the default reduction of Model Optimizer 0.47."""

    def __init__(self, temperature: float = 1.0, reduction: Any = "mean"):
        super().__init__(temperature, reduction)


class _Target(NamedTuple):
    """A package with losses.

    A package with versions is known by them: those that `make test-peers` has compared. A
    repository without releases is known by the source of its losses.
    """

    distribution: str  # as in pip install; or the repository
    versions: tuple[str, ...]
    replacements: dict[tuple[str, str], Any]  # by module and name; or class.name of a static method
    sources: dict[tuple[str, str], str] | None = None  # of the same names: their :func:`source_hash`


_TARGETS = {
    "distiller_zoo": _Target(
        "RepDistiller",
        (),
        {
            ("distiller_zoo.AT", "Attention"): repdistiller.Attention,
            ("distiller_zoo.FSP", "FSP"): repdistiller.FSP,
            ("distiller_zoo.KD", "DistillKL"): repdistiller.DistillKL,
            ("distiller_zoo.KDSVD", "KDSVD"): repdistiller.KDSVD,
        },
        {
            ("distiller_zoo.AT", "Attention"): "27f5b694b64e209eb8d4961b7c12ef286544f081e8eb8ec4f42a14129b95e6ce",
            ("distiller_zoo.FSP", "FSP"): "efd272700d636eb4ce00472300572e5b911ec796f8d1e094dfea8e832341f5f9",
            ("distiller_zoo.KD", "DistillKL"): "411b32b88555c3a9cc7fb5be4c6dd151d47c43bd4df6cd15d954b5001d794b95",
            ("distiller_zoo.KDSVD", "KDSVD"): "6de83d871b91d2fffc3a178385c38a12510abf76ea7931083a716d25c8642ebd",
        },
    ),
    "mdistiller": _Target(
        "mdistiller",
        (),
        {
            ("mdistiller.distillers.AT", "at_loss"): mdistiller.at_loss,
            ("mdistiller.distillers.AT", "single_stage_at_loss"): mdistiller.single_stage_at_loss,
            ("mdistiller.distillers.KD", "kd_loss"): mdistiller.kd_loss,
        },
        {
            ("mdistiller.distillers.AT", "at_loss"): "a6008fddc6659e86b4186ea6a070daf63b9ba56b5bd7662ca9fff7a01afa5f54",
            ("mdistiller.distillers.AT", "single_stage_at_loss"): "ac8c32d089f22b71123365379eebbbd64fe2e2318f207552db009b78a5c0c28a",
            ("mdistiller.distillers.KD", "kd_loss"): "740a25cc3880efe80d0004707983a663d832bb0fa464dbd3066dc4c5c5fb9c83",
        },
    ),
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
_active: dict[str, Patch] = {}
_lock = threading.RLock()


class Patch:
    """Replaced losses. ``undo`` takes them out again; so does the end of a ``with`` block."""

    def __init__(self, target: str, restore: list[Callable[[], None]]):
        self.target, self._restore = target, restore

    def undo(self) -> None:
        """Put the package's own losses back. A second call does nothing.

        A name that was assigned anew during the patch keeps its value.
        """
        with _lock:
            while self._restore:
                self._restore.pop()()
            if _active.get(self.target) is self:
                del _active[self.target]

    def __enter__(self) -> Patch:
        if _active.get(self.target) is not self:
            raise RuntimeError(f"this patch of {self.target} was undone: call kdkernels.patch({self.target!r}) again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<kdkernels.patch({self.target!r}), {'active' if _active.get(self.target) is self else 'undone'}>"


def patch(target: str) -> Patch:
    """Use the losses of this package in another package, until the patch is undone.

    Example: ``with kdkernels.patch("torchdistill"): ...``, or ``kdkernels.patch("torchdistill")``
    before the training script builds its losses. Losses that were built before are not changed.
    Names that a module outside the package has imported from it are not changed either: call
    ``patch`` before importing them.

    Args:
        target: "liger_kernel" (``LigerJSD``, ``LigerKLDIVLoss``), "modelopt"
            (``LogitsDistillationLoss``), "torchdistill" (``KDLoss``, ``ATLoss``, ``FSPLoss``),
            "trl" (``GKDTrainer.generalized_jsd_loss``), or a repository whose folder can be
            imported: "distiller_zoo" of RepDistiller (``DistillKL``, ``Attention``, ``FSP``,
            ``KDSVD``) or "mdistiller" (``kd_loss``, ``at_loss``, ``single_stage_at_loss``).

    Returns:
        The patch, with the method ``undo``. It is also a context manager.

    Raises:
        ImportError: the package is not installed, or a module of it cannot be imported.
        RuntimeError: its version, or the source of a loss, is not one that was compared with ours,
            or it is patched already.
        ValueError: the target is unknown.
    """
    if not isinstance(target, str):
        raise TypeError(f"target must be the name of a package, got {type(target).__name__}")
    if target not in _TARGETS:
        raise ValueError(f"target must be one of {', '.join(map(repr, sorted(_TARGETS)))}, got {target!r}")
    with _lock:
        return _apply(target)


def _apply(target: str) -> Patch:
    if target in _active:
        raise RuntimeError(f"{target} is patched already: undo the first patch before another one")
    known = _TARGETS[target]
    (_check_version if known.sources is None else _check_sources)(known)
    found = [(*_find(module, name), new) for (module, name), new in known.replacements.items()]
    applied = Patch(target, [])
    _active[target] = applied
    try:
        for owner, name, old, new in found:
            if isinstance(owner, ModuleType):
                _replace_in_package(target, old, new, applied._restore)
            else:
                setattr(owner, name, new)
                applied._restore.append(partial(_put_back_attribute, owner, name, old, new))
    except BaseException:
        applied.undo()
        raise
    return applied


def _check_version(known: _Target) -> None:
    """Raise an error unless a known version is installed."""
    try:
        version = importlib.metadata.version(known.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(f"{known.distribution} is not installed, so that there is nothing to patch") from None
    if version not in known.versions:
        raise RuntimeError(
            f"{known.distribution} {version} is not a version whose losses were compared with ours ({', '.join(known.versions)}): "
            "its losses may have changed, so that it is not patched"
        )


def _check_sources(known: _Target) -> None:
    """Raise an error unless all losses of a repository can be imported and are known."""
    for (module, name), expected in (known.sources or {}).items():
        try:
            _, _, value = _find(module, name)
        except (ImportError, KeyError) as error:
            raise ImportError(
                f"{module}.{name} of {known.distribution} cannot be imported ({error}): run Python in the folder of the repository"
            ) from error
        if source_hash(value) != expected:
            raise RuntimeError(
                f"{module}.{name} has another source than the one of {known.distribution} that was compared with ours: its numbers may differ, so "
                "that it is not patched"
            )


def source_hash(value: Any) -> str:
    """Return the hash of the source of a class or function, without comments and docstrings.

    Line breaks and spaces do not matter either, so that a formatted copy has the same hash. An
    object whose source cannot be read, such as a replacement that is not from a file, has "".
    """
    try:
        text = textwrap.dedent(inspect.getsource(value))
    except (OSError, TypeError):
        return ""
    layout = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)]
    kept: list[str] = []
    previous, after_docstring = tokenize.NEWLINE, False
    for token in tokens:
        is_docstring = token.type == tokenize.STRING and previous in layout
        if not is_docstring and not (after_docstring and token.type == tokenize.NEWLINE):
            kept.append(tokenize.tok_name[token.type] if token.type in layout else token.string)
        previous, after_docstring = token.type, is_docstring
    return hashlib.sha256("\0".join(kept).encode()).hexdigest()


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
                restore.append(partial(_put_back, namespace, key, old, new))


def _put_back(namespace: dict, key: str, old: Any, new: Any) -> None:
    if namespace.get(key) is new:
        namespace[key] = old


def _put_back_attribute(owner: Any, name: str, old: Any, new: Any) -> None:
    if vars(owner).get(name) is new:
        setattr(owner, name, old)
