"""Which of torch's transforms is applied to a call of an op, and the derivative of a derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def takes_reference(*arguments) -> bool:
    """Whether this call must go through the reference, because the C++ derivative does not exist for the transform that is applied.

    The answer is yes under ``torch.func.grad``, ``vjp``, ``jvp`` and similar, also if they stand
    outside of the vmap whose rule asks, and in forward mode if one of the arguments is a tensor with
    a tangent. Tensors that vmap has wrapped are left to the op's vmap rule, which asks again.
    """
    if torch._C._are_functorch_transforms_active():
        if torch.compiler.is_compiling():  # compiled code cannot ask which transform it is
            return True
        functorch = torch._C._functorch
        if functorch.peek_interpreter_stack().key() != functorch.TransformType.Vmap:
            return True
        if any(isinstance(t, Tensor) and functorch.is_gradtrackingtensor(t) for t in arguments):
            return True
    return forward_ad._current_level >= 0 and any(isinstance(t, Tensor) and _has_tangent(t) for t in arguments)


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _has_tangent(t: Tensor) -> bool:
    return not torch._C._functorch.is_batchedtensor(t) and forward_ad.unpack_dual(t).tangent is not None


def is_linearised() -> bool:
    """Whether ``torch.func.linearize`` traces the derivative in forward mode."""
    if forward_ad._current_level < 0:
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None


def is_batched(t) -> bool:
    """Whether vmap stands behind a tensor: of ``torch.func``, or the older one of ``is_grads_batched``."""
    functorch = torch._C._functorch
    return isinstance(t, Tensor) and (functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t))


def usable(tensor: Tensor | None) -> Tensor | None:
    """The tensor in a form that autograd can save: one that was made under ``torch.inference_mode`` is copied."""
    if torch.compiler.is_compiling():  # compiled code cannot ask, and is run outside of inference mode
        return tensor
    if isinstance(tensor, Tensor) and tensor.is_inference() and not torch.is_inference_mode_enabled():
        return tensor.clone()
    return tensor


def _handle(t: Tensor) -> Tensor:
    """A view of t with a place of its own in the graph: a derivative with respect to it counts the paths through this view and no other path that
    leads to t (the upstream gradient may depend on t, or a second input may), and still leads back to t."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def second_derivative(
    reference: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],  # one for each result of the reference
    wanted: Sequence[bool],  # the inputs whose gradients the backward returns
    cotangents: Sequence[Tensor | None],  # of those gradients
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of ``sum_i <cotangents[i], backward(upstream, inputs)[i]>`` with respect to upstream and to inputs."""
    create_graph = torch.is_grad_enabled()
    chosen = [i for i, c in enumerate(cotangents) if c is not None and wanted[i] and inputs[i] is not None]
    to_upstream, to_inputs = [None] * len(upstream), [None] * len(inputs)
    if not chosen:
        return to_upstream, to_inputs
    with torch.enable_grad():
        given = [None if t is None else _handle(t) if t.requires_grad or i in chosen else t for i, t in enumerate(inputs)]
        above = [None if g is None else _handle(g) if g.requires_grad else g for g in upstream]
        results = [(r, g) for r, g in zip(reference(*given), above, strict=True) if g is not None and r.requires_grad]
        if not results:
            return to_upstream, to_inputs
        first = torch.autograd.grad(
            [r for r, _ in results],
            [given[i] for i in chosen],
            [g.to(r.dtype) for r, g in results],
            create_graph=True,
            allow_unused=True,
        )
        pairs = [(f, cotangents[i]) for f, i in zip(first, chosen, strict=True) if f is not None and f.requires_grad]
        # What the caller does not differentiate needs no gradient; upstream and inputs share one list for one pass.
        sources = [(to_upstream, j, g) for j, g in enumerate(above) if g is not None and g.requires_grad]
        sources += [(to_inputs, i, t) for i, t in enumerate(given) if t is not None and t.requires_grad]
        if not pairs:
            return to_upstream, to_inputs
        second = torch.autograd.grad(
            [f for f, _ in pairs], [t for *_, t in sources], [c.to(f.dtype) for f, c in pairs], create_graph=create_graph, allow_unused=True
        )
    for (to, position, _), gradient in zip(sources, second, strict=True):
        to[position] = gradient
    return to_upstream, to_inputs


def examples_first(size: int, tensors: Sequence[Tensor | None], dims: Sequence[int | None]) -> list[Tensor | None]:
    """Tensors with the dimension that vmap hides in front; those that have none are expanded."""
    return [None if t is None else t.movedim(d, 0) if d is not None else t.expand(size, *t.shape) for t, d in zip(tensors, dims, strict=True)]
