"""SVD-KD: self-supervised distillation by singular value decomposition (Lee et al., ECCV 2018)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import checks
from ..ops.rbf_correlation import rbf_correlation_loss
from ..ops.truncated_svd import align_singular_vectors, truncated_svds
from .features import features_of_layers


def svd_kd_loss(
    student: Sequence[Tensor],  # [B, C_i, *spatial_i] each
    teacher: Sequence[Tensor],  # [B, C_i, *spatial_i] each
    k: int = 1,
    *,
    align: Literal["teacher", "student"] = "teacher",
    grad: Literal["exact", "rank1", "authors"] = "exact",
    weighting: Literal["sigma", "none"] = "sigma",
    loss: Literal["authors", "mean"] = "authors",
    extra: int = 1,
    beta: float = 8.0,
) -> Tensor:
    r"""SVD-KD loss: compare the main singular vectors of student and teacher in pairs of layers.

    Each feature map is treated as a matrix [spatial positions, channels]. Its k main right singular
    vectors, those with the largest singular values, are computed with fixed signs.
    :func:`kdkernels.align_singular_vectors` then selects a student vector for each teacher vector.
    Two neighbouring layers i and i + 1 are compared by L = :func:`kdkernels.rbf_correlation_loss`
    of the vectors of both layers. A layer that belongs to two pairs is decomposed once.
    docs/svd_kd.md compares the variants.

    =============  =============================================================================
    ``loss``       sum over pairs of layers of
    =============  =============================================================================
    "authors"      :math:`\frac{\sqrt k}{2} L`, a sum over the batch: the authors' code
    "mean"         :math:`L / B`: RepDistiller
    =============  =============================================================================

    The option ``grad`` selects the gradient with respect to the student's feature map, given the
    gradients :math:`g_j` with respect to its right singular vectors :math:`v_j`. :math:`u_j` and
    :math:`\sigma_j` are the left singular vectors and the singular values:

    =============  =============================================================================
    ``grad``       gradient with respect to the feature map
    =============  =============================================================================
    "exact"        the derivative
    "rank1"        :math:`\sum_j u_j (g_j - \langle v_j, g_j \rangle v_j)^T / \sigma_j`: for
                   k = 1 the derivative if all other singular values were 0
    "authors"      as in the authors' code: "rank1" for feature maps with fewer spatial positions
                   than channels, 0 for all others
    =============  =============================================================================

    Args:
        student, teacher: features of two or more layers of one batch, from the first layer to the
            last; float64, float32, bfloat16 or float16 (computed in float32). At each layer,
            student and teacher must have the same number of channels; the numbers of spatial
            positions may differ. The teacher is detached.
        k: number of singular vectors per layer. If a layer has fewer spatial positions or channels
            than k, its pairs and all later pairs use this smaller number.
        align: whose vectors are flipped to match the signs of the other's: "teacher" (the authors'
            code) or "student" (RepDistiller, mdistiller).
        weighting: with "sigma", the vectors of both networks are multiplied by the teacher's
            singular values, normalised to a norm of 1. With "none" they are not multiplied.
        extra: number of additional student vectors among which the alignment may select: 1 in the
            authors' code, 3 in RepDistiller.
        beta: squared width of the correlation.

    Returns:
        A 0-dim tensor. If the student's or the teacher's feature map of a sample is all zeros, or
        contains a NaN or an infinity, its singular vectors are undefined. The pairs of layers with
        this map are then left out of the loss and of the gradients of this sample.

    Raises:
        TypeError: features have the wrong type.
        ValueError: there are fewer than two layers, the lists differ in length, batch sizes or
            numbers of channels differ, or an option is out of range.

    References:
        S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular
        Value Decomposition. ECCV 2018. https://arxiv.org/abs/1807.06819
    """
    losses, _ = svd_kd_terms(student, teacher, k, align=align, grad=grad, weighting=weighting, loss=loss, extra=extra, beta=beta)
    return cast(Tensor, sum(losses))


def svd_kd_terms(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    k: int = 1,
    *,
    align: Literal["teacher", "student"] = "teacher",
    grad: Literal["exact", "rank1", "authors"] = "exact",
    weighting: Literal["sigma", "none"] = "sigma",
    loss: Literal["authors", "mean"] = "authors",
    extra: int = 1,
    beta: float = 8.0,
) -> tuple[list[Tensor], Tensor]:
    """Compute :func:`svd_kd_loss` of each pair of neighbouring layers.

    Returns:
        The losses, and a bool tensor [pairs, B]: whether the loss includes the sample.
    """
    _check_svd_kd(student, teacher, k, align, grad, weighting, loss, extra, beta)
    student_matrices, teacher_matrices = ([x.flatten(2).transpose(1, 2) for x in features] for features in (student, teacher))
    vector_counts = [min(k, *x.shape[1:], t.shape[1]) for x, t in zip(student_matrices, teacher_matrices, strict=True)]
    with torch.no_grad():
        teacher_svds = _decompose(teacher_matrices, vector_counts)
    student_svds = _student_vectors(
        student_matrices, [min(n + extra, *x.shape[1:]) for n, x in zip(vector_counts, student_matrices, strict=True)], grad
    )
    aligned, usable_maps = [], []
    for (_, s, v), (_, sigma, w), n in zip(student_svds, teacher_svds, vector_counts, strict=True):
        usable_map = (s[:, 0] > 0) & s[:, 0].isfinite() & (sigma[:, 0] > 0) & sigma[:, 0].isfinite()
        v, w = (torch.where(usable_map[:, None, None], x, 0) for x in (v, w))
        weight = None
        if weighting == "sigma" and n > 1:  # for n = 1 the weight is 1
            weight = F.normalize(torch.where(usable_map[:, None], sigma, 1.0), dim=1)
        aligned.append(align_singular_vectors(v, w, weight, flip=align))
        usable_maps.append(usable_map)
    losses, usable_pairs = [], []
    for i in range(len(aligned) - 1):
        n = min(vector_counts[: i + 2])
        (sx, tx), (sy, ty) = ([x[..., :n] for x in layer] for layer in aligned[i : i + 2])
        usable_pair = usable_maps[i] & usable_maps[i + 1]
        per_sample = torch.where(usable_pair, rbf_correlation_loss(sx, sy, tx, ty, beta, reduction="none"), 0)
        losses.append(per_sample.sum() * (0.5 * math.sqrt(n) if loss == "authors" else 1 / max(len(usable_pair), 1)))
        usable_pairs.append(usable_pair)
    return losses, torch.stack(usable_pairs)


def _check_svd_kd(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    k: int,
    align: str,
    grad: str,
    weighting: str,
    loss: str,
    extra: int,
    beta: float,
) -> None:
    for name, features in (("student", student), ("teacher", teacher)):
        features_of_layers(name, features)
    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError(f"student and teacher must be lists of the same number of features, at least two, got {len(student)} and {len(teacher)}")
    for name, value in {"k": k, "extra": extra}.items():
        checks.integer(name, value)
        if value < (name == "k"):
            raise ValueError(f"{name} must be an int >= {int(name == 'k')}, got {value!r}")
    checks.choice("align", align, ("teacher", "student"))
    checks.choice("grad", grad, ("exact", "rank1", "authors"))
    checks.choice("weighting", weighting, ("sigma", "none"))
    checks.choice("loss", loss, ("authors", "mean"))
    checks.positive("beta", beta)
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        for name, x in {"student": s, "teacher": t}.items():
            if x.dim() < 3 or 0 in x.shape[1:]:
                raise ValueError(
                    f"{name}[{i}] must have the shape [B, C, *spatial] with at least one channel and one spatial position, got {tuple(x.shape)}"
                )
        if s.device != student[0].device or t.device != student[0].device:
            raise ValueError(f"layer {i}: student and teacher must be on one device, got {s.device} and {t.device}")
        if s.shape[:2] != t.shape[:2] or len(s) != len(student[0]):
            raise ValueError(
                f"layer {i}: student and teacher must have the same batch size and number of channels, got {tuple(s.shape)} and {tuple(t.shape)}"
            )


def _decompose(matrices: list[Tensor], counts: list[int], return_u: bool = False) -> list[tuple[Tensor | None, Tensor, Tensor]]:
    """Decompose each matrix, with one call of truncated_svds for all that need the same count."""
    results: dict[int, tuple] = {}
    for n in sorted(set(counts)):
        indices = [i for i, count in enumerate(counts) if count == n]
        results |= zip(indices, truncated_svds([matrices[i] for i in indices], n, return_u=return_u), strict=True)
    return [results[i] for i in range(len(matrices))]


def _student_vectors(matrices: list[Tensor], counts: list[int], grad: str) -> list[tuple[Tensor | None, Tensor, Tensor]]:
    """Decompose the student's matrices, with the gradient that the option ``grad`` selects."""
    if grad == "exact":
        return _decompose(matrices, counts)
    with torch.no_grad():
        results = _decompose(matrices, counts, return_u=True)
    for i, (x, (u, s, v)) in enumerate(zip(matrices, results, strict=True)):
        wide = x.shape[1] < x.shape[2]
        results[i] = (u, s, _with_rank1_gradient(x, cast(Tensor, u), s, v) if grad == "rank1" or wide else _with_zero_gradient(x, v))
    return results


def _with_zero_gradient(x: Tensor, v: Tensor) -> Tensor:
    """Return v with a zero gradient with respect to x, so that a loss of v alone has a backward."""
    return v + x[:, :0].sum().to(v.dtype)


def _with_rank1_gradient(x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """Return v, with the derivative of X^T u / |X^T u| for constant u."""
    nonzero = s.isfinite() & (s > 1e-6 * s[:, :1])  # [B, k]
    inverse = torch.where(nonzero, 1 / torch.where(nonzero, s, 1), 0)[:, None]
    with torch.autocast(x.device.type, enabled=False):
        product = x.to(u.dtype).mT @ torch.where(nonzero[:, None], u, 0)
    difference = (product - product.detach()).nan_to_num() * inverse
    return v + (difference - v.nan_to_num() * (v.nan_to_num() * difference).sum(1, keepdim=True))


class SVDKDLoss(nn.Module):
    """Module of :func:`svd_kd_loss` with fixed options.

    Example: ``SVDKDLoss(k=1)(student_features, teacher_features)``.

    :class:`kdkernels.distill.SVDKD` is the trainer, with the authors' rule for combining the
    gradients of the two losses.

    Args:
        k: number of singular vectors per layer.
        **options: the keyword options of :func:`svd_kd_loss`: align, grad, weighting, loss, extra,
            beta.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, k: int = 1, **options: Any):
        super().__init__()
        probe = [torch.ones(1, 1, 1)] * 2
        svd_kd_loss(probe, probe, k, **options)  # validate the options
        self.k, self.options = k, options

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        return svd_kd_loss(student, teacher, self.k, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([f"k={self.k}", *(f"{name}={value!r}" for name, value in self.options.items())])
