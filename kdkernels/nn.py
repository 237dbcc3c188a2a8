"""The losses as modules and functions, for drop-in use. Needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.attention_pool import attention_transfer_loss
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


class AttentionTransfer(nn.Module):
    """Sum over pairs of layers of :func:`kdkernels.attention_transfer_loss`: ``AttentionTransfer()(student_features, teacher_features)``.

    RepDistiller's ``Attention`` gives the list, mdistiller's ``at_loss`` the sum; both with ``p=2`` and ``variant="code"``.

    Args:
        p, reduce: see :func:`kdkernels.attention_transfer_loss`; one for all pairs, or one for each.
        variant: "code" or "paper".
    """

    def __init__(self, p: float | Sequence[float] = 2.0, *, reduce: str | Sequence[str] = "mean", variant: str = "code"):
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
    variant: str = "code",
) -> list[Tensor]:
    """:func:`kdkernels.attention_transfer_loss` of each pair of features. The teacher's are detached.

    Raises:
        ValueError: lists of different lengths, or no pair.
    """
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
