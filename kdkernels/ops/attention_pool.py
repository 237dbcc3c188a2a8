"""attention_pool and attention_transfer_loss: what a network looks at, and how far a student's look is from a teacher's."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import Normalize, Reduce, Variant
from ..reference import attention_pool as pool_reference
from ..reference import attention_transfer_loss as loss_reference
from ..reference.attention_pool import average_to
from . import checks
from .registration import register
from .transforms import examples_first


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
    reduce = _check_options(p, reduce, eps)
    return _pool(x, p, reduce, checks.option("normalize", normalize), eps)


def attention_transfer_loss(
    student: Tensor,  # [B, C, *spatial]
    teacher: Tensor,  # [B, D, *spatial]
    p: float = 2.0,
    *,
    variant: str = "authors",
    reduce: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    r"""Distance between the normalised attention maps of a student and a teacher, fused: no map is written to memory.

    With :math:`q = a / \max(\|a\|_2, \text{eps})` over the places of :math:`a =` :func:`attention_pool`, B samples and M places,

    =============  ==============================================================================================
    ``variant``    loss
    =============  ==============================================================================================
    ``"authors"``  :math:`\frac{1}{B M} \sum_b \|q_s - q_t\|_2^2`: the authors' code, with a weight of 1000
    ``"paper"``    :math:`\frac{1}{B} \sum_b \|q_s - q_t\|_2`: equation 2 of the paper, without its :math:`\beta / 2`
    =============  ==============================================================================================

    Args:
        student: features, float64, float32, bfloat16 or float16, NCHW or channels_last, read where they lie.
        teacher: features of the same batch; other channels, dtype and layout are welcome. It receives a gradient if, and only if, it
            requires one. Where its extents in space differ, the larger features are averaged to the smaller extents first, before the
            powers, as RepDistiller and mdistiller do (adaptive average pooling, per dimension).
        p: exponent > 0, see :func:`attention_pool`.
        variant: "authors" or "paper".
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
    reduce, variant = _check_options(p, reduce, eps), checks.option("variant", variant)
    if student.shape[2:] != teacher.shape[2:]:
        extents = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = average_to(student, extents), average_to(teacher, extents)
    return _loss(student, teacher, p, variant, reduce, eps, False)


def _check_features(name: str, x: Tensor) -> None:
    checks.tensor(name, x, "features")
    if x.dim() < 3 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have the shape [B, C, *spatial] with at least one channel and one place, got {tuple(x.shape)}")


def _check_options(p, reduce, eps) -> int:
    """Checks the options of a map; returns the value of ``reduce``."""
    checks.positive("p", p)
    checks.positive("eps", eps)
    return checks.option("reduce", reduce)


def _map_shape(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:])


@torch.library.register_fake("kdkernels::attention_pool")
def _(x, p, reduce, normalize, eps):
    norm = x.new_empty(x.shape[0] if normalize == Normalize.L2 else 0, dtype=torch.float64)
    channel = x.new_empty(_map_shape(x) if reduce == Reduce.MAX else 0, dtype=torch.int32)
    return x.new_empty(_map_shape(x), dtype=compute_dtype(x)), norm, channel


@torch.library.register_fake("kdkernels::attention_transfer_loss")
def _(student, teacher, p, variant, reduce, eps, save_grad):
    dtype = compute_dtype(student, teacher)
    return (
        student.new_empty((), dtype=dtype),
        torch.empty_like(student) if save_grad else student.new_empty(0),
        student.new_empty(student.shape[0] if save_grad and student.dtype == torch.float16 else 0, dtype=torch.float32),
        student.new_empty(_map_shape(student) if save_grad else 0, dtype=dtype),
    )


def _vmap_loss(info, in_dims, student, teacher, p, variant, reduce, eps, save_grad):
    """Normalised maps of all examples at once, then the distance of each."""
    features = examples_first(info.batch_size, (student, teacher), in_dims[:2])
    q = [_pool(x.flatten(0, 1), p, reduce, Normalize.L2.value, eps).flatten(1).unflatten(0, x.shape[:2]) for x in features]
    difference = q[0] - q[1]  # [examples, B, M]
    per_sample = difference.square().mean(2) if variant == Variant.AUTHORS else torch.linalg.vector_norm(difference, dim=2)
    none = student.new_empty(info.batch_size, 0)
    return (per_sample.sum(1) / max(per_sample.shape[1], 1), none, none.float(), none.to(compute_dtype(*features))), (0, 0, 0, 0)


_pool = register("attention_pool", pool_reference, launchers="attention_pool", vmap="samples")
_loss = register("attention_transfer_loss", loss_reference, launchers="attention_pool", vmap=_vmap_loss)
