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

    The network itself is not changed: this is a copy, in float32 if the network is in half
    precision. Each batch norm behind a convolution is part of the convolution's weights, if the
    output is the same up to rounding.

    Args:
        network: any module with image inputs.
        layer: name of the layer whose output is returned.
        device: where to run.

    Raises:
        TypeError: the network is no module, or a scripted one.
        ValueError: there is no such layer, or the network cannot be copied.
    """

    def __init__(self, network: nn.Module, layer: str, device: torch.device):
        check_module(network)
        FeatureTaps(network, [layer])  # raises if there is no such layer
        self.kind, self.layer = type(network).__name__, layer
        try:
            copied = copy.deepcopy(network)
        except RuntimeError as error:  # of torch, for tensors that are no leaves of the graph
            raise ValueError(f"model: this {self.kind} cannot be copied, which torch's old weight_norm and pruning prevent: {error}") from error
        self.dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        if self.dtype in (torch.float16, torch.bfloat16):  # too coarse for small noise
            copied, self.dtype = copied.float(), torch.float32
        self.original = copied.to(device).eval().requires_grad_(False)
        self.network: nn.Module | None = None  # made for the first images

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
            raise RuntimeError(
                f"the layer {self.layer!r} of {self.kind} did not run in its forward pass: give another layer, or the network as it was before "
                "torch.export or torch.compile, which do not call layers"
            )
        finally:
            handle.remove()
        if not isinstance(output, Tensor) or output.dim() < 2 or len(output) != len(image):
            shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the output of layer {self.layer!r} must be a tensor [B, ...] for {len(image)} images, got {shape}")
        if not output.is_floating_point():
            raise ValueError(f"the output of layer {self.layer!r} must be real floating-point numbers, got {output.dtype}")
        return output

    @torch.no_grad()
    def _folded(self, image: Tensor) -> nn.Module:
        """Return a copy with folded batch norms if its output is the same, else the original."""
        expected = self._output(self.original, image.clone())
        pairs = self._pairs(image.clone())
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
        try:
            error = (self._output(folded, image.clone()) - expected).abs().max()
        except Exception:  # a forward pass that reads what was folded, such as the weight of a batch norm
            return self.original
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
            if isinstance(module, nn.Conv2d) and "weight" in module._parameters:  # not computed from other parameters
                handles.append(module.register_forward_hook(lambda _m, _i, output, name=name: after_convolution(name, output)))
            elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
                handles.append(module.register_forward_pre_hook(lambda _m, inputs, name=name: before_norm(name, inputs)))
        try:
            self._output(self.original, image)
        finally:
            for handle in handles:
                handle.remove()
        return [(a, b) for a, b in pairs if runs[a] == runs[b] == 1 and a != self.layer]


def check_module(network: object) -> None:
    """Raise unless it is a module with values, whose layers can be tapped."""
    if not isinstance(network, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(network).__name__}")
    if isinstance(network, torch.jit.ScriptModule):
        raise TypeError("model must be the module before torch.jit.script or torch.jit.trace, whose layers cannot be tapped")
    for name, parameter in network.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
            raise ValueError(f"model: the parameter {name!r} has no values yet: load weights, and run lazy layers once")


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, module)
