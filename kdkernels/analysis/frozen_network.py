"""A fast copy of a network for inference and gradients with respect to the input."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..models.taps import FeatureTaps

TOLERANCE = 1e-4  # of the features of the copy, relative to their largest magnitude


class _Reached(Exception):
    """Carries the output of the layer out of the network."""

    def __init__(self, output: object):
        super().__init__()
        self.output = output


class FrozenNetwork:
    """The layers of a network up to ``layer``, in eval mode and without gradients of the weights.

    The network itself is not changed: this is a copy. Each batch norm behind a convolution is part
    of the convolution's weights, if the output is the same up to rounding.

    Args:
        network: any module with image inputs.
        layer: name of the layer whose output is returned.
        device: where to run.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(self, network: nn.Module, layer: str, device: torch.device):
        FeatureTaps(network, [layer])  # raises if there is no such layer
        self.kind, self.layer = type(network).__name__, layer
        self.original = copy.deepcopy(network).to(device).eval().requires_grad_(False)
        self.network: nn.Module | None = None  # made for the first images
        self.dtype = next(network.parameters(), torch.empty(0)).dtype

    def __call__(self, image: Tensor) -> Tensor:
        """Return the output of the layer [B, ...].

        Raises:
            RuntimeError: the layer does not run.
            ValueError: its output is not a tensor [B, ...].
        """
        if self.network is None:
            self.network = self._folded(image)
        return self._output(self.network, image)

    def _output(self, network: nn.Module, image: Tensor) -> Tensor:
        def leave(_module: nn.Module, _inputs: object, output: object) -> None:
            raise _Reached(output)

        handle = network.get_submodule(self.layer).register_forward_hook(leave)
        try:
            network(image)
        except _Reached as reached:
            output = reached.output
        else:
            raise RuntimeError(f"the layer {self.layer!r} of {self.kind} did not run in its forward pass: give another layer")
        finally:
            handle.remove()
        if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != len(image):
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the output of layer {self.layer!r} must be a tensor [B, ...] for {len(image)} images, got {shape}")
        return output

    @torch.no_grad()
    def _folded(self, image: Tensor) -> nn.Module:
        """Return a copy with folded batch norms if its output is the same, else the original."""
        expected = self._output(self.original, image)
        pairs = self._pairs(image)
        folded = copy.deepcopy(self.original)
        for convolution, norm in pairs:
            _replace(
                folded,
                convolution,
                fuse_conv_bn_eval(cast(nn.Conv2d, folded.get_submodule(convolution)), cast(nn.BatchNorm2d, folded.get_submodule(norm))),
            )
            _replace(folded, norm, nn.Identity())
        folded.requires_grad_(False)
        cast(Any, folded).to(memory_format=torch.channels_last)
        error = (self._output(folded, image) - expected).abs().max()
        return folded if bool(error <= TOLERANCE * expected.abs().max()) else self.original

    def _pairs(self, image: Tensor) -> list[tuple[str, str]]:
        """Return the names of convolutions and of the batch norms that read their outputs."""
        outputs: dict[int, tuple[str, Tensor]] = {}  # by id; the tensors are kept, so that an id is not used again
        runs: dict[str, int] = {}
        pairs: list[tuple[str, str]] = []
        handles = []

        def after_convolution(name: str, output: Any) -> None:
            runs[name] = runs.get(name, 0) + 1
            outputs[id(output)] = name, output

        def before_norm(name: str, inputs: tuple) -> None:
            runs[name] = runs.get(name, 0) + 1
            if inputs and id(inputs[0]) in outputs:
                pairs.append((outputs[id(inputs[0])][0], name))

        for name, module in self.original.named_modules():
            if isinstance(module, nn.Conv2d):
                handles.append(module.register_forward_hook(lambda _m, _i, output, name=name: after_convolution(name, output)))
            elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                handles.append(module.register_forward_pre_hook(lambda _m, inputs, name=name: before_norm(name, inputs)))
        try:
            self._output(self.original, image)
        finally:
            for handle in handles:
                handle.remove()
        return [(a, b) for a, b in pairs if runs[a] == runs[b] == 1 and a != self.layer]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, module)
