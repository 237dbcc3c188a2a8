"""Completes an op whose schema, CPU kernels and first derivative the C++ extension has registered:
:func:`register`.

From the schema and the reference it derives what is not specific to an op:

- forward mode and ``torch.func``: the reference, which torch differentiates in every mode;
- second and higher derivatives: the reference, differentiated twice;
- vmap, and the fake kernels of the backward;
- CUDA tensors: the launchers in ``kdkernels.triton``, imported by the first call;
- devices for which there are no kernels (``DEVICES_WITHOUT_KERNELS``): the reference, which
  autograd differentiates there. It never replaces a kernel on the CPU or on CUDA: what is missing
  there is an error that names the cure.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..options import NAMES
from .transforms import examples_first, second_derivative, takes_reference, usable

# Dispatch keys: the devices of torch whose autograd key Python can register kernels for.
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
    """Completes the op ``kdkernels::<name>`` and its backward ``kdkernels::<name>_backward``.

    Args:
        reference: the definition in plain PyTorch. Its parameters have the names of arguments of
            the op and receive these arguments, options as the strings they stand for. It returns
            the results that have a derivative, which come first among those of the op.
        launchers: the module of ``kdkernels.triton`` that has a function for each op of the family,
            with the op's name and arguments. ``None`` if the op's own module registers its kernels
            for GPUs and for devices without kernels.
        vmap: "samples" if the first dimension of every tensor counts samples that do not influence
            one another: the examples of vmap become more samples. "each" calls the op once for each
            example. Or a rule as :func:`torch.library.register_vmap` takes it.
        reference_of_backward: for second derivatives, if they need another function than
            ``reference``; its parameters have the names of arguments of the backward.
        fake_of_backward: shapes and dtypes of the gradients, if they are not those of the inputs.

    Returns:
        A function of the arguments of the op that returns its results that have a derivative. It
        chooses between the op and the reference.
    """
    op, backward = _Schema(name), _Schema(f"{name}_backward")
    call_reference = _Reference(reference, op)
    count = len(backward.upstream)

    def all_results(*arguments):
        if takes_reference(*arguments):
            return call_reference.all_results([usable(a) for a in arguments])
        return op.overload(*arguments)

    def call(*arguments):
        if takes_reference(*arguments):
            results = call_reference([usable(a) for a in arguments])
            return results if count > 1 else results[0]
        results = op.overload(*arguments)
        return results if op.results == 1 else results[0] if count == 1 else results[:count]

    inputs = [op.names[i] for i in op.tensors[: backward.results]]
    derive_double_backward(backward, _Reference(reference_of_backward or reference, backward), inputs)
    torch.library.register_fake(f"kdkernels::{backward.name}", fake_of_backward or _fake_gradients(backward, inputs))
    derive_vmap(backward.name)
    if vmap == "samples":
        torch.library.register_vmap(f"kdkernels::{name}", _vmap_over_samples(op, all_results))
    elif vmap == "each":
        derive_vmap(name, all_results)
    else:
        torch.library.register_vmap(f"kdkernels::{name}", vmap)
    _complete_rescale(name)
    if launchers is not None:
        for member in (name, backward.name, f"{name}_rescale", f"{name}_rescale_"):
            if hasattr(torch.ops.kdkernels, member):
                torch.library.impl(f"kdkernels::{member}", "CUDA")(_launcher(launchers, member))
        for key in DEVICES_WITHOUT_KERNELS:
            torch.library.impl(f"kdkernels::{name}", (key, f"Autograd{key}"))(call_reference.kernel)
    return call


class _Schema:
    """What the schema of the op ``kdkernels::<name>`` says about its arguments."""

    def __init__(self, name: str):
        self.name = name
        self.overload = getattr(torch.ops.kdkernels, name).default
        arguments = self.overload._schema.arguments
        self.names = [a.name for a in arguments]
        self.tensors = [i for i, a in enumerate(arguments) if str(a.type) in ("Tensor", "Optional[Tensor]")]
        self.upstream = [i for i in self.tensors if self.names[i].startswith("grad")]  # of a backward: the gradients of the forward's results
        self.results = len(self.overload._schema.returns)


class _Reference:
    """The reference as a function of the arguments of an op."""

    def __init__(self, function: Callable, op: _Schema):
        self.function, self.op = function, op
        self.positions = {p: op.names.index(p) for p in inspect.signature(function).parameters if p in op.names}

    def __call__(self, arguments: Sequence) -> tuple[Tensor | None, ...]:
        given = {p: NAMES[p][arguments[i]] if p in NAMES else arguments[i] for p, i in self.positions.items()}
        results = self.function(**given)
        return results if isinstance(results, tuple) else (results,)

    def all_results(self, arguments: Sequence) -> Tensor | tuple[Tensor, ...]:
        """What the op returns, with an empty tensor for every result that has no derivative."""
        results = self(arguments)
        return (*results, *(results[0].new_empty(0) for _ in range(self.op.results - len(results)))) if self.op.results > 1 else results[0]

    def kernel(self, *arguments) -> Tensor | tuple[Tensor, ...]:
        """The op's kernel on devices without kernels, and its derivative there: autograd records
        what the reference does.
        """
        for name, value in zip(self.op.names, arguments, strict=False):
            if (name == "save_grad" and value) or (name == "wanted" and any(value)):
                raise NotImplementedError(
                    f"kdkernels::{self.op.name} writes no gradients on this device, got {name}={value}: let autograd differentiate it"
                )
        return self.all_results(arguments)


def derive_double_backward(backward: _Schema, reference: _Reference, inputs: Sequence[str]) -> None:
    """Registers the derivative of a backward op: the reference is differentiated twice.

    ``inputs`` names the forward's inputs in the order of the gradients that the op returns;
    ``wanted``, if it is an argument, says which of them are asked for.
    """
    positions = [backward.names.index(name) for name in inputs]
    constants = [i for i in reference.positions.values() if i in backward.tensors and i not in positions]
    kept = (*backward.upstream, *positions, *constants)
    wanted = backward.names.index("wanted") if "wanted" in backward.names else None

    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(inputs[i] for i in kept))
        ctx.arguments = [None if isinstance(a, Tensor) else a for a in inputs]

    def differentiate(ctx, *cotangents):
        arguments = list(ctx.arguments)
        for position, tensor in zip(kept, ctx.saved_tensors, strict=True):
            arguments[position] = tensor

        def from_inputs(*given):
            replaced = list(arguments)
            for position, tensor in zip(positions, given, strict=True):
                replaced[position] = tensor
            return reference(replaced)

        flags = arguments[wanted] if wanted is not None else [True] * len(positions)
        to_upstream, to_inputs = second_derivative(
            from_inputs, [arguments[i] for i in positions], [arguments[i] for i in backward.upstream], flags, cotangents
        )
        result = [None] * len(arguments)
        for position, gradient in zip((*backward.upstream, *positions), (*to_upstream, *to_inputs), strict=True):
            result[position] = gradient
        return tuple(result)

    torch.library.register_autograd(f"kdkernels::{backward.name}", differentiate, setup_context=setup_context)


def _fake_gradients(backward: _Schema, inputs: Sequence[str]) -> Callable:
    """Gradients have the shape, dtype and strides of their inputs; those that are not wanted are
    empty.
    """
    positions = [backward.names.index(name) for name in inputs]
    wanted = backward.names.index("wanted") if "wanted" in backward.names else None

    def fake(*arguments):
        given = [arguments[i] for i in positions]
        flags = arguments[wanted] if wanted is not None else [True] * len(given)
        gradients = tuple(torch.empty_like(x) if flag and x is not None else given[0].new_empty(0) for x, flag in zip(given, flags, strict=True))
        return gradients if backward.results > 1 else gradients[0]

    return fake


def _complete_rescale(name: str) -> None:
    """The ops that multiply a saved gradient by the upstream gradient."""
    if hasattr(torch.ops.kdkernels, f"{name}_rescale_"):
        torch.library.register_fake(f"kdkernels::{name}_rescale_", lambda *arguments: None)
    if hasattr(torch.ops.kdkernels, f"{name}_rescale"):
        torch.library.register_fake(f"kdkernels::{name}_rescale", lambda grad, *arguments: torch.empty_like(grad))
        derive_vmap(f"{name}_rescale")


def derive_vmap(name: str, call: Callable | None = None) -> None:
    """Registers the vmap rule that is right for every op ``kdkernels::<name>``: one call for each
    example, the results stacked.
    """
    call_op = call or getattr(torch.ops.kdkernels, name).default

    @torch.library.register_vmap(f"kdkernels::{name}")
    def rule(info, in_dims, *arguments):
        flat, structure = pytree.tree_flatten(arguments)
        dims, _ = pytree.tree_flatten(in_dims, is_leaf=lambda d: d is None)
        batched = [isinstance(a, Tensor) and d is not None for a, d in zip(flat, dims, strict=True)]

        def call_one(example: int | None):  # None: zeros in the place of an example, for the shapes of an empty batch
            def pick(a, d):
                return a.select(d, example) if example is not None else a.new_zeros(a.movedim(d, 0).shape[1:])

            chosen = [pick(a, d) if b else a for a, d, b in zip(flat, dims, batched, strict=True)]
            return pytree.tree_flatten(call_op(*pytree.tree_unflatten(chosen, structure)))

        calls = [call_one(i) for i in range(info.batch_size)] or [call_one(None)]
        results = [torch.stack(column)[: info.batch_size] for column in zip(*(leaves for leaves, _ in calls), strict=True)]
        form = calls[0][1]
        return pytree.tree_unflatten(results, form), pytree.tree_unflatten([0] * len(results), form)


def _vmap_over_samples(op: _Schema, call: Callable) -> Callable:
    def rule(info, in_dims, *arguments):
        given = examples_first(info.batch_size, [arguments[i] for i in op.tensors], [in_dims[i] for i in op.tensors])
        sizes = given[0].shape[:2]
        replaced = list(arguments)
        for position, tensor in zip(op.tensors, given, strict=True):
            replaced[position] = None if tensor is None else tensor.flatten(0, 1)
        results = call(*replaced)
        results = results if op.results > 1 else (results,)
        split = tuple(r.unflatten(0, sizes) if len(r) == sizes.numel() else r.new_empty(info.batch_size, 0) for r in results)
        return (split, (0,) * len(split)) if op.results > 1 else (split[0], 0)

    return rule


@functools.cache
def _triton_module(name: str):
    try:
        return importlib.import_module(f"kdkernels.triton.{name}")
    except ImportError as error:
        raise RuntimeError(f"{name} on a GPU runs in Triton, which is not installed: pip install triton") from error


def _launcher(module: str, name: str) -> Callable:
    """The kernel of an op for CUDA tensors. It checks the values of options, as the C++ kernels
    do.
    """
    options = [(i, option) for i, option in enumerate(_Schema(name).names) if option in NAMES]

    def launch(*arguments):
        for i, option in options:
            if arguments[i] not in NAMES[option]:
                raise ValueError(f"{option} must be one of {', '.join(f'{v} ({n})' for v, n in NAMES[option].items())}, got {arguments[i]}")
        return getattr(_triton_module(module), name)(*arguments)

    return launch
