"""Load weights, or whole networks, from files."""

from __future__ import annotations

import argparse
import os
import re
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

CHECKPOINT_KEY = "kdkernels"  # key of the data that a Distiller adds to Lightning's checkpoint
# Keys under which training scripts save a state dict.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "student")
# Attribute names under which DataParallel, DDP and LightningModules hold a network.
_PARENT_ATTRIBUTES = {"module", "model", "net", "network"}
# Names that torch.compile, FSDP, activation checkpointing and DeepSpeed insert at any depth.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the state dict of a file, without changes to its names.

    The file is ``.safetensors``; or a state dict that torch saved, alone or under a key such as
    "state_dict", "model" or "net"; or a checkpoint of this package. Only tensors and plain values
    are unpickled, including those in an ``argparse.Namespace`` and numpy's numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file contains no state dict or more than one, or cannot be read without
            running code from the file.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"weights: there is no file {path!r}")
    if os.path.isdir(path):
        raise ValueError(f"weights: {path!r} is a folder, expected a file")
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights: {path!r} is incomplete, or not a .safetensors file: {error}") from error
    stored = _load(path)
    state_dict = next((stored[key] for key in _STATE_DICT_KEYS if isinstance(stored, dict) and _is_state_dict(stored.get(key))), stored)
    if not _is_state_dict(state_dict) and isinstance(stored, dict):
        keys = [key for key, value in stored.items() if _is_state_dict(value)]
        if len(keys) > 1:
            raise ValueError(f"weights: {path!r} contains several state dicts, under {keys}: save the right one alone with torch.save")
        state_dict = stored[keys[0]] if keys else stored
    if not _is_state_dict(state_dict):
        contents = f"a dict of {', '.join(map(repr, list(stored)[:8]))}" if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(f"weights: {path!r} contains no state dict (names and tensors), but {contents}")
    return state_dict


def _is_state_dict(value: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def load_weights(module: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load the weights of a file (see :func:`read_weights`) into ``module``, and return ``module``.

    If the weights do not fit, the module is not changed. Prefixes that wrappers add to names are
    removed: ``module.`` of DataParallel and DDP, ``_orig_mod.`` of ``torch.compile``, and
    ``model.``, ``net.`` or ``network.`` if all names have it. If a file contains a student and a
    teacher (``student.``, ``module.student.``), the student is loaded. ``num_batches_tracked``,
    which old files do not contain, may be missing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names, shapes or dtypes differ; lists the first differences.
    """
    stored = read_weights(path)
    weights = {_without_wrappers(name): value for name, value in stored.items()}
    if len(weights) < len(stored):
        wrapped = next(name for name in stored if _without_wrappers(name) != name and _without_wrappers(name) in stored)
        name = _without_wrappers(wrapped)
        raise ValueError(f"weights: {os.fspath(path)!r} contains two tensors for {name}: {name!r} and {wrapped!r}")
    expected = {_without_wrappers(name): (name, value) for name, value in module.state_dict().items()}
    prefix = _prefix(weights, expected)
    weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in expected]
    differences = [
        f"{n} is {list(w.shape)} in the file and {list(expected[n][1].shape)} in the network"
        for n, w in weights.items()
        if n in expected and not is_lazy(expected[n][1]) and w.shape != expected[n][1].shape
    ]
    for n, w in weights.items():
        if w.layout != torch.strided or w.is_meta or w.is_quantized:
            differences.append(f"{n} is not a dense tensor")
        elif n in expected and not is_lazy(expected[n][1]) and w.is_floating_point() != expected[n][1].is_floating_point():
            differences.append(f"{n} is {w.dtype} in the file and {expected[n][1].dtype} in the network")
    problems = differences[:4] + [f"and {len(differences) - 4} more differences"] * (len(differences) > 4)
    if missing or extra:
        problems.insert(0, f"only in the file: {_first_names(extra) or 'nothing'}; only in the network: {_first_names(missing) or 'nothing'}")
    if problems:
        raise ValueError(f"weights: {os.fspath(path)!r} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict({expected[name][0]: value for name, value in weights.items()}, strict=False)
    return module


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefix(weights: dict[str, Tensor], expected: dict[str, tuple]) -> str:
    """Return the prefix that the network's names have in the file.

    A prefix fits if the file contains all names of the network with this prefix. Among the prefixes
    that fit, the empty one is preferred, then that of a student, then one that all names of the
    file have. If none fits and the file contains a student, this is the student's prefix, so that
    the error compares the names without it.
    """
    names = [name for name in expected if not name.endswith("num_batches_tracked")]
    first = names[0] if names else ""
    prefixes = [name.removesuffix(first) for name in weights if name == first or name.endswith(f".{first}")]
    prefixes = [prefix for prefix in prefixes if all(prefix + name in weights for name in names)]
    attributes = {prefix: prefix.split(".")[:-1] for prefix in sorted(prefixes, key=len)}
    is_student = lambda p: p[-1] == "student" and _PARENT_ATTRIBUTES.issuperset(p[:-1])  # noqa: E731
    is_shared = lambda p: _PARENT_ATTRIBUTES.issuperset(p) and all(n.startswith(".".join(p)) for n in weights)  # noqa: E731
    for is_accepted in (lambda p: not p, is_student, is_shared):
        for prefix, path in attributes.items():
            if is_accepted(path):
                return prefix
    of_student = [name[: name.index("student.") + len("student.")] for name in weights if name.startswith(("student.", "module.student."))]
    return of_student[0] if of_student and not any(name.startswith("student.") for name in expected) else ""


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def from_checkpoint(path: str | os.PathLike) -> nn.Module:
    """Return the student of a checkpoint that ``kdkernels fit`` wrote, with its weights.

    >>> teacher = from_checkpoint("runs/teacher/best.ckpt")

    In a config: ``teacher: {class_path: kdkernels.models.from_checkpoint, init_args: {path:
    runs/teacher/best.ckpt}}``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such a checkpoint, or does not contain the configuration of its
            student (it was trained from Python).
    """
    description = describe(path)
    if description.get("student") is None:
        raise ValueError(
            f"{os.fspath(path)!r} does not contain the configuration of its student: it was not trained by `kdkernels fit`. "
            "Construct the network yourself, and use load_weights(network, path)"
        )
    return load_weights(build(description["student"]), path)


def describe(path: str | os.PathLike) -> dict:
    """Return the data that a Distiller added to a checkpoint.

    They include ``student`` (class_path and init_args, or None), ``image_shape`` and ``version``.
    ``epoch`` is the last trained epoch, counted from 0.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of this package.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    stored = _load(os.fspath(path))
    if not isinstance(stored, dict) or CHECKPOINT_KEY not in stored:
        raise ValueError(f"{os.fspath(path)!r} is not a checkpoint of this package")
    return stored[CHECKPOINT_KEY] | {"epoch": stored.get("epoch")}


def build(spec: dict) -> nn.Module:
    """Construct a network from ``{"class_path": ..., "init_args": {...}}``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network")
    return parser.instantiate(parser.parse_object({"network": spec})).network


def _load(path: str) -> object:
    try:
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # reading a damaged file can raise any exception
        classes = _forbidden_classes(path, str(error))
        if classes:
            raise ValueError(
                f"{path!r} cannot be read as weights: it contains objects of {', '.join(classes)}, and loading them could run arbitrary code. If you "
                'trust the file, save its weights alone: torch.save(torch.load(path, weights_only=False)["model"], "weights.pth"), with the right key'
            ) from error
        reason = f"{type(error).__name__}: {error}".split("\n", 1)[0].removesuffix(": ")
        raise ValueError(
            f"{path!r} cannot be read as weights (tensors and plain values; nothing else is unpickled); it may be damaged or incomplete: {reason}"
        ) from error


def _plain_types() -> list:
    """Return safe types that training scripts save beside the weights."""
    scalar = np.float64(0).__reduce__()[0]  # its module depends on the release of numpy
    scalars = [(scalar, f"{package}.multiarray.scalar") for package in ("numpy.core", "numpy._core")]
    return [argparse.Namespace, np.dtype, *scalars, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdg")]


def _forbidden_classes(path: str, message: str) -> list[str]:
    """List the classes in the file that ``weights_only`` does not allow."""
    try:
        with torch.serialization.safe_globals(_plain_types()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file has the format before torch 1.6, or is not a pickle
        return re.findall(r"GLOBAL (\S+) was not an allowed global", message)
