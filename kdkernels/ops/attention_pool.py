"""attention_pool and attention_transfer_loss: what a network looks at, and how far a student's look is from a teacher's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import attention_pool as pool_reference
from ..reference import attention_transfer_loss as loss_reference
from .functorch import takes_the_reference

_REDUCES = ("mean", "sum", "max")
_NORMALIZES = (None, "l2", "softmax")
_VARIANTS = ("code", "paper")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_pool_op = torch.ops.kdkernels.attention_pool.default
_loss_op = torch.ops.kdkernels.attention_transfer_loss.default


def attention_pool(
    x: Tensor,  # [B, C, *spatial]
    p: float = 2.0,
    *,
    reduce: str = "mean",
    normalize: str | None = None,
    eps: float = 1e-12,
) -> Tensor:  # [B, *spatial]
    r"""Attention maps of features: the p-th powers of their magnitudes, pooled over the channels.

    .. math:: a_{b,s} = R_c |x_{b,c,s}|^p, \qquad R \in \{\text{mean}, \sum, \max\}

    (Zagoruyko, Komodakis 2017, section 3.1: :math:`F_{sum}^p` and :math:`F_{max}^p`.)

    Args:
        x: features, float64, float32, bfloat16 or float16. One or more spatial dimensions; contiguous (NCHW) and channels_last are both read
            where they lie, and the gradient has their layout.
        p: exponent > 0. 1, 1.5, 2, 3 and 4 have short forms. Where x is 0 the gradient is 0, also for p < 1, where the true one has
            no bound.
        reduce: "mean", "sum" or "max" over the channels. The gradient of a maximum goes to one channel, the first of equals.
        normalize: over the places of a map: "l2", :math:`a / \max(\|a\|_2, \text{eps})` (attention transfer); "softmax" (SAD); or ``None``.
        eps: least divisor of "l2". A map of zeros stays one, and gives no gradient.

    Returns:
        Maps [B, \*spatial], float64 for float64 features, else float32: powers of half-precision numbers leave their range.

    Raises:
        TypeError: x of a wrong type.
        ValueError: fewer than three dimensions, no channel, no place, or an option out of its range.

    The backward is an op of its own; double backward and ``torch.func`` transforms go through :func:`kdkernels.reference.attention_pool`.

    References:
        S. Zagoruyko, N. Komodakis. Paying More Attention to Attention. ICLR 2017. https://arxiv.org/abs/1612.03928
        Y. Hou et al. Learning Lightweight Lane Detection CNNs by Self Attention Distillation. ICCV 2019. https://arxiv.org/abs/1908.00821
    """
    _check_features("x", x)
    _check_options(p, reduce, eps)
    if normalize not in _NORMALIZES:
        raise ValueError(f"normalize must be one of {_NORMALIZES}, got {normalize!r}")
    if takes_the_reference():
        return pool_reference(x, p, reduce=reduce, normalize=normalize, eps=eps)
    return _pool_op(x, p, reduce, normalize or "", eps)[0]


def attention_transfer_loss(
    student: Tensor,  # [B, C, *spatial]
    teacher: Tensor,  # [B, D, *spatial]
    p: float = 2.0,
    *,
    variant: str = "code",
    reduce: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    r"""Distance between the normalised attention maps of a student and a teacher, fused: no map is written to memory.

    With :math:`q = a / \max(\|a\|_2, \text{eps})` over the places of :math:`a =` :func:`attention_pool`, B samples and M places,

    =============  ==============================================================================================
    ``variant``    loss
    =============  ==============================================================================================
    ``"code"``     :math:`\frac{1}{B M} \sum_b \|q_s - q_t\|_2^2`: the authors' code, with a weight of 1000
    ``"paper"``    :math:`\frac{1}{B} \sum_b \|q_s - q_t\|_2`: equation 2 of the paper, without its :math:`\beta / 2`
    =============  ==============================================================================================

    Args:
        student: features, float64, float32, bfloat16 or float16, NCHW or channels_last, read where they lie.
        teacher: features of the same batch; other channels, dtype and layout are welcome. It receives a gradient if, and only if, it
            requires one. Where its extents in space differ, the larger features are averaged to the smaller extents first, before the
            powers, as RepDistiller and mdistiller do (adaptive average pooling, per dimension).
        p: exponent > 0, see :func:`attention_pool`.
        variant: "code" or "paper".
        reduce: how channels become a map. "mean" and "sum" differ by ``eps`` alone, as maps are normalised.
        eps: least divisor.

    Returns:
        A 0-dim tensor, float64 if either input is float64, else float32. 0 for an empty batch.

    Raises:
        TypeError: features of a wrong type.
        ValueError: batches, devices or numbers of dimensions that differ, or an option out of its range.

    The gradient to the student is written in the forward when only the student requires one. Double backward and ``torch.func`` transforms
    go through :func:`kdkernels.reference.attention_transfer_loss`.

    References:
        S. Zagoruyko, N. Komodakis. Paying More Attention to Attention. ICLR 2017. https://arxiv.org/abs/1612.03928
    """
    _check_features("student", student)
    _check_features("teacher", teacher)
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device, got {student.device} and {teacher.device}")
    if student.dim() != teacher.dim() or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student and teacher must have the same batch and as many dimensions, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    _check_options(p, reduce, eps)
    if variant not in _VARIANTS:
        raise ValueError(f"variant must be one of {_VARIANTS}, got {variant!r}")
    if student.shape[2:] != teacher.shape[2:]:
        extents = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = average_to(student, extents), average_to(teacher, extents)
    if takes_the_reference():
        return loss_reference(student, teacher, p, variant=variant, reduce=reduce, eps=eps)
    return _loss_op(student, teacher, p, variant, reduce, eps, False)[0]


def average_to(x: Tensor, extents: list[int]) -> Tensor:
    """Adaptive average pooling of x [B, C, *spatial] to the extents, where they differ."""
    if list(x.shape[2:]) == list(extents):
        return x
    pools = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    if len(extents) not in pools:
        raise ValueError(f"features of {len(extents)} spatial dimensions must have the same extents, got {tuple(x.shape[2:])} and {tuple(extents)}")
    return pools[len(extents)](x, extents)


def _check_features(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16 features, got {x.dtype}")
    if x.dim() < 3 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have the shape [B, C, *spatial] with at least one channel and one place, got {tuple(x.shape)}")


def _check_options(p, reduce, eps) -> None:
    if not 0 < p < math.inf:
        raise ValueError(f"p must be a finite number > 0, got {p}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite number > 0, got {eps}")
    if reduce not in _REDUCES:
        raise ValueError(f"reduce must be one of {_REDUCES}, got {reduce!r}")


def _map_dtype(*features: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [x.dtype for x in features] else torch.float32


def _map_shape(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:])


@torch.library.register_fake("kdkernels::attention_pool")
def _(x, p, reduce, normalize, eps):
    norm = x.new_empty(x.shape[0] if normalize == "l2" else 0, dtype=torch.float64)
    channel = x.new_empty(_map_shape(x) if reduce == "max" else 0, dtype=torch.int32)
    return x.new_empty(_map_shape(x), dtype=_map_dtype(x)), norm, channel


@torch.library.register_fake("kdkernels::attention_pool_backward")
def _(grad, x, maps, norm, channel, p, reduce, normalize, eps):
    return torch.empty_like(x)


@torch.library.register_fake("kdkernels::attention_transfer_loss")
def _(student, teacher, p, variant, reduce, eps, save_grad):
    loss = student.new_empty((), dtype=_map_dtype(student, teacher))
    return loss, torch.empty_like(student) if save_grad else student.new_empty(0)


@torch.library.register_fake("kdkernels::attention_transfer_loss_backward")
def _(grad_loss, student, teacher, p, variant, reduce, eps, wanted):
    return (
        torch.empty_like(student) if wanted[0] else student.new_empty(0),
        torch.empty_like(teacher) if wanted[1] else student.new_empty(0),
    )


@torch.library.register_fake("kdkernels::attention_transfer_loss_rescale_")
def _(grad, grad_loss):
    return None


# Double backward: the vector-Jacobian products of the backwards, through the references.


def _setup_pool(ctx, inputs, output) -> None:
    grad, x, _maps, _norm, _channel, *ctx.options = inputs
    ctx.save_for_backward(grad, x)


def _double_pool(ctx, grad_x):
    grad, x = ctx.saved_tensors
    p, reduce, normalize, eps = ctx.options
    with torch.enable_grad():
        x, grad = (v if v.requires_grad else v.detach().requires_grad_() for v in (x, grad))
        maps = pool_reference(x, p, reduce=reduce, normalize=normalize or None, eps=eps)
        first = torch.autograd.grad(maps, x, grad.to(maps.dtype), create_graph=True)
        second = torch.autograd.grad(first, [grad, x], [grad_x], create_graph=torch.is_grad_enabled(), allow_unused=True)
    return *second, *(None,) * 7


torch.library.register_autograd("kdkernels::attention_pool_backward", _double_pool, setup_context=_setup_pool)


def _setup_loss(ctx, inputs, output) -> None:
    grad_loss, student, teacher, *ctx.options, ctx.wanted = inputs
    ctx.save_for_backward(grad_loss, student, teacher)
    ctx.set_materialize_grads(False)


def _double_loss(ctx, *grads):
    grad_loss, *features = ctx.saved_tensors
    p, variant, reduce, eps = ctx.options
    chosen = [i for i in range(2) if ctx.wanted[i] and grads[i] is not None]
    if not chosen:
        return (None,) * 8
    with torch.enable_grad():
        inputs = [v if v.requires_grad else v.detach().requires_grad_() for v in (grad_loss, *features)]
        loss = loss_reference(*inputs[1:], p, variant=variant, reduce=reduce, eps=eps)
        first = torch.autograd.grad(loss, [inputs[1 + i] for i in chosen], inputs[0].to(loss.dtype), create_graph=True)
        second = torch.autograd.grad(first, inputs, [grads[i] for i in chosen], create_graph=torch.is_grad_enabled(), allow_unused=True)
    return *second, *(None,) * 5


torch.library.register_autograd("kdkernels::attention_transfer_loss_backward", _double_loss, setup_context=_setup_loss)


@torch.library.register_vmap("kdkernels::attention_pool")
def _(info, in_dims, x, p, reduce, normalize, eps):
    """The examples are more samples of one batch."""
    x = x.movedim(in_dims[0], 0)
    flat = x.flatten(0, 1)
    if torch.is_grad_enabled() and x.requires_grad:  # inside functorch, see takes_the_reference
        maps = pool_reference(flat, p, reduce=reduce, normalize=normalize or None, eps=eps)
        return (maps.unflatten(0, x.shape[:2]), x.new_empty(info.batch_size, 0), x.new_empty(info.batch_size, 0)), (0, 0, 0)
    outputs = _pool_op(flat, p, reduce, normalize, eps)
    sizes = x.shape[:2]
    return tuple(o.unflatten(0, sizes) if o.numel() else o.new_empty(info.batch_size, 0) for o in outputs), (0, 0, 0)


@torch.library.register_vmap("kdkernels::attention_transfer_loss")
def _(info, in_dims, student, teacher, p, variant, reduce, eps, save_grad):
    """Normalised maps of all examples at once, then the distance of each."""
    features = [
        x.movedim(d, 0) if d is not None else x.expand(info.batch_size, *x.shape) for x, d in zip((student, teacher), in_dims[:2], strict=True)
    ]
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in features)
    pool = pool_reference if grad else attention_pool
    q = [pool(x.flatten(0, 1), p, reduce=reduce, normalize="l2", eps=eps).flatten(1).unflatten(0, x.shape[:2]) for x in features]
    difference = q[0] - q[1]  # [examples, B, M]
    per_sample = difference.square().mean(2) if variant == "code" else torch.linalg.vector_norm(difference, dim=2)
    return (per_sample.mean(1), student.new_empty(info.batch_size, 0)), (0, 0)


def _triton_kernels():
    try:
        from ..triton import attention_pool as kernels
    except ImportError as error:
        raise RuntimeError("attention_pool on a GPU runs in Triton, which is not installed: pip install triton") from error
    return kernels


@torch.library.impl("kdkernels::attention_pool", "CUDA")
def _(*args):
    return _triton_kernels().attention_pool(*args)


@torch.library.impl("kdkernels::attention_pool_backward", "CUDA")
def _(*args):
    return _triton_kernels().attention_pool_backward(*args)


@torch.library.impl("kdkernels::attention_transfer_loss", "CUDA")
def _(*args):
    return _triton_kernels().attention_transfer_loss(*args)


@torch.library.impl("kdkernels::attention_transfer_loss_backward", "CUDA")
def _(*args):
    return _triton_kernels().attention_transfer_loss_backward(*args)


@torch.library.impl("kdkernels::attention_transfer_loss_rescale_", "CUDA")
def _(grad, grad_loss):
    grad.mul_(grad_loss)
