"""Deep supervision (Lee, Xie, Gallagher, Zhang, Tu, AISTATS 2015)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..models.exits import Branch
from .checks import check_weights
from .exits import ExitDistiller

__all__ = ["DeepSupervision"]


class DeepSupervision(ExitDistiller):
    """Train every exit of a network on the labels (Lee et al., AISTATS 2015).

    The loss is ``CE + exit_weight sum_i CE_i``, where i runs over the exits.

    Args:
        student, student_taps, branch, image_shape: see :class:`ExitDistiller`.
        exit_weight: weight of the losses of the exits, one for all or one for each. With 1 it is
            :class:`BYOT` with ``alpha=0`` and ``beta=0``.
        **options: the other arguments of :class:`Distiller`.

    References:
        C.-Y. Lee, S. Xie, P. Gallagher, Z. Zhang, Z. Tu. Deeply-Supervised Nets. AISTATS 2015.
    """

    def __init__(
        self,
        student: nn.Module,
        student_taps: Iterable[str],
        exit_weight: list[float] | float = 1.0,
        branch: Branch = "bottleneck",
        image_shape: Sequence[int] | None = None,
        **options,
    ):
        super().__init__(student, student_taps, {"branch": branch}, image_shape, **options)
        count = len(self.student_taps.names) - 1
        self.exit_weights = list(exit_weight) if isinstance(exit_weight, (list, tuple)) else [exit_weight] * count
        if len(self.exit_weights) != count:
            raise ValueError(f"exit_weight must be one number, or one for each of the {count} exits, got {len(self.exit_weights)}")
        for weight in self.exit_weights:
            check_weights(exit_weight=weight)

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits, outputs = self.run_exits(batch["image"])
        losses = self.label_losses(logits, batch)
        for i, (z, weight) in enumerate(zip(outputs.logits, self.exit_weights, strict=True), 1):
            losses[f"exit_{i}"] = weight * self.task.label_loss(z, batch)
        return logits, losses

    def check_unlabelled(self) -> None:
        raise ValueError("DeepSupervision trains on labels alone, and the first training batch has none")
