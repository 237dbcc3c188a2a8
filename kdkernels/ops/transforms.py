"""Detection of torch's function transforms around a call of an op, and second derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad


def takes_reference(*arguments: object) -> bool:
    """Return whether this call must use the reference instead of the op.

    The op has no derivative for ``torch.func`` transforms such as ``grad``, ``vjp`` and ``jvp``,
    and none for forward mode. The result is true if the innermost transform is one of these; if it
    is vmap and an outer transform tracks the gradient of an argument; and in forward mode if an
    argument has a tangent. If only vmap is active, the op is called, and its vmap rule calls this
    function again for the unwrapped tensors.
    """
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():  # compiled code cannot find out which transform is active
            return True
        functorch = torch._C._functorch
        if functorch.peek_interpreter_stack().key() != functorch.TransformType.Vmap:
            return True
        if any(isinstance(t, Tensor) and functorch.is_gradtrackingtensor(t) for t in arguments):
            return True
    return forward_ad._current_level >= 0 and any(isinstance(t, Tensor) and _has_tangent(t) for t in arguments)


def is_transformed() -> bool:
    """Return whether a ``torch.func`` transform or forward mode is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _has_tangent(t: Tensor) -> bool:
    return not torch._C._functorch.is_batchedtensor(t) and forward_ad.unpack_dual(t).tangent is not None


def is_linearized() -> bool:
    """Return whether ``torch.func.linearize`` is tracing the derivative in forward mode."""
    if forward_ad._current_level < 0:
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def is_batched(t: object) -> bool:
    """Return whether ``torch.func.vmap`` or the vmap of ``is_grads_batched`` wraps t."""
    functorch = torch._C._functorch
    return isinstance(t, Tensor) and (functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t))


@overload
def clone_inference_tensor(tensor: Tensor) -> Tensor: ...


@overload
def clone_inference_tensor(tensor: Any) -> Any: ...


def clone_inference_tensor(tensor: Any) -> Any:
    """Copy a tensor that was created under ``torch.inference_mode``, which autograd cannot save.

    Other values, and all tensors while inference mode is active, are returned as they are.
    """
    if torch.compiler.is_compiling():  # compiled code cannot query this, and runs outside inference mode
        return tensor
    if isinstance(tensor, Tensor) and tensor.is_inference() and not torch.is_inference_mode_enabled():
        return tensor.clone()
    return tensor


def _independent_view(t: Tensor) -> Tensor:
    """Return a view of t that is a separate node of the autograd graph.

    A derivative with respect to the view includes only the paths through the view, and no other
    path to t: the upstream gradient or another input may also depend on t. The view itself stays
    connected to t.
    """
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def second_derivative(
    reference: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],  # one for each result of the reference
    wanted: Sequence[bool],  # the inputs whose gradients the backward returns
    cotangents: Sequence[Tensor | None],  # with respect to these gradients
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Differentiate ``sum_i <cotangents[i], backward(upstream, inputs)[i]>``.

    Returns:
        The gradients with respect to ``upstream`` and to ``inputs``; None for those that do not
        require one.
    """
    create_graph = torch.is_grad_enabled()
    differentiated = {i: c for i, c in enumerate(cotangents) if c is not None and wanted[i] and inputs[i] is not None}
    to_upstream: list[Tensor | None] = [None] * len(upstream)
    to_inputs: list[Tensor | None] = [None] * len(inputs)
    if not differentiated:
        return to_upstream, to_inputs
    with torch.enable_grad():
        input_views = [None if t is None else _independent_view(t) if t.requires_grad or i in differentiated else t for i, t in enumerate(inputs)]
        upstream_views = [None if g is None else _independent_view(g) if g.requires_grad else g for g in upstream]
        results = [(r, g) for r, g in zip(reference(*input_views), upstream_views, strict=True) if g is not None and r.requires_grad]
        if not results:
            return to_upstream, to_inputs
        first_gradients = torch.autograd.grad(
            [r for r, _ in results],
            [t for i, t in enumerate(input_views) if t is not None and i in differentiated],
            [g.to(r.dtype) for r, g in results],
            create_graph=True,
            allow_unused=True,
        )
        pairs = [(f, c) for f, c in zip(first_gradients, differentiated.values(), strict=True) if f is not None and f.requires_grad]
        # Only tensors that require a gradient get one. One list of upstream gradients and inputs is
        # enough for a single call of autograd.grad.
        sources = [(to_upstream, j, g) for j, g in enumerate(upstream_views) if g is not None and g.requires_grad]
        sources += [(to_inputs, i, t) for i, t in enumerate(input_views) if t is not None and t.requires_grad]
        if not pairs:
            return to_upstream, to_inputs
        second_gradients = torch.autograd.grad(
            [f for f, _ in pairs], [t for *_, t in sources], [c.to(f.dtype) for f, c in pairs], create_graph=create_graph, allow_unused=True
        )
    for (target, position, _), gradient in zip(sources, second_gradients, strict=True):
        target[position] = gradient
    return to_upstream, to_inputs


def examples_first(size: int, tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> list[Any]:
    """Move the vmap dimension of each tensor to the front; expand tensors that have none."""
    return [None if t is None else t.movedim(d, 0) if d is not None else t.expand(size, *t.shape) for t, d in zip(tensors, dims, strict=True)]
