"""attention_pool and attention_transfer_loss: attention maps, and the distance between two."""

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
    r"""Attention maps: the p-th powers of the features' magnitudes, pooled over the channels.

    .. math:: a_{b,s} = R_c |x_{b,c,s}|^p, \qquad R \in \{\text{mean}, \sum, \max\}

    (Zagoruyko, Komodakis 2017, section 3.1: :math:`F_{sum}^p` and :math:`F_{max}^p`.)

    Args:
        x: features, float64, float32, bfloat16 or float16, with one or more spatial dimensions.
            Contiguous (NCHW) and channels_last features are read in place, without a copy, and the
            gradient has the layout of x.
        p: exponent > 0. The exponents 1, 1.5, 2, 3 and 4 are computed without the general power
            function. Where x is 0 the gradient is 0. This includes p < 1, where the true derivative
            is unbounded.
        reduce: "mean", "sum" or "max" over the channels. The gradient of a maximum goes to the
            first channel with the maximum.
        normalize: normalisation over the spatial positions of a map: "l2",
            :math:`a / \max(\|a\|_2, \text{eps})` (attention transfer); "softmax" (Self Attention
            Distillation); or ``None``.
        eps: smallest divisor of "l2". A map of zeros stays zero and has gradient 0.

    Returns:
        Maps [B, \*spatial], float64 for float64 features, else float32, because powers of
        half-precision numbers may overflow.

    Raises:
        TypeError: x has the wrong type.
        ValueError: x has fewer than three dimensions, no channel or no spatial position, or an
            option is out of range.

    The first derivative is computed by the op ``kdkernels::attention_pool_backward``. Double
    backward and ``torch.func`` transforms use :func:`kdkernels.reference.attention_pool`.

    References:
        S. Zagoruyko, N. Komodakis. Paying More Attention to Attention. ICLR 2017.
        https://arxiv.org/abs/1612.03928
        Y. Hou et al. Learning Lightweight Lane Detection CNNs by Self Attention Distillation.
        ICCV 2019. https://arxiv.org/abs/1908.00821
    """
    _check_features("x", x)
    reduce_value = _check_options(p, reduce, eps)
    return _pool(x, p, reduce_value, checks.option("normalize", normalize), eps)


def attention_transfer_loss(
    student: Tensor,  # [B, C, *spatial]
    teacher: Tensor,  # [B, D, *spatial]
    p: float = 2.0,
    *,
    variant: str = "authors",
    reduce: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    r"""Distance between the normalised attention maps of a student and a teacher, as one fused op.

    Let :math:`a =` :func:`attention_pool` of the features, and
    :math:`q = a / \max(\|a\|_2, \text{eps})` with the norm over the M spatial positions of a
    sample. For B samples the loss is

    =============  =============================================================================
    ``variant``    loss
    =============  =============================================================================
    ``"authors"``  :math:`\frac{1}{B M} \sum_b \|q_s - q_t\|_2^2`: the authors' code, which
                   multiplies it by 1000
    ``"paper"``    :math:`\frac{1}{B} \sum_b \|q_s - q_t\|_2`: equation 2 of the paper, which
                   multiplies it by :math:`\beta / 2` = 0.05
    =============  =============================================================================

    Args:
        student: features, float64, float32, bfloat16 or float16. NCHW and channels_last features
            are read in place, without a copy.
        teacher: features of the same batch. The number of channels, the dtype and the layout may
            differ from the student's. The teacher receives a gradient only if it requires one. If
            the spatial extents differ, the larger features are first averaged to the smaller
            extents, before the powers, as in RepDistiller and mdistiller (adaptive average pooling,
            for each dimension).
        p: exponent > 0, see :func:`attention_pool`.
        variant: "authors" or "paper".
        reduce: how the channels are pooled. "mean" and "sum" differ only by the effect of ``eps``,
            because the maps are normalised.
        eps: smallest divisor.

    Returns:
        A 0-dim tensor, float64 if either input is float64, else float32. 0 for an empty batch.

    Raises:
        TypeError: features have the wrong type.
        ValueError: batch sizes, devices or numbers of dimensions differ, or an option is out of
            range.

    If only the student requires a gradient, the forward pass computes this gradient. The autograd
    graph then keeps this gradient, the student's features and the teacher's map [B, \*spatial]
    (for p < 1 the teacher's features). Otherwise no map is kept until the backward pass. The GPU
    kernels also write the maps of both networks to temporary memory; the CPU kernels keep them in
    scratch memory. A float16 gradient is stored with a power of two for each sample, and multiplied
    by the upstream gradient in float32. Second derivatives, forward mode and ``torch.func`` use
    :func:`kdkernels.reference.attention_transfer_loss`.

    References:
        S. Zagoruyko, N. Komodakis. Paying More Attention to Attention. ICLR 2017.
        https://arxiv.org/abs/1612.03928
    """
    _check_features("student", student)
    _check_features("teacher", teacher)
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device, got {student.device} and {teacher.device}")
    if student.dim() != teacher.dim() or student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student and teacher must have the same batch size and number of dimensions, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    reduce_value, variant_value = _check_options(p, reduce, eps), checks.option("variant", variant)
    if student.shape[2:] != teacher.shape[2:]:
        extents = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = average_to(student, extents), average_to(teacher, extents)
    return _loss(student, teacher, p, variant_value, reduce_value, eps, False)


def _check_features(name: str, x: Tensor) -> None:
    checks.tensor(name, x, "features")
    if x.dim() < 3 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have the shape [B, C, *spatial] with at least one channel and one spatial position, got {tuple(x.shape)}")


def _check_options(p, reduce, eps) -> int:
    """Check the options of attention maps, and return the integer value of ``reduce``."""
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
    """Compute the normalised maps of all vmap examples together, then the loss of each example."""
    features = examples_first(info.batch_size, (student, teacher), in_dims[:2])
    maps = [_pool(x.flatten(0, 1), p, reduce, Normalize.L2.value, eps).flatten(1).unflatten(0, x.shape[:2]) for x in features]
    difference = maps[0] - maps[1]  # [examples, B, M]
    per_sample = difference.square().mean(2) if variant == Variant.AUTHORS else torch.linalg.vector_norm(difference, dim=2)
    empty = student.new_empty(info.batch_size, 0)
    return (per_sample.sum(1) / max(per_sample.shape[1], 1), empty, empty.float(), empty.to(compute_dtype(*features))), (0, 0, 0, 0)


_pool = register("attention_pool", pool_reference, launchers="attention_pool", vmap="samples")
_loss = register("attention_transfer_loss", loss_reference, launchers="attention_pool", vmap=_vmap_loss)
