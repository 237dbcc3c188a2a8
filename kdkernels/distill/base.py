"""What all distillation methods share: the student that is trained, the teacher that is not, and what is logged."""

from __future__ import annotations

import os
from collections.abc import Iterable

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.taps import FeatureTaps


class Distiller(L.LightningModule):
    """Trains ``student`` with the losses that a subclass returns from :meth:`losses`.

    The teacher is frozen: in eval mode, without gradients, moved with the module, and in neither the checkpoint nor the optimizer.

    Args:
        student: maps images [B, 3, H, W] to logits [B, K].
        teacher: likewise; ``None`` for methods that need none.
        teacher_weights: file with the teacher's weights: a state dict, or a checkpoint of this package, whose student becomes the teacher.
        student_taps, teacher_taps: names of layers whose outputs :meth:`losses` may want.
        lr, momentum, weight_decay: of SGD with Nesterov momentum; the rate rises for a fifth of the steps, then falls by a half cosine to zero.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        teacher_weights: str | os.PathLike | None = None,
        student_taps: Iterable[str] = (),
        teacher_taps: Iterable[str] = (),
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ):
        super().__init__()
        self.student = student
        self._teacher: list[nn.Module] = []  # in a list: a submodule would be saved, and trained
        if teacher is not None:
            if teacher_weights is not None:
                teacher.load_state_dict(load_weights(teacher_weights))
            self._teacher = [teacher.eval().requires_grad_(False)]
        elif teacher_weights is not None:
            raise ValueError("teacher_weights were given, but no teacher to load them into")
        self.student_taps = FeatureTaps(student, student_taps)
        self.teacher_taps = FeatureTaps(teacher, teacher_taps) if teacher is not None else None
        self.optimizer_options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0] if self._teacher else None

    def _apply(self, fn, recurse=True):  # .to(device), .double(), ... reach the teacher too
        if self.teacher is not None:
            self.teacher._apply(fn)
        return super()._apply(fn)

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits [B, K], and the named losses whose sum is minimised."""
        raise NotImplementedError

    @torch.no_grad()
    def teacher_outputs(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and tapped features of the teacher."""
        if self.teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher")
        return self.teacher_taps(image)

    def forward(self, image: Tensor) -> Tensor:
        return self.student(image)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, losses = self.losses(batch)
        total = sum(losses.values())
        size = len(batch["label"])
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, on_step=False, on_epoch=True, batch_size=size)
        self.log("train/accuracy", _accuracy(logits, batch), on_step=False, on_epoch=True, batch_size=size)
        return total

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: dict[str, Tensor]) -> None:
        logits = self.student(batch["image"])
        size = len(batch["label"])
        self.log(f"{stage}/accuracy", _accuracy(logits, batch), prog_bar=True, batch_size=size, sync_dist=True)
        self.log(f"{stage}/cross_entropy", F.cross_entropy(logits, batch["label"]), batch_size=size, sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.student.parameters(), nesterov=True, **self.optimizer_options)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.optimizer_options["lr"], total_steps=steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Supervised(Distiller):
    """Cross-entropy on the labels alone: how teachers are trained, and what a distilled student is compared with."""

    def __init__(self, student: nn.Module, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 5e-4):
        super().__init__(student, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def losses(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.student(batch["image"])
        return logits, {"cross_entropy": F.cross_entropy(logits, batch["label"])}


def load_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """A state dict from a file: one as such, or the student of a checkpoint of this package."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"teacher_weights: there is no file {os.fspath(path)!r}")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    stored = stored.get("state_dict", stored)
    student = {key.removeprefix("student."): value for key, value in stored.items() if key.startswith("student.")}
    return student or stored


def _accuracy(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (logits.argmax(1) == batch["label"]).float().mean()
