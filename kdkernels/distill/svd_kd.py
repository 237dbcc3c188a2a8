"""SVD-KD, self-supervised knowledge distillation by singular value decomposition.

S. H. Lee, D. H. Kim, B. C. Song, ECCV 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypedDict, cast

import torch
from torch import Tensor, nn

from ..models.taps import pair_features
from ..nn.svd_kd import svd_kd_loss, svd_kd_terms  # in kdkernels.nn, because they do not need Lightning
from .batch import as_batch
from .checks import check_weights
from .two_stage import TwoStage

__all__ = ["SVDKD", "clip_transfer", "svd_kd_loss"]


def clip_transfer(
    main: Sequence[Tensor], transfer: Sequence[Tensor], epoch: float, *, rule: Literal["authors", "poster"] = "authors"
) -> list[Tensor]:
    r"""Clip the gradient of the transfer loss against that of the main loss, per parameter.

    The sum of the main gradient m and the clipped transfer gradient t is the gradient of a step.
    With :math:`\tau = \|m\|_2 / \|t\|_2`:

    =========  ==================================================================================
    ``rule``   clipped transfer gradient
    =========  ==================================================================================
    "authors"  :math:`t \min(1, \tau \,\mathrm{sigmoid}(epoch))`
    "poster"   :math:`t \,\mathrm{sigmoid}(\tau - epoch)` if :math:`\tau > 1`, else :math:`t`
    =========  ==================================================================================

    "authors" is the rule of the released code: the transfer gradient is at most half as long as the
    main gradient in the first epoch, and at most as long in later epochs. "poster" is the formula
    of the paper: a transfer gradient shorter than the main gradient fades out over the epochs.

    Args:
        main, transfer: gradients m and t of the same parameters. If both contain a common factor,
            for example of a loss scaler, the result contains it too.
        epoch: counted from 0.

    Returns:
        The clipped gradients of the transfer loss.

    Raises:
        ValueError: the lists have different lengths, or the rule is unknown.
    """
    if len(main) != len(transfer):
        raise ValueError(f"main and transfer must be gradients of the same parameters, got {len(main)} and {len(transfer)} gradients")
    if rule not in ("authors", "poster"):
        raise ValueError(f"rule must be 'authors' or 'poster', got {rule!r}")
    if not transfer:
        return []
    m, t = (torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]) for gradients in (main, transfer))
    if rule == "authors":
        limit = m / (1 + math.exp(-epoch))
        factors = torch.where(t > limit, limit / t, 1.0)
    else:
        factors = torch.where(t < m, torch.sigmoid(m / t - epoch), 1.0)
    return [g * factor.to(g.dtype) for g, factor in zip(transfer, factors.unbind(), strict=True)]


class _Terms(TypedDict):
    """The options of :func:`svd_kd_loss`, except beta."""

    k: int
    align: Literal["teacher", "student"]
    grad: Literal["exact", "rank1", "authors"]
    weighting: Literal["sigma", "none"]
    loss: Literal["authors", "mean"]
    extra: int


class SVDKD(TwoStage):
    """Train on the labels and on the main singular vectors of a teacher's feature maps.

    The main singular vectors are those with the largest singular values.

    Multitask training (the default) computes two gradients per step: that of the main loss, ``gamma
    CE + alpha T^2 KL`` and the optimizer's weight decay, and that of the transfer loss,
    :func:`svd_kd_loss`. The second is clipped against the first, parameter by parameter
    (:func:`clip_transfer`), and added to it. Both gradients are those of the whole step: they are
    combined after the micro-batches have been accumulated and the processes reduced, and before the
    factor of a loss scaler is removed.

    Two-stage training (the paper's first table) trains ``first_stage_epochs`` epochs on the
    transfer loss alone, without clipping, and then on the main loss alone.

    The number of samples of an epoch with a feature map that has no singular vectors (all zeros,
    NaN or infinity) is logged as ``train/left_out``.

    Args:
        student, teacher: networks that map images [B, C, H, W] to logits [B, K].
        student_taps, teacher_taps: names of layers, from first to last. Every two neighbours are a
            pair. Student and teacher must have the same number of channels at each layer.
        k, align, grad, weighting, loss, extra: see :func:`svd_kd_loss`. With ``loss="authors"`` the
            sum is over the whole batch of a step, including all processes and micro-batches.
        first_stage_epochs: epochs of the first of two stages; 0 for multitask training.
        rule: see :func:`clip_transfer`.
        decay_in_norm: include the optimizer's (coupled) weight decay in the main gradient against
            which the transfer gradient is clipped, as the authors do; KD_methods_with_TF does not.
        beta: weight of the transfer loss, applied before clipping.
        gamma: weight of the cross-entropy.
        alpha: weight of T^2 KL; 0 omits it.
        temperature: T.
        **options: the other arguments of :class:`Distiller`.
    """

    can_be_sharded = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Iterable[str],
        teacher_taps: Iterable[str],
        k: int = 1,
        align: Literal["teacher", "student"] = "teacher",
        grad: Literal["exact", "rank1", "authors"] = "exact",
        weighting: Literal["sigma", "none"] = "sigma",
        loss: Literal["authors", "mean"] = "authors",
        extra: int = 1,
        first_stage_epochs: int = 0,
        rule: Literal["authors", "poster"] = "authors",
        decay_in_norm: bool = True,
        beta: float = 1.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        **options,
    ):
        super().__init__(student, teacher, first_stage_epochs, student_taps=student_taps, teacher_taps=teacher_taps, **options)
        if len(self.student_taps.names) < 2:
            raise ValueError(f"student_taps and teacher_taps must name at least two layers each, got {self.student_taps.names}")
        self.terms: _Terms = {"k": k, "align": align, "grad": grad, "weighting": weighting, "loss": loss, "extra": extra}
        # Validate the options now rather than at the first batch.
        clip_transfer([], [], 0, rule=rule)
        svd_kd_loss([torch.ones(1, 1, 1)] * 2, [torch.ones(1, 1, 1)] * 2, **self.terms)
        self.rule, self.decay_in_norm = rule, decay_in_norm
        check_weights(beta=beta, gamma=gamma, alpha=alpha)
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature
        self._left_out: Tensor | None = None
        # Transfer gradient of the current step, summed over its micro-batches so far.
        self._transfer: list[Tensor | None] | None = None

    def check_features(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        pair_features(student, teacher, channels=True)

    def check_method(self, image: Tensor) -> None:
        maps = [x.flatten(2) for x in self.student_taps(image)[1].values()]
        if self.terms["grad"] == "authors" and all(x.shape[2] >= x.shape[1] for x in maps):
            raise ValueError(
                "grad='authors' trains no tapped layer: only maps with fewer spatial positions than channels get a gradient, and the layers "
                f"{self.student_taps.names} have {[x.shape[2] for x in maps]} positions and {[x.shape[1] for x in maps]} channels: use another grad"
            )

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        teacher_logits, teacher_features = self.teacher_outputs(batch)
        logits, features = self.student_outputs(batch)
        losses = self.main_losses(logits, teacher_logits, batch)
        if self.first_stage or not self.first_stage_epochs:
            pairs = pair_features(features, teacher_features, channels=True)
            student_maps, teacher_maps = zip(*pairs, strict=True)
            pair_losses, kept = svd_kd_terms(student_maps, teacher_maps, **self.terms)
            transfer = cast(Tensor, sum(pair_losses))
            losses["svd"] = self.beta * transfer
            self._left_out = (~kept.all(0)).sum()
        return logits, losses

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        losses = self.checked_losses(batch, batch_idx)
        share = batch.get("share", 1.0)
        if "svd" in losses:
            self.log("train/left_out", cast(Tensor, self._left_out).float(), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
            # "mean" is a mean over the samples of all micro-batches and processes, like the other
            # losses; "authors" is a sum over them.
            parts = self.trainer.accumulate_grad_batches * self.trainer.world_size
            self._accumulate(losses.pop("svd") * (share / parts if self.terms["loss"] == "mean" else 1.0))
        return cast(Tensor, sum(losses.values())) * share

    def _trainable_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    def _accumulate(self, transfer: Tensor) -> None:
        """Add the gradient of a micro-batch's transfer loss to that of the current step."""
        if not transfer.requires_grad:  # no feature map of the batch has singular vectors
            return
        gradients = torch.autograd.grad(transfer * self._scale(transfer), self._trainable_parameters(), retain_graph=True, allow_unused=True)
        if self._transfer is None:
            self._transfer = list(gradients)
        else:
            self._transfer = [b if a is None else a if b is None else a + b for a, b in zip(self._transfer, gradients, strict=True)]

    def _scale(self, like: Tensor) -> Tensor | float:
        """Return the factor of the loss scaler, or 1 if training uses none."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return 1.0 if scaler is None else scaler.scale(torch.ones_like(like))

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
        """Add the transfer gradient to the main gradient before the optimizer's step.

        This happens after the backward pass of the step's last micro-batch, and before the loss
        scaler's factor is removed from the gradients.
        """

        def closure() -> Any:
            loss = cast(Callable[[], Any], optimizer_closure)()
            self._add_transfer(optimizer)
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    @torch.no_grad()
    def _add_transfer(self, optimizer: torch.optim.Optimizer) -> None:
        gradients, self._transfer = self._transfer, None
        if gradients is None and self.trainer.world_size == 1:
            return
        parameters = self._trainable_parameters()
        gradients = gradients or [None] * len(parameters)
        if self.trainer.world_size > 1:  # a gradient may be None in some of the processes
            flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients, strict=True)])
            flat = self.trainer.strategy.reduce(flat, reduce_op="sum")
            gradients = [g.view_as(p) for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True)]
        trained, transfer = map(list, zip(*((p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None), strict=True))
        if not self.first_stage:
            decay = self._weight_decay(optimizer)
            main = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
            main = [g + decay[p] * self._scale(g.new_empty(())) * p if decay.get(p) else g for p, g in zip(trained, main, strict=True)]
            transfer = clip_transfer(main, transfer, self.current_epoch, rule=self.rule)
        for p, g in zip(trained, transfer, strict=True):
            p.grad = g if p.grad is None else p.grad + g

    def _weight_decay(self, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, float]:
        """Return the weight decay that the optimizer adds to the gradient of each parameter."""
        if not self.decay_in_norm or isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.AdamW):
            return {}
        groups = [group for group in optimizer.param_groups if not group.get("decoupled_weight_decay")]
        return {p: group.get("weight_decay", 0.0) for group in groups for p in group["params"]}
