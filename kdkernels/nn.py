"""The losses as modules and functions, for drop-in use. Needs torch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops import checks
from .ops.attention_pool import attention_transfer_loss
from .ops.rbf_correlation import rbf_correlation_loss
from .ops.registration import usable
from .ops.temperature_kl import temperature_kl
from .ops.truncated_svd import align_singular_vectors, truncated_svds

__all__ = ["AttentionTransferLoss", "SVDKDLoss", "TemperatureKLLoss", "attention_transfer_losses", "kd_loss", "svd_kd_loss"]


class TemperatureKLLoss(nn.Module):
    """:func:`kdkernels.temperature_kl` with its options fixed: ``TemperatureKLLoss(4.0)(student_logits, teacher_logits)``.

    Args:
        temperature: T > 0; with ``learnable=True`` the initial value of a parameter, kept positive as ``exp(log_temperature)``.
        learnable: learn the temperature.
        **options: the keyword options of :func:`kdkernels.temperature_kl`: dim, direction, beta, reduction, scale_by_t2, include_entropy,
            target_eps.
    """

    _OPTIONS = ("dim", "direction", "beta", "reduction", "scale_by_t2", "include_entropy", "target_eps")

    def __init__(self, temperature: float = 4.0, *, learnable: bool = False, **options):
        super().__init__()
        unknown = sorted(set(options) - set(self._OPTIONS))
        if unknown:
            raise TypeError(f"TemperatureKLLoss has no option {unknown[0]!r}; it takes {', '.join(self._OPTIONS)}")
        # Options that cannot be are refused here and not at the first batch.
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
        now = self._temperature  # as given; a learnable one may have moved since, and may be on no device
        if self.log_temperature is not None and not self.log_temperature.is_meta:
            now = float(self.log_temperature.detach().exp())
        temperature = f"temperature={now:g}" + (", learnable=True" if self.log_temperature is not None else "")
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
    """``gamma * cross_entropy(student, labels) + alpha * T^2 KL(teacher || student)``, both means over the batch.

    The defaults are those of RepDistiller (T = 4, 0.1, 0.9). The teacher is detached. Half types are computed in float32, float64 in float64.

    Args:
        student, teacher: logits. Classes lie in ``dim``; all other dimensions are rows, over which both means go.
        labels: one class number per row (the logits' shape without ``dim``), or probabilities of the logits' shape.
        temperature: T > 0, in units of logits.
        gamma, alpha: weights of the two terms.
        dim: the dimension of the classes. It must be said for logits of more than two dimensions, ``dim=1`` for ``[B, K, H, W]`` with labels
            ``[B, H, W]``: the last one would be the image's width.

    Raises:
        TypeError: an argument of a wrong type.
        ValueError: shapes or devices that do not fit, or an option out of its range.

    References:
        G. Hinton, O. Vinyals, J. Dean. Distilling the Knowledge in a Neural Network. 2015. https://arxiv.org/abs/1503.02531
    """
    checks.tensor("student", student, "logits")
    checks.tensor("teacher", teacher, "logits")
    if student.device != teacher.device:
        raise ValueError(f"student and teacher must be on one device, got {student.device} and {teacher.device}")
    if dim is None:
        if student.dim() not in (1, 2):
            raise ValueError(f"student must be logits [B, K], got {tuple(student.shape)}: say by dim which dimension holds the classes")
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
    logits, labels = (student if student.dtype == torch.float64 else student.float()), usable(labels)
    if student.dim() > 2:  # F.cross_entropy has the classes in dimension 1
        logits, labels = logits.movedim(dim, 1), labels.movedim(dim, 1) if labels.is_floating_point() else labels
    elif student.dim() == 2 and dim in (0, -2):
        logits, labels = logits.T, labels.T if labels.is_floating_point() else labels
    return gamma * F.cross_entropy(logits, labels) + alpha * temperature_kl(student, teacher.detach(), temperature, dim=dim)


def _check_labels(labels: Tensor, student: Tensor, dim: int) -> None:
    """Labels as F.cross_entropy takes them: class indices, or probabilities of the classes."""
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
    """Sum over pairs of layers of :func:`kdkernels.attention_transfer_loss`: ``AttentionTransferLoss()(student_features, teacher_features)``.

    RepDistiller's ``Attention`` gives the list, mdistiller's ``at_loss`` the sum; both with ``p=2`` and ``variant="authors"``.

    Args:
        p, reduce: see :func:`kdkernels.attention_transfer_loss`; one for all pairs, or one for each.
        variant: "authors" or "paper".
    """

    def __init__(self, p: float | Sequence[float] = 2.0, *, reduce: str | Sequence[str] = "mean", variant: str = "authors"):
        super().__init__()
        probe = [torch.ones(1, 1, 1)] * max(len(v) if isinstance(v, (list, tuple)) else 1 for v in (p, reduce))
        attention_transfer_losses(probe, probe, p, reduce=reduce, variant=variant)  # refuses here what cannot be
        self.p, self.reduce, self.variant = p, reduce, variant

    def forward(
        self,
        student: Tensor | Sequence[Tensor],  # [B, C, *spatial], one or a list
        teacher: Tensor | Sequence[Tensor],
    ) -> Tensor:
        student, teacher = ([x] if isinstance(x, Tensor) else list(x) for x in (student, teacher))
        return sum(attention_transfer_losses(student, teacher, self.p, reduce=self.reduce, variant=self.variant))

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
    """:func:`kdkernels.attention_transfer_loss` of each pair of features. The teacher's are detached.

    Raises:
        TypeError: student or teacher is no list of tensors.
        ValueError: lists of different lengths, or no pair.
    """
    student, teacher = (_features_of_layers(name, x) for name, x in (("student", student), ("teacher", teacher)))
    if len(student) != len(teacher) or not len(student):
        raise ValueError(f"student and teacher must be lists of as many features, at least one, got {len(student)} and {len(teacher)}")
    each = {}
    for name, value in {"p": p, "reduce": reduce}.items():
        each[name] = list(value) if isinstance(value, (list, tuple)) else [value] * len(student)
        if len(each[name]) != len(student):
            raise ValueError(f"{name} must be one value, or one for each of the {len(student)} pairs, got {len(each[name])}")
    return [
        attention_transfer_loss(s, t.detach(), power, reduce=how, variant=variant)
        for s, t, power, how in zip(student, teacher, each["p"], each["reduce"], strict=True)
    ]


def _features_of_layers(name: str, features) -> list[Tensor]:
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
    r"""Distance of the distilled feature vectors of a student and a teacher (SVD-KD), summed over neighbouring layers.

    Each map, seen as places x channels, gives its k main right singular vectors, of fixed signs; the student's are ordered after the teacher's by
    :func:`kdkernels.align_singular_vectors`. Two neighbouring layers i and i + 1 are compared by :func:`kdkernels.rbf_correlation_loss`, L, of the
    vectors of both. A layer that two pairs share is decomposed once.

    =============  =============================================================================================================
    ``loss``       sum over pairs of
    =============  =============================================================================================================
    "authors"      :math:`\frac{\sqrt k}{2} L`, a sum over the batch: the authors' code
    "mean"         :math:`L / B`: RepDistiller
    =============  =============================================================================================================

    =============  =============================================================================================================
    ``grad``       gradient of a singular vector
    =============  =============================================================================================================
    "exact"        the derivative
    "rank1"        :math:`u_i (g_i - \langle v_i, g_i \rangle v_i)^T / \sigma_i`: what it is if all other singular values were 0
    "authors"      what the authors' code gives: "rank1" where a map has fewer places than channels, else 0
    =============  =============================================================================================================

    Args:
        student, teacher: features of two or more layers of one batch, float64, float32, bfloat16 or float16 (computed in float32), from the front to
            the back. As many channels in student and teacher at each layer; places may differ. The teacher is detached.
        k: vectors of a layer. Where a layer has fewer places or channels, it and the pairs behind it take as many as it has.
        align: whose signs follow the other's: the "teacher"'s (the authors) or the "student"'s (RepDistiller, mdistiller).
        weighting: "sigma": vectors of both are multiplied by the teacher's singular values, of norm 1. "none": they are not.
        extra: vectors of the student beyond k that may be chosen as a teacher's counterpart: 1 in the authors' code, 3 in RepDistiller.
        beta: squared width of the correlation.

    Returns:
        A 0-dim tensor. A pair of maps of a sample is left out, from the loss and from the gradients, where a map of it is all zeros or holds a NaN or
        an infinity, in the student or in the teacher: no direction of it is known. docs/svd_kd.md compares the variants.

    Raises:
        TypeError: features of a wrong type.
        ValueError: fewer than two layers, lists of different lengths, batches or channels that differ, or an option out of its range.

    References:
        S. H. Lee, D. H. Kim, B. C. Song. Self-supervised Knowledge Distillation Using Singular Value Decomposition. ECCV 2018.
        https://arxiv.org/abs/1807.06819
    """
    return svd_kd_terms(student, teacher, k, align=align, grad=grad, weighting=weighting, loss=loss, extra=extra, beta=beta)[0]


def svd_kd_terms(student, teacher, k=1, *, align="teacher", grad="exact", weighting="sigma", loss="authors", extra=1, beta=8.0):
    """:func:`svd_kd_loss`, and which samples of each pair of layers are in it: bool [pairs, B]."""
    _check_svd_kd(student, teacher, k, align, grad, weighting, loss, extra, beta)
    maps, targets = ([x.flatten(2).transpose(1, 2) for x in features] for features in (student, teacher))
    counts = [min(k, *x.shape[1:], t.shape[1]) for x, t in zip(maps, targets, strict=True)]
    with torch.no_grad():
        of_teacher = _decompose(targets, counts)
    of_student = _student_vectors(maps, [min(n + extra, *x.shape[1:]) for n, x in zip(counts, maps, strict=True)], grad)
    sides, known = [], []
    for (_, s, v), (_, sigma, w), n in zip(of_student, of_teacher, counts, strict=True):
        fine = (s[:, 0] > 0) & s[:, 0].isfinite() & (sigma[:, 0] > 0) & sigma[:, 0].isfinite()
        v, w = (torch.where(fine[:, None, None], x, 0) for x in (v, w))
        weight = None
        if weighting == "sigma" and n > 1:  # of one vector it is 1
            weight = F.normalize(torch.where(fine[:, None], sigma, 1.0), dim=1)
        sides.append(align_singular_vectors(v, w, weight, flip=align))
        known.append(fine)
    total, kept = 0.0, []
    for i in range(len(sides) - 1):
        n = min(counts[: i + 2])
        (sx, tx), (sy, ty) = ([x[..., :n] for x in side] for side in sides[i : i + 2])
        both = known[i] & known[i + 1]
        per_sample = torch.where(both, rbf_correlation_loss(sx, sy, tx, ty, beta, reduction="none"), 0)
        total = total + per_sample.sum() * (0.5 * math.sqrt(n) if loss == "authors" else 1 / max(len(both), 1))
        kept.append(both)
    return total, torch.stack(kept)


def _check_svd_kd(student, teacher, k, align, grad, weighting, loss, extra, beta) -> None:
    for name, features in (("student", student), ("teacher", teacher)):
        _features_of_layers(name, features)
    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError(f"student and teacher must be lists of as many features, at least two, got {len(student)} and {len(teacher)}")
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
                raise ValueError(f"{name}[{i}] must have the shape [B, C, *spatial] with at least one channel and one place, got {tuple(x.shape)}")
        if s.device != student[0].device or t.device != student[0].device:
            raise ValueError(f"layer {i}: student and teacher must be on one device, got {s.device} and {t.device}")
        if s.shape[:2] != t.shape[:2] or len(s) != len(student[0]):
            raise ValueError(f"layer {i}: student and teacher need the same batch and as many channels, got {tuple(s.shape)} and {tuple(t.shape)}")


def _decompose(maps: list[Tensor], counts: list[int], return_u: bool = False) -> list[tuple[Tensor | None, Tensor, Tensor]]:
    """truncated_svd of each map, those of as many vectors at once."""
    results: dict[int, tuple] = {}
    for n in sorted(set(counts)):
        chosen = [i for i, count in enumerate(counts) if count == n]
        results |= zip(chosen, truncated_svds([maps[i] for i in chosen], n, return_u=return_u), strict=True)
    return [results[i] for i in range(len(maps))]


def _student_vectors(maps: list[Tensor], counts: list[int], grad: str) -> list[tuple[Tensor | None, Tensor, Tensor]]:
    if grad == "exact":
        return _decompose(maps, counts)
    with torch.no_grad():
        results = _decompose(maps, counts, return_u=True)
    for i, (x, (u, s, v)) in enumerate(zip(maps, results, strict=True)):
        wide = x.shape[1] < x.shape[2]
        results[i] = (u, s, _with_rank1_gradient(x, u, s, v) if grad == "rank1" or wide else _with_zero_gradient(x, v))
    return results


def _with_zero_gradient(x: Tensor, v: Tensor) -> Tensor:
    """v, with a derivative that is 0 whatever x holds: a loss of such vectors alone has a backward too."""
    return v + x[:, :0].sum().to(v.dtype)


def _with_rank1_gradient(x: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """v, with the derivative of X^T u, u fixed, divided by its length."""
    fine = s.isfinite() & (s > 1e-6 * s[:, :1])  # [B, k]
    inverse = torch.where(fine, 1 / torch.where(fine, s, 1), 0)[:, None]
    with torch.autocast(x.device.type, enabled=False):
        image = x.to(u.dtype).mT @ torch.where(fine[:, None], u, 0)
    change = (image - image.detach()).nan_to_num() * inverse
    return v + (change - v.nan_to_num() * (v.nan_to_num() * change).sum(1, keepdim=True))


class SVDKDLoss(nn.Module):
    """:func:`svd_kd_loss` with its options fixed: ``SVDKDLoss(k=1)(student_features, teacher_features)``. The trainer with the authors' rule of two
    gradients is :class:`kdkernels.distill.SVDKD`.

    Args:
        k: vectors of a layer.
        **options: the keyword options of :func:`svd_kd_loss`: align, grad, weighting, loss, extra, beta.
    """

    def __init__(self, k: int = 1, **options):
        super().__init__()
        probe = [torch.ones(1, 1, 1)] * 2
        svd_kd_loss(probe, probe, k, **options)  # refuses here what cannot be
        self.k, self.options = k, options

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        return svd_kd_loss(student, teacher, self.k, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([f"k={self.k}", *(f"{name}={value!r}" for name, value in self.options.items())])
