"""Registration of the ops' Python parts, by :func:`register`.

The C++ extension has registered the schema, the CPU kernels and the first derivative of each op.
:func:`register` adds the parts that follow from the schema and the reference:

- forward mode and ``torch.func`` transforms: the reference, which torch can differentiate in every
  mode;
- second and higher derivatives: the reference, differentiated twice;
- vmap, and the fake kernels of the backward op;
- CUDA tensors: the launchers in ``kdkernels.triton``, imported by the first call;
- devices without kernels (``DEVICES_WITHOUT_KERNELS``): the reference, differentiated by autograd.

The reference never replaces a missing kernel on the CPU or on CUDA. A missing kernel there raises
an error that says what to install.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..options import NAMES
from .transforms import clone_inference_tensor, examples_first, second_derivative, takes_reference

# Dispatch keys of the devices for whose autograd key Python can register kernels.
DEVICES_WITHOUT_KERNELS = ("MPS", "XPU", "HPU", "XLA", "IPU", "Lazy", "PrivateUse1")


def register(
    name: str,
    reference: Callable[..., Tensor | tuple[Tensor | None, ...]],
    *,
    launchers: str | None = None,
    vmap: str | Callable = "each",
    reference_of_backward: Callable[..., tuple[Tensor, ...]] | None = None,
    fake_of_backward: Callable | None = None,
) -> Callable:
    """Complete the op ``kdkernels::<name>`` and its backward op ``kdkernels::<name>_backward``.

    Args:
        reference: the definition in plain PyTorch. Its parameters are named like the arguments of
            the op that it receives; options are passed as strings. It returns the differentiable
            results, which are the first results of the op.
        launchers: the module of ``kdkernels.triton`` that contains a function for each op of the
            family, with the op's name and arguments. ``None`` if the op's module itself registers
            the kernels for GPUs and for devices without kernels.
        vmap: "samples" if the first dimension of every tensor is a batch of independent samples;
            the examples of vmap are then handled as more samples. "each" calls the op once for each
            example. Or a rule for :func:`torch.library.register_vmap`.
        reference_of_backward: the function for second derivatives, if it is not ``reference``. Its
            parameters are named like arguments of the backward op.
        fake_of_backward: the fake kernel of the backward op, if the shapes and dtypes of the
            gradients are not those of the inputs.

    Returns:
        A function with the arguments of the op. It calls the op or the reference, and returns only
        the differentiable results.
    """
    op, backward = _Schema(name), _Schema(f"{name}_backward")
    call_reference = _Reference(reference, op)
    differentiable_results = len(backward.upstream)

    def all_results(*arguments):
        if takes_reference(*arguments):
            return call_reference.all_results([clone_inference_tensor(a) for a in arguments])
        return op.overload(*arguments)

    def call(*arguments):
        if takes_reference(*arguments):
            results = call_reference([clone_inference_tensor(a) for a in arguments])
            return results if differentiable_results > 1 else results[0]
        results = op.overload(*arguments)
        return results if op.results == 1 else results[0] if differentiable_results == 1 else results[:differentiable_results]

    inputs = [op.names[i] for i in op.tensors[: backward.results]]
    derive_double_backward(backward, _Reference(reference_of_backward or reference, backward), inputs)
    torch.library.register_fake(f"kdkernels::{backward.name}", fake_of_backward or _fake_gradients(backward, inputs))
    derive_vmap(backward.name)
    if vmap == "samples":
        torch.library.register_vmap(f"kdkernels::{name}", _vmap_over_samples(op, all_results))
    elif vmap == "each":
        derive_vmap(name, all_results)
    else:
        torch.library.register_vmap(f"kdkernels::{name}", cast(Callable, vmap))
    _complete_rescale(name)
    if launchers is not None:
        for op_name in (name, backward.name, f"{name}_rescale", f"{name}_rescale_"):
            if hasattr(torch.ops.kdkernels, op_name):
                torch.library.impl(f"kdkernels::{op_name}", "CUDA")(_launcher(launchers, op_name))
        for device_key in DEVICES_WITHOUT_KERNELS:
            torch.library.impl(f"kdkernels::{name}", (device_key, f"Autograd{device_key}"))(call_reference.kernel)
    return call


class _Schema:
    """The names and kinds of the arguments of the op ``kdkernels::<name>``, from its schema."""

    def __init__(self, name: str):
        self.name = name
        self.overload = getattr(torch.ops.kdkernels, name).default
        arguments = self.overload._schema.arguments
        self.names = [a.name for a in arguments]
        self.tensors = [i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]
        self.upstream = [i for i in self.tensors if self.names[i].startswith("grad")]  # upstream gradients, in a backward op
        self.results = len(self.overload._schema.returns)


class _Reference:
    """The reference, called with the arguments of an op."""

    def __init__(self, function: Callable, op: _Schema):
        self.function, self.op = function, op
        self.positions = {parameter: op.names.index(parameter) for parameter in inspect.signature(function).parameters if parameter in op.names}

    def __call__(self, arguments: Sequence) -> tuple[Tensor | None, ...]:
        reference_arguments = {
            parameter: NAMES[parameter][arguments[position]] if parameter in NAMES else arguments[position]
            for parameter, position in self.positions.items()
        }
        results = self.function(**reference_arguments)
        return results if isinstance(results, tuple) else (results,)

    def all_results(self, arguments: Sequence) -> Tensor | tuple[Tensor, ...]:
        """Return as many results as the op, with empty tensors for those without a derivative."""
        # Only the reference of truncated_svd returns None. It is not called here, because the op
        # has its own vmap rule.
        results = cast(tuple[Tensor, ...], self(arguments))
        return (*results, *(results[0].new_empty(0) for _ in range(self.op.results - len(results)))) if self.op.results > 1 else results[0]

    def kernel(self, *arguments) -> Tensor | tuple[Tensor, ...]:
        """Implement the op on devices without kernels. Autograd records and differentiates the
        operations of the reference.
        """
        for name, value in zip(self.op.names, arguments, strict=False):
            if (name == "save_grad" and value) or (name == "wanted" and any(value)):
                raise NotImplementedError(
                    f"kdkernels::{self.op.name} computes no gradients in the forward pass on this device, got {name}={value}: "
                    "pass False and use autograd"
                )
        return self.all_results(arguments)


def derive_double_backward(backward: _Schema, reference: _Reference, inputs: Sequence[str]) -> None:
    """Register the derivative of a backward op, computed by differentiating the reference twice.

    ``inputs`` are the names of the forward op's inputs, in the order of the gradients that the
    backward op returns. If the backward op has an argument ``wanted``, it selects the gradients to
    compute.
    """
    input_positions = [backward.names.index(name) for name in inputs]
    constant_positions = [i for i in reference.positions.values() if i in backward.tensors and i not in input_positions]
    saved_positions = (*backward.upstream, *input_positions, *constant_positions)
    wanted = backward.names.index("wanted") if "wanted" in backward.names else None

    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(inputs[i] for i in saved_positions))
        ctx.arguments = [None if isinstance(a, Tensor) else a for a in inputs]

    def differentiate(ctx, *cotangents):
        arguments = list(ctx.arguments)
        for position, tensor in zip(saved_positions, ctx.saved_tensors, strict=True):
            arguments[position] = tensor

        def from_inputs(*new_inputs):
            replaced = list(arguments)
            for position, tensor in zip(input_positions, new_inputs, strict=True):
                replaced[position] = tensor
            return reference(replaced)

        wanted_inputs = arguments[wanted] if wanted is not None else [True] * len(input_positions)
        to_upstream, to_inputs = second_derivative(
            from_inputs, [arguments[i] for i in input_positions], [arguments[i] for i in backward.upstream], wanted_inputs, cotangents
        )
        result: list[Tensor | None] = [None] * len(arguments)
        for position, gradient in zip((*backward.upstream, *input_positions), (*to_upstream, *to_inputs), strict=True):
            result[position] = gradient
        return tuple(result)

    torch.library.register_autograd(f"kdkernels::{backward.name}", differentiate, setup_context=setup_context)


def _fake_gradients(backward: _Schema, inputs: Sequence[str]) -> Callable:
    """Return a fake kernel whose gradients have the shape, dtype and strides of their inputs.
    Gradients that are not wanted are empty.
    """
    positions = [backward.names.index(name) for name in inputs]
    wanted = backward.names.index("wanted") if "wanted" in backward.names else None

    def fake(*arguments):
        inputs_of_call = [arguments[i] for i in positions]
        wanted_inputs = arguments[wanted] if wanted is not None else [True] * len(inputs_of_call)
        gradients = tuple(
            torch.empty_like(x) if want and x is not None else inputs_of_call[0].new_empty(0)
            for x, want in zip(inputs_of_call, wanted_inputs, strict=True)
        )
        return gradients if backward.results > 1 else gradients[0]

    return fake


def _complete_rescale(name: str) -> None:
    """Complete the ops that multiply a saved gradient by the upstream gradient, if they exist."""
    if hasattr(torch.ops.kdkernels, f"{name}_rescale_"):
        torch.library.register_fake(f"kdkernels::{name}_rescale_", lambda *arguments: None)
    if hasattr(torch.ops.kdkernels, f"{name}_rescale"):
        torch.library.register_fake(f"kdkernels::{name}_rescale", lambda grad, *arguments: torch.empty_like(grad))
        derive_vmap(f"{name}_rescale")


def derive_vmap(name: str, call: Callable | None = None) -> None:
    """Register the general vmap rule of the op ``kdkernels::<name>``: call it once for each
    example, and stack the results.
    """
    call_op = call or getattr(torch.ops.kdkernels, name).default

    @torch.library.register_vmap(f"kdkernels::{name}")
    def rule(info, in_dims, *arguments):
        flat, structure = pytree.tree_flatten(arguments)
        dims, _ = pytree.tree_flatten(in_dims, is_leaf=lambda dim: dim is None)
        batched = [isinstance(argument, Tensor) and dim is not None for argument, dim in zip(flat, dims, strict=True)]

        def call_one(example: int | None):  # None: zeros instead of an example, for the shapes of an empty batch
            def pick(argument, dim):
                return argument.select(dim, example) if example is not None else argument.new_zeros(argument.movedim(dim, 0).shape[1:])

            example_arguments = [
                pick(argument, dim) if is_batched else argument for argument, dim, is_batched in zip(flat, dims, batched, strict=True)
            ]
            return pytree.tree_flatten(call_op(*pytree.tree_unflatten(example_arguments, structure)))

        calls = [call_one(i) for i in range(info.batch_size)] or [call_one(None)]
        results = [torch.stack(column)[: info.batch_size] for column in zip(*(leaves for leaves, _ in calls), strict=True)]
        result_structure = calls[0][1]
        return pytree.tree_unflatten(results, result_structure), pytree.tree_unflatten([0] * len(results), result_structure)


def _vmap_over_samples(op: _Schema, call: Callable) -> Callable:
    """Return the vmap rule that handles the examples as more samples of one batch."""

    def rule(info, in_dims, *arguments):
        batched = examples_first(info.batch_size, [arguments[i] for i in op.tensors], [in_dims[i] for i in op.tensors])
        sizes = batched[0].shape[:2]
        replaced = list(arguments)
        for position, tensor in zip(op.tensors, batched, strict=True):
            replaced[position] = None if tensor is None else tensor.flatten(0, 1)
        results = call(*replaced)
        results = results if op.results > 1 else (results,)
        split_results = tuple(
            result.unflatten(0, sizes) if len(result) == sizes.numel() else result.new_empty(info.batch_size, 0) for result in results
        )
        return (split_results, (0,) * len(split_results)) if op.results > 1 else (split_results[0], 0)

    return rule


@functools.cache
def _triton_module(name: str):
    """Import the module of the launchers. Raise RuntimeError if Triton is not installed."""
    try:
        return importlib.import_module(f"kdkernels.triton.{name}")
    except ImportError as error:
        raise RuntimeError(f"{name} on a GPU runs in Triton, which is not installed: pip install triton") from error


def _launcher(module: str, name: str) -> Callable:
    """Return the kernel of an op for CUDA tensors. It checks the values of options, like the C++
    kernels.
    """
    options = [(i, option) for i, option in enumerate(_Schema(name).names) if option in NAMES]

    def launch(*arguments):
        for i, option in options:
            if arguments[i] not in NAMES[option]:
                raise ValueError(f"{option} must be one of {', '.join(f'{v} ({n})' for v, n in NAMES[option].items())}, got {arguments[i]}")
        return getattr(_triton_module(module), name)(*arguments)

    return launch
