"""Checks of the trainer's options before training, and a report of the teachers' accuracy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from .batch import as_batch
from .engine import BestCheckpoint, of_first_loader

if TYPE_CHECKING:
    from .base import Distiller


def check_weights(**weights: float) -> None:
    """Raise ValueError unless the weights of the terms of a loss are finite and >= 0."""
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"{name}, the weight of a term of the loss, must be a number, got {weight!r}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}, the weight of a term of the loss, must be finite and >= 0, got {weight}")


def check_layers_behind_taps(method: str, alpha: float, gamma: float | None = None) -> None:
    """Check that a method with taps trains the layers behind the last tap too.

    Only the loss on the labels, of weight ``gamma``, and T^2 KL, of weight ``alpha``, train them.
    If ``gamma`` is 0 as well, the user may want this, and is warned. Without labels (``gamma`` is
    ``None``), ValueError is raised.
    """
    if alpha or gamma:
        return
    if gamma is None:
        raise ValueError(
            f"the first training batch has no labels, and {method} without labels would train only the layers up to the last tap: "
            "set alpha, the weight of T^2 KL, to > 0"
        )
    rank_zero_warn(
        f"{method} trains only the layers up to the last tap: gamma, the weight of the loss on the labels, and alpha, the weight of T^2 KL, "
        "are both 0"
    )


def total_steps(trainer: L.Trainer) -> float:
    """Return the number of optimizer steps in the whole run, or infinity if the run has no end.

    The number is also right if a callback changes the gradient accumulation during training.
    """
    schedules = [callback for callback in cast(Any, trainer).callbacks if isinstance(callback, GradientAccumulationScheduler)]
    steps = trainer.estimated_stepping_batches
    max_epochs = cast(int, trainer.max_epochs)  # the trainer has replaced None by -1 or 1000
    if schedules and max_epochs > 0 and math.isfinite(trainer.num_training_batches):
        windows = (schedules[0].get_accumulate_grad_batches(epoch) for epoch in range(max_epochs))
        steps = sum(math.ceil(trainer.num_training_batches / window) for window in windows)
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return steps if steps > 0 else math.inf


class TrainerCheck(L.Callback):
    """Check options that would otherwise fail only later during training.

    Raises ValueError for a monitored value that is not logged, and for the default schedule in a
    run without an end. Whether validation batches have labels is known from the sanity check.
    """

    def __init__(self) -> None:
        self._labelled: dict[int, bool] = {}  # whether the batches of each validation loader had labels in the sanity check

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        for callback in cast(Any, trainer).callbacks:
            self._check_monitor(trainer, module, type(callback).__name__, getattr(callback, "monitor", None))

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.sanity_checking:
            self._labelled[dataloader_idx] = self._labelled.get(dataloader_idx, False) or "label" in as_batch(batch)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for config in trainer.lr_scheduler_configs:
            by_default = getattr(config.scheduler, "monitor", None) is None
            if by_default and config.monitor is not None and len(trainer.num_val_batches) > 1:
                config.monitor = of_first_loader(config.monitor)
            self._check_monitor(trainer, module, type(config.scheduler).__name__, config.monitor)
            self._check_loader(trainer, module, type(config.scheduler).__name__, config.monitor)
        for callback in cast(Any, trainer).callbacks:
            if not isinstance(callback, BestCheckpoint):  # which does without its value
                self._check_loader(trainer, module, type(callback).__name__, getattr(callback, "monitor", None))
        if getattr(module, "uses_default_schedule", False) and not math.isfinite(total_steps(trainer)):
            raise ValueError(
                "the default schedule decays to zero at the end of training, but this run has no end: give max_epochs or max_steps, or a scheduler"
            )

    def _check_monitor(self, trainer: L.Trainer, module: L.LightningModule, watcher: str, name: str | None) -> None:
        if name is None:
            return
        if (
            _is_builtin(module)
            and not name.startswith("train/")
            and name.partition("/dataloader_idx_")[0] not in (logged := _logged_in_validation(module))
        ):
            training = f"train/{next(iter(cast('Distiller', module).task.training_metrics(2)))}, train/loss"
            raise ValueError(f"{watcher} monitors {name!r}, which is not logged: use {', '.join(logged)}, {training}, or another value of training")
        validated = trainer.limit_val_batches != 0 and trainer.fit_loop.epoch_loop.val_loop._data_source.is_defined()
        if name.startswith("val/") and not validated and not cast(Any, trainer).fast_dev_run:
            raise ValueError(
                f"{watcher} monitors {name!r}, but there is no validation: limit_val_batches is 0, or the data have no validation images"
            )

    def _check_loader(self, trainer: L.Trainer, module: L.LightningModule, watcher: str, name: str | None) -> None:
        """Check that the validation loader of a monitored value exists and has labels."""
        loaders = len(trainer.num_val_batches)  # 0 before the loaders are made
        if name is None or not name.startswith("val/") or not loaders or not _is_builtin(module):
            return
        value, _, loader = name.partition("/dataloader_idx_")
        names = [f"{value}/dataloader_idx_{i}" for i in range(loaders)] if loaders > 1 else [value]
        if name not in names:
            count = f"are {loaders} validation loaders" if loaders > 1 else "is one validation loader"
            raise ValueError(f"{watcher} monitors {name!r}, but there {count}: use {' or '.join(names)}")
        if not self._labelled.get(int(loader or 0), True):
            which = f"validation loader {loader}" if loader else "validation"
            raise ValueError(f"{watcher} monitors {name!r}, which is not logged: the batches of {which} have no labels")


def _is_builtin(module: L.LightningModule) -> bool:
    """Whether the package defines the method. Others may log any value."""
    return type(module).__module__.startswith("kdkernels.")


def _logged_in_validation(module: L.LightningModule) -> list[str]:
    method = cast("Distiller", module)
    metrics = method.task.metrics(2)
    return [*(f"val/{name}{suffix}" for suffix in method.prediction_names() for name in metrics), "val/cross_entropy"]


class TeacherAccuracy(L.Callback):
    """Report once the accuracy of each teacher on the validation images (or pixels).

    Warn about a teacher that is no better than chance: probably its weights were not loaded.
    """

    def __init__(self) -> None:
        self._reported = self._warned = False
        self._correct: list[float] = []  # correctly classified rows, by teacher
        self._count, self._num_classes = 0, 1

    def _is_due(self, trainer: L.Trainer, module: Distiller) -> bool:
        return bool(module.teachers) and not self._reported and trainer.state.fn == "fit"

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        module = cast("Distiller", module)
        batch = as_batch(batch)
        if not self._is_due(trainer, module) or "label" not in batch:
            return
        module.hold_teachers()
        self._correct = self._correct or [0.0] * len(module.teachers)
        for i, teacher in enumerate(module.teachers):
            logits = module.task.logits(teacher(batch["image"]))
            correct, count = module.task.count_correct(logits, batch)
            self._correct[i] += correct
        self._count += count
        self._num_classes = logits.shape[1]

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        module = cast("Distiller", module)
        if not self._is_due(trainer, module):
            return
        correct = self._correct or [0.0] * len(module.teachers)
        numbers = torch.tensor([*correct, self._count], dtype=torch.float64, device=module.device)
        *correct, count = trainer.strategy.reduce(numbers, reduce_op="sum").tolist()
        self._correct, self._count = [], 0
        if not count:
            return
        for (name, teacher), teacher_correct in zip(module.teachers_by_name().items(), correct, strict=True):
            self._report(f"the {name}", type(teacher).__name__, module.task.rows, teacher_correct / count, count, trainer.sanity_checking)
        self._reported = not trainer.sanity_checking

    def _report(self, name: str, kind: str, rows: str, accuracy: float, count: float, sanity_checking: bool) -> None:
        chance = 1 / self._num_classes
        # Two standard deviations; less if there are few images.
        margin = min(2 * math.sqrt(chance * (1 - chance) / count), 0.3 * (1 - chance))
        if not self._warned and count >= self._num_classes and accuracy <= chance + margin:
            self._warned = True
            rank_zero_warn(
                f"{name} ({kind}) classifies {accuracy:.1%} of {count:.0f} {rows} correctly, "
                f"no better than chance with {self._num_classes} classes: check that its weights are loaded (teacher_weights)"
            )
        if not sanity_checking:
            rank_zero_info(f"{name}'s accuracy on the {count:.0f} validation {rows}: {accuracy:.4f}")
