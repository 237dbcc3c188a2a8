"""Losses as modules and functions. This module depends on torch only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import checks
from .ops.attention_pool import attention_transfer_loss
from .ops.rbf_correlation import rbf_correlation_loss
from .ops.registration import clone_inference_tensor
from .ops.temperature_kl import temperature_kl
from .ops.truncated_svd import align_singular_vectors, truncated_svds

__all__ = ["AttentionTransferLoss", "SVDKDLoss", "TemperatureKLLoss", "attention_transfer_losses", "kd_loss", "svd_kd_loss"]


class TemperatureKLLoss(nn.Module):
    """Module of :func:`kdkernels.temperature_kl` with fixed options.

    Example: ``TemperatureKLLoss(4.0)(student_logits, teacher_logits)``.

    Args:
        temperature: T > 0. With ``learnable=True`` the initial value of T. The parameter is
            ``log_temperature``, so T = exp(log_temperature) stays positive.
        learnable: make the temperature a parameter.
        **options: the keyword options of :func:`kdkernels.temperature_kl`: dim, direction, beta,
            reduction, scale_by_t2, include_entropy, target_eps.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an option or the temperature is out of range.
    """

    _OPTIONS = ("dim", "direction", "beta", "reduction", "scale_by_t2", "include_entropy", "target_eps")

    def __init__(self, temperature: float = 4.0, *, learnable: bool = False, **options: Any):
        super().__init__()
        unknown = sorted(set(options) - set(self._OPTIONS))
        if unknown:
            raise TypeError(f"TemperatureKLLoss has no option {unknown[0]!r}; it takes {', '.join(self._OPTIONS)}")
        # Validate the options now rather than at the first batch.
        probe = torch.zeros((1,) * (abs(options.get("dim", -1)) + 1))
        temperature_kl(probe, probe, temperature, **options)
        self.options = options
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log()) if learnable else None
        self._temperature = float(temperature)

    @property
    def temperature(self) -> float | Tensor:
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(
        self,
        student: Tensor,  # [..., C, ...]
        teacher: Tensor,  # [..., C, ...]
        mask: Tensor | None = None,  # [rows], bool
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return temperature_kl(student, teacher, self.temperature, mask=mask, normalizer=normalizer, **self.options)

    def extra_repr(self) -> str:
        value = self._temperature  # the initial value; a learnable temperature may have changed
        if self.log_temperature is not None and not self.log_temperature.is_meta:
            value = float(self.log_temperature.detach().exp())
        temperature = f"temperature={value:g}" + (", learnable=True" if self.log_temperature is not None else "")
        return ", ".join([temperature, *(f"{k}={v!r}" for k, v in self.options.items())])


def kd_loss(
    student: Tensor,  # [B, K], or [..., K, ...] with dim
    teacher: Tensor,  # like student
    labels: Tensor,  # [B] int64, or probabilities [B, K]
    temperature: float | Tensor = 4.0,
    *,
    gamma: float = 0.1,
    alpha: float = 0.9,
    dim: int | None = None,
) -> Tensor:
    """Knowledge distillation loss: cross-entropy with the labels plus divergence from the teacher.

    ``gamma * cross_entropy(student, labels) + alpha * T^2 KL(teacher || student)``, where both
    terms are means over the rows.

    The defaults are those of RepDistiller (T = 4, gamma = 0.1, alpha = 0.9). The teacher is
    detached. Half precision and float32 are computed in float32, float64 in float64.

    Args:
        student, teacher: logits, with the classes in dimension ``dim``. The elements of all other
            dimensions are rows: samples, or pixels of samples.
        labels: one class index per row (the logits' shape without ``dim``), or probabilities of the
            logits' shape.
        temperature: T > 0, by which the logits are divided.
        gamma, alpha: weights of the two terms.
        dim: the dimension of the classes. The default is the last dimension for logits of one or
            two dimensions. ``dim`` is required for logits of more dimensions: ``dim=1`` for
            ``[B, K, H, W]`` with labels ``[B, H, W]``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes or devices do not match, or an option is out of range.

    References:
        G. Hinton, O. Vinyals, J. Dean. Distilling the Knowledge in a Neural Network. 2015.
        https://arxiv.org/abs/1503.02531
    """
    checks.tensor("student", student, "logits")
    checks.tensor("teacher", teacher, "logits")
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device, got {student.device} and {teacher.device}")
    if dim is None:
        if student.dim() not in (1, 2):
            raise ValueError(f"student must be logits [B, K] if dim is not given, got {tuple(student.shape)}: pass dim, the dimension of the classes")
        dim = -1
    checks.integer("dim", dim)
    if not -student.dim() <= dim < student.dim():
        raise ValueError(f"dim must lie in [{-student.dim()}, {student.dim() - 1}] for logits of {student.dim()} dimensions, got {dim}")
    _check_labels(labels, student, dim)
    for name, weight in (("gamma", gamma), ("alpha", alpha)):
        if isinstance(weight, Tensor):
            checks.tensor(name, weight, "weights")
        else:
            checks.not_negative(name, weight)
    logits, labels = (student if student.dtype == torch.float64 else student.float()), clone_inference_tensor(labels)
    if student.dim() > 2:  # F.cross_entropy expects the classes in dimension 1
        logits, labels = logits.movedim(dim, 1), labels.movedim(dim, 1) if labels.is_floating_point() else labels
    elif student.dim() == 2 and dim in (0, -2):
        logits, labels = logits.T, labels.T if labels.is_floating_point() else labels
    return gamma * F.cross_entropy(logits, labels) + alpha * temperature_kl(student, teacher.detach(), temperature, dim=dim)


def _check_labels(labels: Tensor, student: Tensor, dim: int) -> None:
    """Check that labels are class indices or class probabilities that F.cross_entropy accepts."""
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.uint8, *checks.FLOATING):
        raise TypeError(f"labels must be a tensor of int64 class indices or of probabilities, got {checks.kind(labels)}")
    rows = (*student.shape[:dim], *student.shape[dim:][1:])
    expected = tuple(student.shape) if labels.is_floating_point() else tuple(rows)
    if tuple(labels.shape) != expected:
        raise ValueError(
            f"labels must have the shape {expected} for student {tuple(student.shape)} with the classes in dim={dim}, got {tuple(labels.shape)}"
        )
    if labels.device != student.device:
        raise ValueError(f"labels must be on the logits' device {student.device}, got {labels.device}")


class AttentionTransferLoss(nn.Module):
    """Sum of :func:`kdkernels.attention_transfer_loss` over pairs of layers.

    Example: ``AttentionTransferLoss()(student_features, teacher_features)``.

    The loss has no weight; multiply it by one. The authors' code uses 1000 with
    ``variant="authors"``. The paper's weight is beta / 2 = 0.05 with ``variant="paper"``.
    RepDistiller's ``Attention`` returns the list of the losses of the pairs, mdistiller's
    ``at_loss`` their sum. Both use ``p=2`` and ``variant="authors"``.

    Args:
        p, reduce: see :func:`kdkernels.attention_transfer_loss`. One value for all pairs, or a list
            with one value for each pair.
        variant: "authors" or "paper".

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or ``p`` and ``reduce`` have different lengths.
    """

    def __init__(self, p: float | Sequence[float] = 2.0, *, reduce: str | Sequence[str] = "mean", variant: str = "authors"):
        super().__init__()
        probe = [torch.ones(1, 1, 1)] * max(len(v) if isinstance(v, (list, tuple)) else 1 for v in (p, reduce))
        attention_transfer_losses(probe, probe, p, reduce=reduce, variant=variant)  # validate the options
        self.p, self.reduce, self.variant = p, reduce, variant

    def forward(
        self,
        student: Tensor | Sequence[Tensor],  # [B, C, *spatial], one tensor or a list
        teacher: Tensor | Sequence[Tensor],
    ) -> Tensor:
        student, teacher = ([x] if isinstance(x, Tensor) else list(x) for x in (student, teacher))
        return cast(Tensor, sum(attention_transfer_losses(student, teacher, self.p, reduce=self.reduce, variant=self.variant)))

    def extra_repr(self) -> str:
        return f"p={self.p}, reduce={self.reduce!r}, variant={self.variant!r}"


def attention_transfer_losses(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    p: float | Sequence[float] = 2.0,
    *,
    reduce: str | Sequence[str] = "mean",
    variant: str = "authors",
) -> list[Tensor]:
    """Compute :func:`kdkernels.attention_transfer_loss` of each pair of feature maps.

    The teacher's feature maps are detached.

    Args:
        student, teacher: feature maps [B, C, *spatial], one of each list per pair.
        p, reduce: see :func:`kdkernels.attention_transfer_loss`. One value for all pairs, or a list
            with one value for each pair.
        variant: "authors" or "paper".

    Returns:
        One 0-dim tensor per pair.

    Raises:
        TypeError: student or teacher is not a list of tensors.
        ValueError: the lists are empty or differ in length.
    """
    student, teacher = (_features_of_layers(name, x) for name, x in (("student", student), ("teacher", teacher)))
    if len(student) != len(teacher) or not len(student):
        raise ValueError(f"student and teacher must be lists of the same number of features, at least one, got {len(student)} and {len(teacher)}")
    exponents, reductions = _value_of_each_pair("p", p, len(student)), _value_of_each_pair("reduce", reduce, len(student))
    return [
        attention_transfer_loss(s, t.detach(), exponent, reduce=reduction, variant=variant)
        for s, t, exponent, reduction in zip(student, teacher, exponents, reductions, strict=True)
    ]


def _value_of_each_pair(name: str, value: Any, count: int) -> list:
    """Return the value of an option for each pair of layers, from one value or one for each."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} must be one value, or one for each of the {count} pairs, got {len(values)}")
    return values


def _features_of_layers(name: str, features: object) -> list[Tensor]:
    """Return a list of feature maps as a list. Raise TypeError for any other value."""
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"{name} must be a list of features, one tensor for each layer, got {checks.kind(features)}")
    for i, x in enumerate(features):
        checks.tensor(f"{name}[{i}]", x, "features")
    return list(features)


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
    return svd_kd_terms(student, teacher, k, align=align, grad=grad, weighting=weighting, loss=loss, extra=extra, beta=beta)[0]


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
) -> tuple[Tensor, Tensor]:
    """Compute :func:`svd_kd_loss` and a bool tensor [pairs, B]: whether it includes the sample."""
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
    total: float | Tensor = 0.0
    usable_pairs = []
    for i in range(len(aligned) - 1):
        n = min(vector_counts[: i + 2])
        (sx, tx), (sy, ty) = ([x[..., :n] for x in layer] for layer in aligned[i : i + 2])
        usable_pair = usable_maps[i] & usable_maps[i + 1]
        per_sample = torch.where(usable_pair, rbf_correlation_loss(sx, sy, tx, ty, beta, reduction="none"), 0)
        total = total + per_sample.sum() * (0.5 * math.sqrt(n) if loss == "authors" else 1 / max(len(usable_pair), 1))
        usable_pairs.append(usable_pair)
    return cast(Tensor, total), torch.stack(usable_pairs)


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
        _features_of_layers(name, features)
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
