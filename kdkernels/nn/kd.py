"""Knowledge distillation with softened predictions (Hinton, Vinyals, Dean 2015)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import checks
from ..ops.registration import clone_inference_tensor
from ..ops.temperature_kl import temperature_kl
from .features import check_labels


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
    check_labels(labels, "student", student, dim)
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
