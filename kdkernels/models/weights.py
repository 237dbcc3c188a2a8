"""Weights and whole networks from files."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

CHECKPOINT_KEY = "kdkernels"  # of what a Distiller adds to Lightning's checkpoint


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """A state dict from a file: ``.safetensors``; a state dict saved by torch, bare or under "state_dict" or "model"; or a checkpoint of this
    package, of which the student's is taken. Nothing but tensors and plain values is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no state dict, or cannot be read without running code of its own.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"weights: there is no file {path!r}")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    stored = _load(path)
    for key in ("state_dict", "model"):
        if isinstance(stored, dict) and isinstance(stored.get(key), dict):
            stored = stored[key]
    if not isinstance(stored, dict) or not stored or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(f"weights: {path!r} holds no state dict (names and tensors)")
    student = {key.removeprefix("student."): value for key, value in stored.items() if key.startswith("student.")}
    return student or stored


def load_weights(module: nn.Module, path: str | os.PathLike) -> nn.Module:
    """``module``, with the weights of the file (see :func:`read_weights`).

    Raises:
        ValueError: names or shapes differ; the first of them are listed.
    """
    weights = read_weights(path)
    if all(name.startswith("module.") for name in weights):  # saved from DataParallel
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} has no place in the network" for name in weights if name not in own]
    problems += [f"{n} is {list(w.shape)}, the network's {list(own[n].shape)}" for n, w in weights.items() if n in own and w.shape != own[n].shape]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"weights: {os.fspath(path)!r} does not fit {type(module).__name__}: {'; '.join(problems[:4])}{more}")
    module.load_state_dict(weights)
    return module


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
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{path!r} cannot be read as weights (tensors and plain values; nothing else is unpickled): {reason}") from error
