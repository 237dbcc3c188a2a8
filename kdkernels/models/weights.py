"""Weights and whole networks from files."""

from __future__ import annotations

import argparse
import os
import re
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

CHECKPOINT_KEY = "kdkernels"  # of what a Distiller adds to Lightning's checkpoint
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "student")  # under which training scripts save one
_HOLDERS = {"module", "model", "net", "network"}  # parts that hold the network in another: DataParallel, DDP, LightningModules
# What torch.compile, FSDP, activation checkpoints and DeepSpeed put into names, at any depth.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict of a file, names as they are there: ``.safetensors``; a state dict saved by torch, bare or under a key such as
    "state_dict", "model" or "net"; or a checkpoint of this package. Nothing but tensors and plain values is unpickled (also those in an
    ``argparse.Namespace``, and numpy's numbers).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no state dict, or more than one, or cannot be read without running code of its own.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"weights: there is no file {path!r}")
    if os.path.isdir(path):
        raise ValueError(f"weights: {path!r} is a folder, a file is needed")
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"weights: {path!r} is not whole, or no .safetensors file: {error}") from error
    stored = _load(path)
    inside = next((stored[key] for key in _STATE_DICT_KEYS if isinstance(stored, dict) and _is_state_dict(stored.get(key))), stored)
    if not _is_state_dict(inside) and isinstance(stored, dict):
        found = [key for key, value in stored.items() if _is_state_dict(value)]
        if len(found) > 1:
            raise ValueError(f"weights: {path!r} holds several state dicts, under {found}: save the one that is meant alone, by torch.save")
        inside = stored[found[0]] if found else stored
    if not _is_state_dict(inside):
        what = f"a dict of {', '.join(map(repr, list(stored)[:8]))}" if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(f"weights: {path!r} holds no state dict (names and tensors), but {what}")
    return inside


def _is_state_dict(value: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def load_weights(module: nn.Module, path: str | os.PathLike) -> nn.Module:
    """``module``, with the weights of the file (see :func:`read_weights`). Nothing is changed if they do not fit.

    What wrappers add to names is left out: ``module.`` of DataParallel and DDP, ``_orig_mod.`` of ``torch.compile``, and ``model.``, ``net.`` or
    ``network.`` where all names share it. Of a file in which a student and a teacher lie side by side (``student.``, ``module.student.``) the
    student is taken.
    ``num_batches_tracked``, which old files lack, stays as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names or shapes differ; the first of the file's are listed beside the network's.
    """
    stored = read_weights(path)
    weights = {_without_wrappers(name): value for name, value in stored.items()}
    if len(weights) < len(stored):
        twice = next(name for name in stored if _without_wrappers(name) != name and _without_wrappers(name) in stored)
        raise ValueError(f"weights: {os.fspath(path)!r} holds two tensors for {_without_wrappers(twice)}: {_without_wrappers(twice)!r} and {twice!r}")
    own = {_without_wrappers(name): (name, value) for name, value in module.state_dict().items()}
    prefix = _prefix(weights, own)
    weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in own]
    reshaped = [
        f"{n} is {list(w.shape)}, the network's {list(own[n][1].shape)}"
        for n, w in weights.items()
        if n in own and not is_lazy(own[n][1]) and w.shape != own[n][1].shape
    ]
    for n, w in weights.items():
        if w.layout != torch.strided or w.is_meta or w.is_quantized:
            reshaped.append(f"{n} is no dense tensor")
        elif n in own and not is_lazy(own[n][1]) and w.is_floating_point() != own[n][1].is_floating_point():
            reshaped.append(f"{n} is {w.dtype}, the network's {own[n][1].dtype}")
    problems = reshaped[:4] + [f"and {len(reshaped) - 4} more shapes"] * (len(reshaped) > 4)
    if missing or extra:
        problems.insert(0, f"the file has {_some(extra) or 'nothing else'} where the network has {_some(missing) or 'nothing'}")
    if problems:
        raise ValueError(f"weights: {os.fspath(path)!r} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict({own[name][0]: value for name, value in weights.items()}, strict=False)
    return module


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _prefix(weights: dict[str, Tensor], own: dict[str, tuple]) -> str:
    """What stands before the network's names in the file: of all that complete them, none, or the student's, or what all names share."""
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    first = names[0] if names else ""
    found = [name.removesuffix(first) for name in weights if name == first or name.endswith(f".{first}")]
    found = [prefix for prefix in found if all(prefix + name in weights for name in names)]
    parts = {prefix: prefix.split(".")[:-1] for prefix in sorted(found, key=len)}
    student = lambda p: p[-1] == "student" and _HOLDERS.issuperset(p[:-1])  # noqa: E731
    for good in (lambda p: not p, student, lambda p: _HOLDERS.issuperset(p) and all(n.startswith(".".join(p)) for n in weights)):
        for prefix, path in parts.items():
            if good(path):
                return prefix
    held = [name[: name.index("student.") + len("student.")] for name in weights if name.startswith(("student.", "module.student."))]
    return held[0] if held and not any(name.startswith("student.") for name in own) else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def from_checkpoint(path: str | os.PathLike) -> nn.Module:
    """The student of a checkpoint that ``kdkernels fit`` wrote, as a network with its weights.

    >>> teacher = from_checkpoint("runs/teacher/best.ckpt")

    In a config: ``teacher: {class_path: kdkernels.models.from_checkpoint, init_args: {path: runs/teacher/best.ckpt}}``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such checkpoint, or does not say how the student is made (its training was started from Python).
    """
    description = describe(path)
    if description.get("student") is None:
        raise ValueError(
            f"{os.fspath(path)!r} does not say how its student is made: it was not trained by `kdkernels fit`. Make the network yourself, "
            "and use load_weights(network, path)"
        )
    return load_weights(build(description["student"]), path)


def describe(path: str | os.PathLike) -> dict:
    """What a checkpoint of this package says of itself: ``student`` (class_path and init_args, or None), ``image_shape``, ``version``,
    ``epoch`` (the last one that was trained, from 0)."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    stored = _load(os.fspath(path))
    if not isinstance(stored, dict) or CHECKPOINT_KEY not in stored:
        raise ValueError(f"{os.fspath(path)!r} is not a checkpoint of this package")
    return stored[CHECKPOINT_KEY] | {"epoch": stored.get("epoch")}


def build(spec: dict) -> nn.Module:
    """A network from ``{"class_path": ..., "init_args": {...}}``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "network")
    return parser.instantiate(parser.parse_object({"network": spec})).network


def _load(path: str) -> object:
    try:
        with torch.serialization.safe_globals(_plain_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of a damaged file raises what it likes
        classes = _foreign_classes(path, str(error))
        if classes:
            raise ValueError(
                f"{path!r} cannot be read as weights: it holds objects of {', '.join(classes)}, and reading those could run any code. Where you "
                'trust the file: torch.save(torch.load(path, weights_only=False)["model"], "weights.pth"), or whatever the key of its weights is'
            ) from error
        reason = str(error).split("\n", 1)[0] or type(error).__name__
        raise ValueError(f"{path!r} cannot be read as weights (tensors and plain values; nothing else is unpickled): {reason}") from error


def _plain_types() -> list:
    """What training scripts save beside the weights, and what is no more than the plain values in it."""
    scalar = np.float64(0).__reduce__()[0]  # wherever this numpy has it
    named = [(scalar, f"{package}.multiarray.scalar") for package in ("numpy.core", "numpy._core")]
    return [argparse.Namespace, np.dtype, *named, *(type(np.dtype(code)) for code in "?bBhHiIlLqQefdg")]


def _foreign_classes(path: str, message: str) -> list[str]:
    try:
        with torch.serialization.safe_globals(_plain_types()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # of the format before torch 1.6, or no pickle at all
        return re.findall(r"GLOBAL (\S+) was not an allowed global", message)
