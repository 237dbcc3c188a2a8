"""Let several networks use the first layers of one network."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class SharedLayers:
    """The layers of a network before the layer ``split``, which other networks use, too.

    The other networks have the same architecture. Their layers before ``split`` are replaced by
    placeholders, which return what the layers of the first network returned. So these layers run
    once, have one set of weights and of batch norm statistics, and receive gradients from all
    networks.

    >>> shared = SharedLayers(network, "layer3", images)
    >>> shared.replace_layers(other)
    >>> with shared.recorded(network) as outputs:
    ...     logits = network(images)
    >>> with shared.replayed(other, outputs):
    ...     other_logits = other(images)

    Args:
        network: the first network. It is run once.
        split: name of the first layer that is not shared.
        image: images [B, C, H, W] for this run.

    Raises:
        ValueError: the network has no layer of this name; there is no layer with parameters before
            it; or a layer with parameters runs both before and behind it.
    """

    def __init__(self, network: nn.Module, split: str, image: Tensor):
        if split not in dict(network.named_modules()) or split == "":
            raise ValueError(f"split: {type(network).__name__} has no layer {split!r}; its layers are {[n for n, _ in network.named_children()]}")
        self.split = split
        self.calls = _calls_before(network, split, image)
        layers = dict(network.named_modules())
        self.shapes = {name: _shapes(layers[name]) for name in self.calls}
        if not any(_has_state(layers[name]) for name in self.calls):
            raise ValueError(f"split: no layer of {type(network).__name__} before {split!r} has parameters, so there is nothing to share")
        probe = copy.deepcopy(network)
        self.replace_layers(probe)
        with self.recorded(network) as outputs:
            expected = network(image)
        versions = _versions(outputs)
        with self.replayed(probe, outputs):
            found = probe(image)
        stem = outputs[""][0] if outputs[""] else None
        self.stem_shape = tuple(stem.shape) if isinstance(stem, Tensor) else ()  # of the input of split
        if _versions(outputs) != versions or not _equal(expected, found):
            raise ValueError(
                f"split: {type(network).__name__} cannot be divided at {split!r}, because its forward changes the output of a layer in place "
                "(such as x += y or F.relu(x, inplace=True)); use out-of-place operations between the layers before it"
            )

    def replace_layers(self, network: nn.Module) -> None:
        """Replace the layers of another network.

        Raises:
            ValueError: the network lacks one of the layers, or they have other shapes.
        """
        layers = dict(network.named_modules())
        missing = next((name for name in (*self.calls, self.split) if name not in layers), None)
        if missing is not None:
            raise ValueError(f"split needs networks of one architecture, but {type(network).__name__} has no layer {missing!r}")
        kind = type(network).__name__
        for name, shapes in self.shapes.items():
            found = _shapes(layers[name])
            if found != shapes:
                key = next(k for k in [*shapes, *found] if shapes.get(k) != found.get(k))
                raise ValueError(
                    f"split needs networks of one architecture, but the layer {name!r} of {kind} differs from that of the student: {key} has the "
                    f"shape {found.get(key)}, and {shapes.get(key)} in the student"
                )
        for name in self.calls:
            parent, _, attribute = name.rpartition(".")
            layer = layers[name]
            setattr(network.get_submodule(parent), attribute, Replay(None if _has_state(layer) else layer))

    def restore_layers(self, network: nn.Module, source: nn.Module) -> nn.Module:
        """Return a copy of another network, with copies of the shared layers of ``source``."""
        network = copy.deepcopy(network)
        for name in self.calls:
            parent, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(parent), attribute, copy.deepcopy(source.get_submodule(name)))
        return network

    @contextlib.contextmanager
    def recorded(self, network: nn.Module) -> Iterator[dict[str, list]]:
        """Record the outputs of the shared layers, in the order of their calls.

        The inputs of the layer ``split`` are recorded under the name "".
        """
        outputs: dict[str, list] = {name: [] for name in ("", *self.calls)}
        handles = [
            network.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, name=name: outputs[name].append(output))
            for name in self.calls
        ]
        split = network.get_submodule(self.split)
        handles.append(split.register_forward_pre_hook(lambda _module, inputs: outputs[""].extend(inputs)))
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def replayed(self, network: nn.Module, outputs: dict[str, list]) -> Iterator[None]:
        """Let the placeholders in another network return the recorded outputs."""
        placeholders = {name: network.get_submodule(name) for name in self.calls}
        for name, count in self.calls.items():
            placeholders[name].outputs = outputs[name][:count]  # type: ignore[assignment]
        try:
            yield
        finally:
            for placeholder in placeholders.values():
                placeholder.outputs = []  # type: ignore[assignment]


class Replay(nn.Module):
    """Placeholder that returns recorded outputs, one for each call.

    Args:
        layer: a layer without parameters, which runs when there are no more outputs, because it
            also runs behind the split.
    """

    def __init__(self, layer: nn.Module | None):
        super().__init__()
        self.layer = layer
        self.outputs: list = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.outputs:
            return self.outputs.pop(0)
        if self.layer is None:
            raise RuntimeError("this layer is shared with another network, which must run first (kdkernels.models.shared_layers)")
        return self.layer(*args, **kwargs)


def _shapes(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in the state of a layer."""
    return {name: tuple(value.shape) for name, value in layer.state_dict().items()}


def _versions(outputs: dict[str, list]) -> list[int]:
    """Return how often each recorded tensor was changed in place."""
    return [output._version for values in outputs.values() for output in values if isinstance(output, Tensor)]


def _has_state(layer: nn.Module) -> bool:
    return any(True for _ in layer.parameters()) or any(True for _ in layer.buffers())


def _calls_before(network: nn.Module, split: str, image: Tensor) -> dict[str, int]:
    """Return the outermost layers that run before ``split``, with their numbers of calls there."""
    before: dict[str, int] = {}
    behind: set[str] = set()
    running: list[str] = []
    reached = False

    def begin(name: str) -> None:
        nonlocal reached
        reached = reached or name == split
        running.append(name)

    def end(name: str) -> None:
        running.pop()
        if reached:
            behind.add(name)
        else:
            before[name] = before.get(name, 0) + 1

    handles = []
    for name, layer in network.named_modules():
        if name:
            handles.append(layer.register_forward_pre_hook(lambda _module, _inputs, name=name: begin(name)))
            handles.append(layer.register_forward_hook(lambda _module, _inputs, _output, name=name: end(name)))
    try:
        network(image)
    finally:
        for handle in handles:
            handle.remove()
    if not reached:
        raise ValueError(f"split: the layer {split!r} of {type(network).__name__} does not run")
    layers = dict(network.named_modules())
    for name in before:
        if name in behind and _has_state(layers[name]):
            raise ValueError(f"split: the layer {name!r} of {type(network).__name__} runs before and behind {split!r}, so it cannot be shared")
    return {name: count for name, count in before.items() if not any(name.startswith(f"{other}.") for other in before)}


def _equal(first: object, second: object) -> bool:
    """Return whether two outputs of networks are equal, up to rounding."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.allclose(first, second, rtol=1e-4, atol=1e-5)
    if isinstance(first, dict) and isinstance(second, dict):
        return all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, Sequence) and isinstance(second, Sequence):
        return all(_equal(a, b) for a, b in zip(first, second, strict=True))
    return True
