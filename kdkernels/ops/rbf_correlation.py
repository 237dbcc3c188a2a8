"""rbf_correlation and rbf_correlation_loss.

The first op is the pairwise Gaussian (RBF) correlation of two feature sets. The second is the
squared distance between the student's and the teacher's correlations.
"""

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
    r"""Gaussian (RBF) correlation of each pair of elements of x and y in the same column.

    This is the distilled feature vector of SVD-KD:

    .. math:: D_{b,m,n,k} = \exp\left(-\frac{(x_{b,m,k} - y_{b,n,k})^2}{\beta}\right)

    (Lee et al. 2018, equation 4; a Gaussian of :math:`2 \sigma^2 = \beta`.)

    Args:
        x, y: features, float64, float32, bfloat16 or float16 (computed in float32), with any
            strides. In SVD-KD the columns are singular vectors, so M and N are the numbers of
            channels of two layers.
        beta: squared width > 0.

    Returns:
        D, contiguous, float64 if x or y is float64, else float32. Half precision would be too
        coarse: for unit vectors of 512 channels, D differs from 1 by less than its resolution.

    Raises:
        TypeError: features have the wrong type.
        ValueError: shapes or devices do not match, or beta is out of range.

    The backward pass recomputes D instead of keeping it. Double backward and ``torch.func``
    transforms use :func:`kdkernels.reference.rbf_correlation`. If you only need the distance
    between two correlations, :func:`rbf_correlation_loss` computes it without writing them to
    memory.

    References:
        S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular
        Value Decomposition. ECCV 2018. https://arxiv.org/abs/1807.06819
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
    r"""Squared distance between a student's and a teacher's correlations.

    The time is linear in M + N if the elements of a column lie close together. Let :math:`S` be
    :func:`rbf_correlation` of sx and sy, and :math:`T` that of tx and ty. The loss is

    =================  ===============================================================
    ``reduction``      loss
    =================  ===============================================================
    ``"sum"``          :math:`\sum_{b,m,n,k} (S_{b,m,n,k} - T_{b,m,n,k})^2`
    ``"none"``         :math:`\sum_{m,n,k} (S - T)^2` of each sample, [B]
    ``"batchmean"``    the sum over B
    =================  ===============================================================

    (Lee et al. 2018, section 3.2. The authors' code uses "sum", multiplied by sqrt(K) / 2;
    RepDistiller uses "batchmean".)

    S and T are not written to memory. For each column, the first R terms of the series
    :math:`e^{-(x - y)^2 / \beta} = \sum_r \phi_r(x) \phi_r(y)` are summed over the elements to
    R x R products, in O((M + N) R^2) operations in float64. R depends on the range of the elements;
    singular vectors need 5 or 6 terms. If a column needs more than 24 terms (16 on a GPU), or has
    few pairs, the loss is summed over all pairs. The relative error is below 1e-6, compared with
    exact arithmetic on the same inputs, even if S and T are nearly equal. docs/rbf_correlation.md
    derives the terms and their bound.

    Args:
        sx, sy: the student's features, float64, float32, bfloat16 or float16, with any strides.
        tx, ty: the teacher's features, of the same shapes. Only inputs that require a gradient
            receive one.
        beta: squared width > 0.
        reduction: see above. With "none", a sample whose upstream gradient is 0 has gradient 0,
            even if its features are not finite.

    Returns:
        A 0-dim tensor, or [B] for "none"; float64 if any input is float64, else float32. A NaN or
        an infinity makes the loss of its sample and the gradients of its column NaN, and nothing
        else.

    Raises:
        TypeError: features have the wrong type.
        ValueError: shapes or devices do not match, or an option is out of range.

    The forward pass computes the gradients and keeps them: at most four tensors of the inputs'
    sizes. Double backward and ``torch.func`` transforms use
    :func:`kdkernels.reference.rbf_correlation_loss`, which does write S and T.

    References:
        S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular
        Value Decomposition. ECCV 2018. https://arxiv.org/abs/1807.06819
    """
    _check_features(sx=sx, sy=sy, tx=tx, ty=ty)
    if sx.shape != tx.shape or sy.shape != ty.shape:
        shapes = f"sx {tuple(sx.shape)}, tx {tuple(tx.shape)}, sy {tuple(sy.shape)}, ty {tuple(ty.shape)}"
        raise ValueError(f"sx and tx must have the same shape, and so must sy and ty, got {shapes}")
    if sx.shape[0] != sy.shape[0] or sx.shape[2] != sy.shape[2]:
        raise ValueError(f"sx [B, M, K] and sy [B, N, K] must agree in B and K, got {tuple(sx.shape)} and {tuple(sy.shape)}")
    checks.positive("beta", beta)
    return _loss(sx, sy, tx, ty, beta, checks.option("reduction", reduction, excluded=("mean",)), (False,) * 4)


def _check_features(**features: Tensor) -> None:
    first = next(iter(features.values()))
    for name, x in features.items():
        checks.tensor(name, x, "features")
        if x.dim() != 3 or 0 in x.shape[1:]:
            raise ValueError(f"{name} must have the shape [B, elements, K] with at least one element and one column, got {tuple(x.shape)}")
        if x.device != first.device:
            raise ValueError(f"{' and '.join(features)} must be on one device, got {first.device} and {x.device}")


@torch.library.register_fake("kdkernels::rbf_correlation")
def _(x, y, beta):
    return x.new_empty((x.shape[0], x.shape[1], y.shape[1], x.shape[2]), dtype=compute_dtype(x, y))


def _empty_gradients(inputs, wanted, dtype=None):
    return [
        torch.empty_like(x, dtype=dtype or x.dtype) if want else x.new_empty(0, dtype=dtype or x.dtype)
        for x, want in zip(inputs, wanted, strict=True)
    ]


@torch.library.register_fake("kdkernels::rbf_correlation_loss")
def _(sx, sy, tx, ty, beta, reduction, wanted):
    inputs = (sx, sy, tx, ty)
    dtype = compute_dtype(*inputs)
    return sx.new_empty(sx.shape[:1] if reduction == Reduction.NONE else (), dtype=dtype), *_empty_gradients(inputs, wanted, dtype)


def _fake_loss_backward(grad_loss, sx, sy, tx, ty, beta, reduction, wanted):
    return tuple(_empty_gradients((sx, sy, tx, ty), wanted))


def _vmap_loss(info, in_dims, sx, sy, tx, ty, beta, reduction, wanted):
    """Treat the vmap examples as more samples of one batch, then reduce for each example."""
    features = examples_first(info.batch_size, (sx, sy, tx, ty), in_dims[:4])
    batch = features[0].shape[1]
    loss = _loss(*(v.flatten(0, 1) for v in features), beta, Reduction.NONE.value, (False,) * 4).unflatten(0, (info.batch_size, batch))
    if reduction != Reduction.NONE:
        loss = loss.sum(1) / (max(batch, 1) if reduction == Reduction.BATCHMEAN else 1)
    return (loss, *(sx.new_empty(info.batch_size, 0) for _ in range(4))), (0,) * 5


_correlation = register("rbf_correlation", correlation_reference, launchers="rbf_correlation", vmap="samples")
_loss = register("rbf_correlation_loss", loss_reference, launchers="rbf_correlation", vmap=_vmap_loss, fake_of_backward=_fake_loss_backward)
