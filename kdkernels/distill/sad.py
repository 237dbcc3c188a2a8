"""Self attention distillation (Hou, Ma, Liu, Loy, ICCV 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..nn.sad import checked_paths, sad_loss
from .base import Distiller
from .checks import check_weights, total_steps

__all__ = ["SAD"]


class SAD(Distiller):
    """Layers of a network learn from the attention maps of its later layers.

    The loss is ``task's losses + gamma sad_loss`` (:func:`kdkernels.nn.sad_loss`). It trains any
    network on any task; the paper trains lane detection.

    Args:
        student: maps images [B, C, H, W] to logits in the shape of ``task``.
        student_taps: names of layers with feature maps [B, C, H, W], from the front to the back.
        paths: pairs of tapped layers; the first layer of a pair learns from the second. By default
            each layer learns from the next one.
        gamma: weight of the attention loss (0.1 in the paper).
        start_step: number of optimizer steps without the attention loss. The paper adds it after
            40,000 of 60,000 steps.
        detach_target: whether the second layer's map is a constant.
        reduction: "sum" or "mean" over the positions of a map.
        align_corners: how maps of different sizes are interpolated.
        normalize: whether the energies of a map are divided by their mean before the softmax; see
            :func:`kdkernels.nn.sad_attention`. Not in the paper.
        **options: the other arguments of :class:`Distiller`. There is no teacher.

    References:
        Y. Hou et al. Learning Lightweight Lane Detection CNNs by Self Attention Distillation. ICCV
        2019. https://arxiv.org/abs/1908.00821
    """

    def __init__(
        self,
        student: nn.Module,
        student_taps: Iterable[str],
        paths: list[list[str]] | None = None,
        gamma: float = 0.1,
        start_step: int = 0,
        detach_target: bool = True,
        reduction: Literal["sum", "mean"] = "sum",
        align_corners: bool = False,
        normalize: bool = False,
        **options,
    ):
        super().__init__(student, student_taps=student_taps, **options)
        if self.teachers:
            raise ValueError(f"SAD has no teacher: the network is its own teacher; got teacher={type(self.teacher).__name__}")
        names = self.student_taps.names
        if len(names) < 2:
            raise ValueError(f"student_taps must name at least two layers, from the front to the back, got {names}")
        self.paths = checked_paths(None if paths is None else [_positions(path, names) for path in paths], len(names))
        check_weights(gamma=gamma)
        if isinstance(start_step, bool) or not isinstance(start_step, int) or start_step < 0:
            raise ValueError(f"start_step must be an integer >= 0, got {start_step!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
        self.gamma, self.start_step = gamma, start_step
        self.loss_options: dict[str, Any] = {
            "detach_target": detach_target,
            "reduction": reduction,
            "align_corners": align_corners,
            "normalize": normalize,
        }

    def on_train_start(self) -> None:
        steps = total_steps(self.trainer)
        if self.start_step >= steps and not cast(Any, self.trainer).fast_dev_run:
            raise ValueError(
                f"start_step must be below the number of steps of the run, {steps:.0f}, got {self.start_step}: the loss would never be added"
            )

    def attention_loss(self, features: dict[str, Tensor]) -> Tensor:
        """Return the loss of the tapped features, without its weight."""
        for name, feature in features.items():
            if not isinstance(feature, Tensor) or feature.dim() != 4:
                shape = list(feature.shape) if isinstance(feature, Tensor) else type(feature).__name__
                raise ValueError(f"student_taps: the output of layer {name!r} must be a feature map [B, C, H, W], got {shape}")
        return sad_loss(list(features.values()), self.paths, **self.loss_options)

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits, features = self.student_outputs(batch)
        losses = self.label_losses(logits, batch)
        if self.global_step >= self.start_step:
            losses["attention"] = self.gamma * self.attention_loss(features)
        return logits, losses

    def check_method(self, image: Tensor) -> None:
        with torch.no_grad():
            self.attention_loss(self.student_outputs({"image": image})[1])

    def check_unlabelled(self) -> None:
        raise ValueError("SAD trains the last layer on labels alone, and the first training batch has none")


def _positions(path: list[str], names: list[str]) -> tuple[int, int]:
    """Return the positions of a pair of layers among the tapped layers."""
    if isinstance(path, str) or len(path) != 2 or any(name not in names for name in path):
        raise ValueError(f"paths must be pairs of the layers in student_taps ({', '.join(names)}), got {path!r}")
    return names.index(path[0]), names.index(path[1])
