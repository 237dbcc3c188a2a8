"""FSP, the flow of the solution procedure (Yim, Joo, Bae, Kim, CVPR 2017)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor, nn

from ..models.taps import pair_features
from ..nn.fsp import fsp_loss, fsp_matrix
from .checks import check_weights
from .two_stage import TwoStage

__all__ = ["FSP", "fsp_loss", "fsp_matrix"]


class FSP(TwoStage):
    """Match the FSP matrices of student and teacher.

    With two stages (as in the paper), ``first_stage_epochs`` epochs train on the FSP loss alone.
    They train the layers up to the last tap; the other layers do not change, not even by weight
    decay or momentum. The remaining epochs train on the labels, and on KD if ``alpha`` is set. With
    one stage (``first_stage_epochs=0``), all loss terms are trained at once.

    Args:
        student, teacher: networks that map images [B, C, H, W] to logits [B, K].
        student_taps, teacher_taps: names of layers, from first to last. Every two neighbours are a
            pair. Student and teacher must have the same number of channels at each layer.
        first_stage_epochs: epochs of the first stage.
        variant: see :func:`fsp_loss`.
        beta: weight of the FSP loss.
        gamma: weight of the cross-entropy.
        alpha: weight of T^2 KL; 0 omits it.
        temperature: T.
        **options: the other arguments of :class:`Distiller`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Iterable[str],
        teacher_taps: Iterable[str],
        first_stage_epochs: int = 0,
        variant: Literal["paper", "repdistiller", "sskd", "torchdistill"] = "paper",
        beta: float = 1.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        **options,
    ):
        super().__init__(student, teacher, first_stage_epochs, student_taps=student_taps, teacher_taps=teacher_taps, **options)
        if len(self.student_taps.names) < 2:
            raise ValueError(f"student_taps and teacher_taps must name at least two layers each, got {self.student_taps.names}")
        self.variant = variant
        check_weights(beta=beta, gamma=gamma, alpha=alpha)
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature

    def check_features(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        pair_features(student, teacher, channels=True)

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        teacher_logits, teacher_features = self.teacher_outputs(batch)
        logits, features = self.student_outputs(batch)
        student_pairs, teacher_pairs = (list(zip(list(f.values())[:-1], list(f.values())[1:], strict=True)) for f in (features, teacher_features))
        losses = {}
        if self.first_stage or not self.first_stage_epochs:
            losses["fsp"] = self.beta * fsp_loss(student_pairs, teacher_pairs, variant=self.variant)
        return logits, losses | self.main_losses(logits, teacher_logits, batch)
