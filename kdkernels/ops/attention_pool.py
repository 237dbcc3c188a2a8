"""attention_pool and attention_transfer_loss: what a network looks at, and how far a student's look is from a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import attention_pool as pool_reference
from ..reference import attention_transfer_loss as loss_reference
from ..reference.attention_pool import average_to
from . import checks
from .registration import derive_double_backward, derive_vmap, examples_first, takes_reference, usable

_REDUCES = ("mean", "sum", "max")
_NORMALIZES = (None, "l2", "softmax")
_VARIANTS = ("code", "paper")

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
    checks.choice("normalize", normalize, _NORMALIZES)
    return _pool(x, p, reduce, normalize, eps)


def _pool(x, p, reduce, normalize, eps) -> Tensor:
    if takes_reference(x):
        return pool_reference(usable(x), p, reduce=reduce, normalize=normalize, eps=eps)
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

    The gradient to the student is written in the forward when only the student requires one. The graph then keeps this gradient, the student's
    features and the teacher's map (its features for p < 1). A float16 gradient is kept with a power of two for each sample and multiplied by
    the upstream gradient in float32. Second derivatives, forward mode and ``torch.func`` go through
    :func:`kdkernels.reference.attention_transfer_loss`.

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
    checks.choice("variant", variant, _VARIANTS)
    if student.shape[2:] != teacher.shape[2:]:
        extents = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = average_to(student, extents), average_to(teacher, extents)
    if takes_reference(student, teacher):
        return loss_reference(usable(student), usable(teacher), p, variant=variant, reduce=reduce, eps=eps)
    return _loss_op(student, teacher, p, variant, reduce, eps, False)[0]


def _check_features(name: str, x: Tensor) -> None:
    checks.tensor(name, x, "features")
    if x.dim() < 3 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have the shape [B, C, *spatial] with at least one channel and one place, got {tuple(x.shape)}")


def _check_options(p, reduce, eps) -> None:
    checks.positive("p", p)
    checks.positive("eps", eps)
    checks.choice("reduce", reduce, _REDUCES)


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
    dtype = _map_dtype(student, teacher)
    return (
        student.new_empty((), dtype=dtype),
        torch.empty_like(student) if save_grad else student.new_empty(0),
        student.new_empty(student.shape[0] if save_grad and student.dtype == torch.float16 else 0, dtype=torch.float32),
        student.new_empty(_map_shape(student) if save_grad else 0, dtype=dtype),
    )


@torch.library.register_fake("kdkernels::attention_transfer_loss_backward")
def _(grad_loss, student, teacher, p, variant, reduce, eps, wanted):
    return (
        torch.empty_like(student) if wanted[0] else student.new_empty(0),
        torch.empty_like(teacher) if wanted[1] else student.new_empty(0),
    )


@torch.library.register_fake("kdkernels::attention_transfer_loss_rescale_")
def _(grad, scale, grad_loss):
    return None


def _differentiable_pool(x, arguments):
    p, reduce, normalize, eps = arguments[5:]
    return (pool_reference(x, p, reduce=reduce, normalize=normalize or None, eps=eps),)


def _differentiable_loss(student, teacher, arguments):
    p, variant, reduce, eps = arguments[3:7]
    return (loss_reference(student, teacher, p, variant=variant, reduce=reduce, eps=eps),)


derive_double_backward("attention_pool_backward", upstream=(0,), inputs=(1,), reference=_differentiable_pool)
derive_double_backward("attention_transfer_loss_backward", upstream=(0,), inputs=(1, 2), wanted=7, reference=_differentiable_loss)
derive_vmap("attention_pool_backward")
derive_vmap("attention_transfer_loss_backward")


@torch.library.register_vmap("kdkernels::attention_pool")
def _(info, in_dims, x, p, reduce, normalize, eps):
    """The examples are more samples of one batch."""
    x = x.movedim(in_dims[0], 0)
    sizes, flat = x.shape[:2], x.flatten(0, 1)
    if takes_reference(flat):
        outputs = (_pool(flat, p, reduce, normalize or None, eps), flat.new_empty(0), flat.new_empty(0))
    else:
        outputs = _pool_op(flat, p, reduce, normalize, eps)
    return tuple(o.unflatten(0, sizes) if o.shape[0] == len(flat) else o.new_empty(info.batch_size, 0) for o in outputs), (0, 0, 0)


@torch.library.register_vmap("kdkernels::attention_transfer_loss")
def _(info, in_dims, student, teacher, p, variant, reduce, eps, save_grad):
    """Normalised maps of all examples at once, then the distance of each."""
    features = examples_first(info.batch_size, (student, teacher), in_dims[:2])
    q = [_pool(x.flatten(0, 1), p, reduce, "l2", eps).flatten(1).unflatten(0, x.shape[:2]) for x in features]
    difference = q[0] - q[1]  # [examples, B, M]
    per_sample = difference.square().mean(2) if variant == "code" else torch.linalg.vector_norm(difference, dim=2)
    none = student.new_empty(info.batch_size, 0)
    return (per_sample.sum(1) / max(per_sample.shape[1], 1), none, none.float(), none.to(_map_dtype(*features))), (0, 0, 0, 0)


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
def _(grad, scale, grad_loss):
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    factor = grad_loss.to(compute)
    if scale.numel():
        factor = (factor * scale).view(-1, *(1,) * (grad.dim() - 1))
    if grad.dtype == compute:
        grad.mul_(factor)
    else:
        grad.copy_(grad.to(compute) * factor)
