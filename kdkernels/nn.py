"""The losses as modules and functions, for drop-in use. Needs torch alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.temperature_kl import temperature_kl


class TemperatureKL(nn.Module):
    """:func:`kdkernels.temperature_kl` with its options fixed: ``TemperatureKL(4.0)(student_logits, teacher_logits)``.

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
            raise TypeError(f"TemperatureKL has no option {unknown[0]!r}; it takes {', '.join(self._OPTIONS)}")
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
        temperature = f"temperature={float(self.temperature):g}" + (", learnable=True" if self.log_temperature is not None else "")
        return ", ".join([temperature, *(f"{k}={v!r}" for k, v in self.options.items())])


def kd_loss(
    student: Tensor,  # [B, K]
    teacher: Tensor,  # [B, K]
    labels: Tensor,  # [B] int64
    temperature: float | Tensor = 4.0,
    *,
    gamma: float = 0.1,
    alpha: float = 0.9,
) -> Tensor:
    """``gamma * cross_entropy(student, labels) + alpha * T^2 KL(teacher || student)``, both means over the batch.

    The defaults are those of RepDistiller (T = 4, 0.1, 0.9). The teacher is detached.

    References:
        G. Hinton, O. Vinyals, J. Dean. Distilling the Knowledge in a Neural Network. 2015. https://arxiv.org/abs/1503.02531
    """
    return gamma * F.cross_entropy(student.float(), labels) + alpha * temperature_kl(student, teacher.detach(), temperature)
