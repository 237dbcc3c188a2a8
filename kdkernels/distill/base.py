"""The base of all distillation methods: the student that is trained, frozen teachers, and what is logged."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from .. import __version__
from ..data.keyed_random import bits
from ..models.taps import FeatureTaps
from ..models.weights import CHECKPOINT_KEY, load_weights
from ..tasks import Classification, Task
from .batch import as_batch
from .checks import TeacherAccuracy, TrainerCheck, total_steps
from .engine import OutputCheck
from .network_checks import check_networks, check_not_shared, check_sizes
from .teacher_cache import TeacherCache


def default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The function behind the lambda in the signatures below: jsonargparse can read a lambda's source, but pickle cannot store a lambda."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


class Distiller(L.LightningModule):
    """Trains ``student`` with the losses that a subclass returns from :meth:`losses`.

    A teacher is frozen: in eval mode, without gradients, moved with the module, and in neither the checkpoint nor the optimizer. One teacher
    can serve several methods. A batch is a dict with ``image`` and, if the data have labels, ``label``; or images alone, or a pair of them.

    Args:
        student: maps images [B, C, H, W] to logits, of the shape that ``task`` says. It may return them in a tuple, a dict or an object
            (:func:`kdkernels.tasks.find_logits`); other outputs are ignored.
        teacher: likewise; ``None`` for methods that need none; a list for methods that take several.
        student_weights: file that the student starts from, see :func:`kdkernels.models.load_weights`.
        teacher_weights: file with the teacher's weights: a state dict, ``.safetensors``, or a checkpoint of this package, whose student
            becomes the teacher. For a list of teachers a list of files, with ``None`` for teachers that have their weights already.
        student_taps, teacher_taps: names of layers whose outputs :meth:`losses` wants.
        teacher_cache: keeps the teacher's outputs for the training images on disk.
        optimizer: makes the optimizer from the student's parameters.
        scheduler: makes the schedule from the optimizer, one step an epoch; ``ReduceLROnPlateau`` one after each validation, by its ``monitor``
            where it has one (as Lightning's has), else the task's main metric (``val/accuracy``) in mode "max" and ``val/cross_entropy``
            in mode "min". By default the learning rate warms up over the first fifth of the steps, then decays to zero along a cosine.
        check_finite: stop before the update if the loss is NaN or infinite, and keep the batch (see :meth:`replay`). It waits for the loss
            each step; on a GPU that costs a little.
        task: what the labels mean, a class of :mod:`kdkernels.tasks`; by default :class:`kdkernels.tasks.Classification`.
    """

    can_be_sharded = True
    takes_several_teachers = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | list[nn.Module] | None = None,
        student_weights: str | os.PathLike | None = None,
        # The list comes first: jsonargparse takes the first type that fits, and turns a list into text for a str.
        teacher_weights: list[str | None] | str | os.PathLike | None = None,
        student_taps: Iterable[str] = (),
        teacher_taps: Iterable[str] = (),
        teacher_cache: TeacherCache | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
        scheduler: LRSchedulerCallable | None = None,
        check_finite: bool = True,
        task: Task | None = None,
    ):
        super().__init__()
        self.task = Classification() if task is None else task
        if not isinstance(self.task, Task):
            raise TypeError(f"task must be a kdkernels.tasks.Task, got {type(task).__name__}")
        if teacher is None and (teacher_weights is not None or teacher_cache is not None or tuple(teacher_taps)):
            raise ValueError("teacher_weights, teacher_taps and teacher_cache need a teacher")
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
        teachers = self._checked_teachers(teacher, teacher_cache)
        for network in teachers:
            check_not_shared(student, network)
        self.student = student if student_weights is None else load_weights(student, student_weights)
        for network, weights in zip(teachers, _weights_by_teacher(teacher_weights, teacher), strict=True):
            if weights is not None:
                load_weights(network, weights)
        check_sizes("student", student)
        # Kept in a list so that nn.Module does not register them: registered teachers would be saved in checkpoints and optimized.
        self._teachers: list[nn.Module] = teachers
        for name, network in self.teachers_by_name().items():
            check_sizes(name, network)
            network.eval().requires_grad_(False)
        self.student_taps = FeatureTaps(student, student_taps)
        self.teacher_taps = FeatureTaps(teachers[0], teacher_taps) if len(teachers) == 1 else None
        self.teacher_cache = teacher_cache
        is_default = str(getattr(optimizer, "__module__", None)).startswith("kdkernels.distill.")
        self.make_optimizer = default_optimizer if is_default else optimizer
        self.make_scheduler, self.check_finite = scheduler, check_finite
        self.student_spec: dict | None = None  # the configuration from which the command line built the student
        self.run_config: dict | None = None  # and the method and its data
        self.image_shape: list[int] | None = None
        self.preprocessing: dict | None = None  # of the data, see kdkernels.data.ImageData.preprocessing
        self._seed: int | None = None
        self._stepped_by: list[str] | None = None  # class names of the optimizer and the schedule
        self._resumed: tuple[list[str] | None, list | None] = None, None  # the same of a checkpoint, and the states of its optimizers
        self._networks_checked = False
        self._classes = 0  # of the networks, once they have been checked
        self._labels_checked: set[str] = set()  # stages
        self.stage_metrics = nn.ModuleDict()  # torchmetrics by stage and loader

    def _checked_teachers(self, teacher: nn.Module | list[nn.Module] | None, teacher_cache: TeacherCache | None) -> list[nn.Module]:
        teachers = [] if teacher is None else list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
        for network in teachers:
            if not isinstance(network, nn.Module):
                raise TypeError(f"teacher must be an nn.Module, got {type(network).__name__}")
        if isinstance(teacher, (list, tuple)):
            if not teachers:
                raise ValueError("teacher is an empty list: give at least one network")
            if len(teachers) > 1 and not self.takes_several_teachers:
                raise ValueError(f"{type(self).__name__} takes one teacher, got {len(teachers)}; KD takes several")
            if len(teachers) > 1 and teacher_cache is not None:
                raise ValueError(f"teacher_cache keeps the outputs of one teacher, got {len(teachers)} teachers")
        return teachers

    @property
    def teachers(self) -> list[nn.Module]:
        return list(self._teachers)

    @property
    def teacher(self) -> nn.Module | None:
        """The only teacher, or the first; ``None`` if there is none."""
        return self._teachers[0] if self._teachers else None

    def teachers_by_name(self) -> dict[str, nn.Module]:
        """Teachers by the name that messages give them: "teacher", or "teacher 1", "teacher 2", ..."""
        if len(self._teachers) == 1:
            return {"teacher": self._teachers[0]}
        return {f"teacher {i}": teacher for i, teacher in enumerate(self._teachers, 1)}

    def _apply(self, fn, recurse=True):  # .to(device), .double(), ... reach the teachers too
        for teacher in self._teachers:
            teacher._apply(fn)
        return super()._apply(fn)

    def train(self, mode: bool = True):
        super().train(mode)
        self.hold_teachers()
        return self

    def hold_teachers(self) -> None:
        """Put the teachers into eval mode, whatever has been done to them since: dropout and batch norm would change their outputs."""
        for teacher in self._teachers:
            if any(module.training for module in teacher.modules()):
                teacher.eval()

    # What a method writes, and what it writes it with.

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits, and the named losses, each a mean over the batch, whose sum is minimised."""
        raise NotImplementedError

    def check_features(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        """Raises ValueError where a method cannot compare the tapped features (:func:`kdkernels.models.pair_features`); called once."""

    def check_method(self, image: Tensor) -> None:
        """Raises where a method cannot be used with these networks; called once before training, with two images."""

    def check_unlabelled(self) -> None:
        """Raises ValueError if the method cannot train without labels; called before the first step on data that have none."""

    def student_outputs(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and tapped features of the student."""
        output, features = self.student_taps(batch["image"])
        return self.task.logits(output), features

    @torch.no_grad()
    def teacher_outputs(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and tapped features of the only teacher; from the cache where they are there."""
        if len(self._teachers) != 1:
            raise ValueError(f"{type(self).__name__} needs {'one' if self._teachers else 'a'} teacher")
        self.hold_teachers()
        if self.teacher_cache is not None and "view" in batch:
            return self.teacher_cache.outputs(batch, self._ask_teacher)
        return self._ask_teacher(batch["image"])

    def _ask_teacher(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output, features = self.teacher_taps(image)
        return self.task.logits(output), features

    @torch.no_grad()
    def teacher_logits(self, batch: dict) -> list[Tensor]:
        """Logits of each teacher."""
        if len(self._teachers) == 1:
            return [self.teacher_outputs(batch)[0]]
        self.hold_teachers()
        return [self.task.logits(teacher(batch["image"])) for teacher in self._teachers]

    def label_losses(self, logits: Tensor, batch: dict, weight: float = 1.0) -> dict[str, Tensor]:
        """``{"cross_entropy": weight * loss}`` with the task's loss on the labels; empty for a batch without labels."""
        return {"cross_entropy": weight * self.task.label_loss(logits, batch)} if "label" in batch else {}

    def forward(self, image: Tensor) -> Tensor:
        return self.task.logits(self.student(image))

    # What Lightning calls.

    def configure_callbacks(self) -> list[L.Callback]:
        return [OutputCheck(), TrainerCheck(), TeacherAccuracy()]

    def configure_model(self) -> None:
        """Under ModelParallelStrategy: the student's children and the student are sharded (FSDP2)."""
        if self.device_mesh is None:
            return
        if not self.can_be_sharded:
            raise ValueError(f"{type(self).__name__} differentiates twice, and FSDP gives up the weights after the first time: use DDP")
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self.student, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for child in self.student.children():
                if any(True for _ in child.parameters()):
                    fully_shard(child, mesh=mesh)
            fully_shard(self.student, mesh=mesh)

    def setup(self, stage: str) -> None:
        self.stage_metrics.clear()  # a state made under inference mode cannot be updated outside of it
        if self._seed is None:
            self._seed = torch.initial_seed() & 0x7FFFFFFFFFFFFFFF

    def on_fit_start(self) -> None:
        if not any(module.training for module in self.student.modules()):  # handed over from use; a part in eval mode is meant to be
            self.student.train()
        data = self.trainer.datamodule
        self.preprocessing = data.preprocessing() if hasattr(data, "preprocessing") else None
        if getattr(data, "image_shape", None) is not None:
            self._check_networks(torch.zeros(2, *data.image_shape, device=self.device, dtype=self.dtype), data.num_classes)
        if self.teacher_cache is not None:
            self.teacher_cache.open(self.teacher, self.teacher_taps.names, data, str(self.trainer.precision))

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        # Dropout and the like: what is drawn depends on the run's seed, the process and the step, not on what was drawn before.
        torch.manual_seed(int(bits(self._seed, self.global_rank, self.current_epoch, batch_idx)) & 0x7FFFFFFFFFFFFFFF)
        if self.image_shape is None:
            batch = as_batch(batch)
            self.image_shape = list(batch["image"].shape[1:])
            if "label" not in batch:
                self.check_unlabelled()
            if not self._networks_checked:  # data that do not say what their images are
                image = batch["image"].to(self.dtype)
                self._check_networks(torch.cat([image, image])[:2], None)  # of two: batch norm has no variance of one

    def _check_networks(self, image: Tensor, classes: int | None) -> None:
        self._classes = check_networks(self, image, classes)
        self._networks_checked = True

    def _check_labels(self, batch: dict, classes: int, stage: str) -> None:
        """Check every batch on the CPU, and the first of each stage on a GPU, where reading the values waits for the device.
        A GPU's own error would name neither labels nor classes."""
        if "label" not in batch:
            return
        label = batch["label"]
        values = label.device.type == "cpu" or stage not in self._labels_checked
        self.task.check_labels(label, batch["image"], classes, stage, values=values)
        self._labels_checked.add(stage)

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        return sum(self.checked_losses(batch, batch_idx).values()) * batch.get("share", 1.0)

    def checked_losses(self, batch: dict, batch_idx: int) -> dict[str, Tensor]:
        """:meth:`losses` of a training step, after labels and losses were checked and the losses logged."""
        self._check_labels(batch, self._classes, "training")
        logits, losses = self.losses(batch)
        total = sum(losses.values())
        if self.check_finite and not torch.isfinite(total):
            self._stop_for(batch, batch_idx, losses)
        values = {f"train/loss_{name}": value.detach() for name, value in losses.items()} | {"train/loss": total.detach()}
        if "label" in batch:
            values["train/cross_entropy"] = self.task.label_loss(logits.detach(), batch)
            self._update_metrics("train", logits.detach(), batch)
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(batch["image"]), sync_dist=True)
        return losses

    def _update_metrics(self, stage: str, logits: Tensor, batch: dict, loader: int = 0) -> None:
        key = f"{stage}_{loader}"
        if key not in self.stage_metrics:
            self.stage_metrics[key] = nn.ModuleDict(self.task.metrics(logits.shape[1])).to(logits.device)
        prediction, target = self.task.metric_inputs(logits, batch)
        for name, metric in self.stage_metrics[key].items():
            metric.update(prediction, target)
            shown = name == self.task.main_metric and stage != "train"
            place = f"stage_metrics.{key}.{name}"
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, prog_bar=shown, batch_size=len(logits), metric_attribute=place)

    def _stop_for(self, batch: dict, batch_idx: int, losses: dict[str, Tensor]) -> None:
        folder = Path(self.trainer.default_root_dir)
        path = folder / f"not_finite_step_{self.global_step}_rank_{self.global_rank}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: float(value.detach()) for name, value in losses.items()}
        torch.save({"batch": batch, "student": self.student.state_dict(), "losses": values}, path)
        raise FloatingPointError(
            f"the loss is not finite at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx}): "
            + ", ".join(f"{name} = {value:.4g}" for name, value in values.items())
            + f". The batch and the student before the step are in {path}; replay() of this method computes its losses again"
        )

    def replay(self, path: str | os.PathLike) -> dict[str, Tensor]:
        """The losses of a step that was stopped because they were not finite, with the student as it was. ``path`` is in the error."""
        stored = torch.load(path, map_location=self.device, weights_only=True)
        self.student.load_state_dict(stored["student"])
        return self.losses(stored["batch"])[1]

    def validation_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", as_batch(batch), dataloader_idx)

    def test_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", as_batch(batch), dataloader_idx)

    def predict_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Logits of the student, and ``index`` [B], the images' places in their split, where the data say them."""
        batch = as_batch(batch)
        return {"logits": self(batch["image"])} | {name: batch[name] for name in ("index",) if name in batch}

    def _evaluate(self, stage: str, batch: dict, loader: int) -> None:
        if "label" not in batch:  # there is nothing to compare the student with
            return
        logits = self(batch["image"])
        classes = getattr(self.trainer.datamodule, "num_classes", None)
        if classes is not None and logits.shape[1] != classes:
            kind = type(self.student).__name__
            raise ValueError(f"the data have {classes} classes, but the student ({kind}) returned {list(logits.shape)}")
        self._check_labels(batch, logits.shape[1], {"val": "validation"}.get(stage, stage))
        self._update_metrics(stage, logits, batch, loader)
        self.log(f"{stage}/cross_entropy", self.task.label_loss(logits, batch), batch_size=len(logits), sync_dist=True)

    @property
    def uses_default_schedule(self) -> bool:
        """Whether the learning rate follows the default schedule, which needs to know the number of steps."""
        return self.make_scheduler is None and type(self).configure_optimizers is Distiller.configure_optimizers

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.student.parameters())
        if self.make_scheduler is not None:
            schedule = self.make_scheduler(optimizer)
            self._check_resumed(optimizer, schedule)
            if not isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                return {"optimizer": optimizer, "lr_scheduler": schedule}
            monitor = getattr(schedule, "monitor", None) or {"max": f"val/{self.task.main_metric}", "min": "val/cross_entropy"}[schedule.mode]
            every = self.trainer.check_val_every_n_epoch or 1 if monitor.startswith("val/") else 1
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": monitor, "frequency": every}}

        def factor(step: int) -> float:
            # The number of steps is not asked for here and now: that makes the loader, before a resumed run has restored its place.
            return _rise_and_fall(step / total_steps(self.trainer) if step else 0.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self._check_resumed(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint[CHECKPOINT_KEY] = {
            "version": __version__,
            "student": self.student_spec,
            "config": self.run_config,
            "image_shape": self.image_shape,
            "task": type(self.task).__name__.lower(),
            "preprocessing": self.preprocessing,
            "seed": self._seed,
            "stepped_by": self._stepped_by,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        own = checkpoint.get(CHECKPOINT_KEY, {})
        self._seed = own.get("seed", self._seed)
        self._resumed = own.get("stepped_by"), checkpoint.get("optimizer_states")
        if self._trainer is not None and self._trainer.optimizers:  # strategies that load after the optimizers are made
            self._check_resumed(self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler)

    def _check_resumed(self, optimizer: torch.optim.Optimizer, schedule: object) -> None:
        """Whether a checkpoint that is gone on with was trained by such an optimizer and schedule: the states of others do not fit, and some
        would be taken without a word."""
        self._stepped_by = [type(x).__name__ for x in (getattr(optimizer, "optimizer", optimizer), schedule)]
        before, states = self._resumed
        other = before is not None and before != self._stepped_by
        if before is None and states:  # of a version that did not say
            before = [f"an optimizer with {', '.join(sorted(k for k in states[0]['param_groups'][0] if k != 'params'))}"]
            other = not set(optimizer.defaults) <= set(states[0]["param_groups"][0])
        if other:
            raise ValueError(
                f"the checkpoint was trained by {' and '.join(before)}, and is to go on with {' and '.join(self._stepped_by)}, whose state it does "
                "not have: take the same, or start anew from its weights (student_weights)"
            )


def _weights_by_teacher(weights: object, teacher: nn.Module | Sequence[nn.Module] | None) -> list:
    """The weights' file of each teacher, or ``None``."""
    count = 0 if teacher is None else len(teacher) if isinstance(teacher, (list, tuple)) else 1
    if weights is None:
        return [None] * count
    files = list(weights) if isinstance(weights, (list, tuple)) else [weights]
    if len(files) != count:
        raise ValueError(f"teacher_weights must name one file for each of the {count} teachers, got {len(files)}")
    return files


def _rise_and_fall(progress: float) -> float:
    """Factor on the rate: from 1/25 to 1 in the first fifth, then to 0, both by half a cosine."""
    if progress < 0.2:
        return 1 - 0.96 * (0.5 + 0.5 * math.cos(math.pi * progress / 0.2))
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - 0.2) / 0.8))
