"""rbf_correlation and rbf_correlation_loss: how two sets of features lie to one another, and how far a student's are from a teacher's in that."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import compute_dtype
from ..options import Reduction
from ..reference import rbf_correlation as correlation_reference
from ..reference import rbf_correlation_loss as loss_reference
from . import checks
from .registration import register
from .transforms import examples_first


def rbf_correlation(
    x: Tensor,  # [B, M, K]
    y: Tensor,  # [B, N, K]
    beta: float = 8.0,
) -> Tensor:  # [B, M, N, K]
    r"""The Gaussian (RBF) correlation of every number of x with every one of y, column by column: the distilled feature vector of SVD-KD.

    .. math:: D_{b,m,n,k} = \exp\left(-\frac{(x_{b,m,k} - y_{b,n,k})^2}{\beta}\right)

    (Lee et al. 2018, equation 4; a Gaussian of :math:`2 \sigma^2 = \beta`.)

    Args:
        x, y: features, float64, float32, bfloat16 or float16 (computed in float32), of any strides. SVD-KD: singular vectors as columns, so M and N
            are the channels of two layers.
        beta: squared width > 0.

    Returns:
        D, contiguous, float64 if x or y is, else float32: unit vectors of 512 channels give values whose distance from 1 is below a unit of
        half precision.

    Raises:
        TypeError: features of a wrong type.
        ValueError: shapes or devices that do not fit, or a beta out of its range.

    The backward computes D again instead of keeping it. Double backward and ``torch.func`` transforms go through
    :func:`kdkernels.reference.rbf_correlation`. Where only the distance of two correlations is wanted, :func:`rbf_correlation_loss` has it
    without writing either.

    References:
        S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular Value Decomposition. ECCV 2018.
        https://arxiv.org/abs/1807.06819
    """
    _check_features(x=x, y=y)
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"x [B, M, K] and y [B, N, K] must agree in B and K, got {tuple(x.shape)} and {tuple(y.shape)}")
    checks.positive("beta", beta)
    return _correlation(x, y, beta)


def rbf_correlation_loss(
    sx: Tensor,  # [B, M, K]
    sy: Tensor,  # [B, N, K]
    tx: Tensor,  # [B, M, K]
    ty: Tensor,  # [B, N, K]
    beta: float = 8.0,
    *,
    reduction: str = "sum",
) -> Tensor:
    r"""Squared distance of a student's correlation from a teacher's, in time linear in M + N where numbers are close to one another.

    With :math:`S` = :func:`rbf_correlation` of sx and sy, and T of tx and ty,

    =================  ===============================================================
    ``reduction``      loss
    =================  ===============================================================
    ``"sum"``          :math:`\sum_{b,m,n,k} (S_{b,m,n,k} - T_{b,m,n,k})^2`
    ``"none"``         :math:`\sum_{m,n,k} (S - T)^2` of each sample, [B]
    ``"batchmean"``    the sum over B
    =================  ===============================================================

    (Lee et al. 2018, section 3.2. The authors' code takes half of the sum; RepDistiller "batchmean".)

    Neither S nor T is made. For each column, R terms of :math:`e^{-(x - y)^2 / \beta} = \sum_r \phi_r(x) \phi_r(y)` leave R x R products of either
    side, O((M + N) R^2) in double: R follows from the range of the numbers, 5 or 6 for singular vectors. Beyond 24 terms, or where there are
    few pairs, the pairs are summed. Errors are below 1e-6 relative to the loss of the same inputs in exact arithmetic, also
    where S and T are nearly equal. docs/rbf_correlation.md derives the terms and their bound.

    Args:
        sx, sy: the student's features, float64, float32, bfloat16 or float16, of any strides.
        tx, ty: the teacher's, of the same shapes. Gradients flow to every input that requires one, and to no other.
        beta: squared width > 0.
        reduction: see above. A sample whose upstream gradient is 0 ("none") gets 0, whatever it holds.

    Returns:
        A 0-dim tensor, or [B]; float64 if any input is, else float32. A column that holds a NaN or an infinity makes the loss of its sample
        NaN, and its own gradients, and touches no other.

    Raises:
        TypeError: features of a wrong type.
        ValueError: shapes or devices that do not fit, or an option out of its range.

    The gradients are written in the forward, and kept: four tensors of the inputs' size at most. Double backward and ``torch.func``
    transforms go through :func:`kdkernels.reference.rbf_correlation_loss`, which makes S and T.

    References:
        S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular Value Decomposition. ECCV 2018.
        https://arxiv.org/abs/1807.06819
    """
    _check_features(sx=sx, sy=sy, tx=tx, ty=ty)
    if sx.shape != tx.shape or sy.shape != ty.shape:
        shapes = f"sx {tuple(sx.shape)}, tx {tuple(tx.shape)}, sy {tuple(sy.shape)}, ty {tuple(ty.shape)}"
        raise ValueError(f"sx and tx must have the same shape, and sy and ty, got {shapes}")
    if sx.shape[0] != sy.shape[0] or sx.shape[2] != sy.shape[2]:
        raise ValueError(f"sx [B, M, K] and sy [B, N, K] must agree in B and K, got {tuple(sx.shape)} and {tuple(sy.shape)}")
    checks.positive("beta", beta)
    return _loss(sx, sy, tx, ty, beta, checks.option("reduction", reduction, without=("mean",)), (False,) * 4)


def _check_features(**features: Tensor) -> None:
    first = next(iter(features.values()))
    for name, x in features.items():
        checks.tensor(name, x, "features")
        if x.dim() != 3 or 0 in x.shape[1:]:
            raise ValueError(f"{name} must have the shape [B, numbers, K] with at least one number and one column, got {tuple(x.shape)}")
        if x.device != first.device:
            raise ValueError(f"{' and '.join(features)} must be on one device, got {first.device} and {x.device}")


@torch.library.register_fake("kdkernels::rbf_correlation")
def _(x, y, beta):
    return x.new_empty((x.shape[0], x.shape[1], y.shape[1], x.shape[2]), dtype=compute_dtype(x, y))


def _wanted_like(inputs, wanted, dtype=None):
    return [torch.empty_like(x, dtype=dtype or x.dtype) if w else x.new_empty(0, dtype=dtype or x.dtype) for x, w in zip(inputs, wanted, strict=True)]


@torch.library.register_fake("kdkernels::rbf_correlation_loss")
def _(sx, sy, tx, ty, beta, reduction, wanted):
    inputs = (sx, sy, tx, ty)
    dtype = compute_dtype(*inputs)
    return sx.new_empty(sx.shape[:1] if reduction == Reduction.NONE else (), dtype=dtype), *_wanted_like(inputs, wanted, dtype)


def _fake_loss_backward(grad_loss, sx, sy, tx, ty, beta, reduction, wanted):
    return tuple(_wanted_like((sx, sy, tx, ty), wanted))


def _vmap_loss(info, in_dims, sx, sy, tx, ty, beta, reduction, wanted):
    """The examples are more samples of one batch, reduced for each example."""
    features = examples_first(info.batch_size, (sx, sy, tx, ty), in_dims[:4])
    batch = features[0].shape[1]
    loss = _loss(*(v.flatten(0, 1) for v in features), beta, Reduction.NONE.value, (False,) * 4).unflatten(0, (info.batch_size, batch))
    if reduction != Reduction.NONE:
        loss = loss.sum(1) / (max(batch, 1) if reduction == Reduction.BATCHMEAN else 1)
    return (loss, *(sx.new_empty(info.batch_size, 0) for _ in range(4))), (0,) * 5


_correlation = register("rbf_correlation", correlation_reference, launchers="rbf_correlation", vmap="samples")
_loss = register("rbf_correlation_loss", loss_reference, launchers="rbf_correlation", vmap=_vmap_loss, fake_of_backward=_fake_loss_backward)
