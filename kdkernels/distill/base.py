"""The base class of all distillation methods: trains the student, freezes teachers, logs values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from .. import __version__
from ..data.keyed_random import bits
from ..models.taps import FeatureTaps
from ..models.weights import CHECKPOINT_KEY, load_weights
from ..ops.checks import flag
from ..tasks import Classification, Task
from .batch import as_batch
from .checks import TeacherAccuracy, TrainerCheck, total_steps
from .engine import OutputCheck
from .network_checks import check_networks, check_not_shared, check_sizes
from .optimization import check_resumed, default_optimizer, optimizer_name, warm_up_and_decay
from .teacher_cache import TeacherCache
from .teachers import checked_teachers, weights_by_teacher

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from torchmetrics import Metric
    from typing_extensions import Self


class Distiller(L.LightningModule):
    """Base class of methods: trains ``student`` with the :meth:`losses` of a subclass.

    Teachers are frozen: in eval mode, without gradients, in neither the checkpoint nor the
    optimizer. They move with the module, and several methods can share one. A batch is a dict with
    ``image`` and, if the data have labels, ``label``; or images alone; or a pair (image, label).

    Args:
        student: maps images [B, C, H, W] to logits in the shape of ``task``. They may be in a
            tuple, a dict or an object (:func:`kdkernels.tasks.find_logits`).
        teacher: network like ``student``, a list (or nn.ModuleList) of several, or ``None`` for
            methods without one.
        student_weights: initial weights, a file for :func:`kdkernels.models.load_weights`.
        teacher_weights: file with the teacher's weights: a state dict, ``.safetensors``, or a
            checkpoint of this package, whose student becomes the teacher. For a list of teachers,
            a list of files, with ``None`` for teachers that already have their weights.
        student_taps, teacher_taps: names of layers whose outputs :meth:`losses` uses.
        teacher_cache: stores the teacher's outputs for the training images on disk.
        optimizer: function that returns the optimizer for the trained parameters. The default is
            SGD with learning rate 0.1, Nesterov momentum 0.9 and weight decay 5e-4.
        scheduler: function that returns the schedule for the optimizer; it makes one step per
            epoch. ``ReduceLROnPlateau`` makes one step per validation. The value that it monitors
            is its attribute ``monitor``, which Lightning's subclass has. Without this attribute it
            is the task's main metric (such as ``val/accuracy``) in mode "max", and
            ``val/cross_entropy`` in mode "min". By default the learning rate warms up over the
            first fifth of the steps, then decays to zero along a cosine.
        check_finite: raise an error before the update if the loss is NaN or infinite, and save the
            batch for :meth:`replay`. Every step then waits for the loss, a small cost on a GPU.
        task: defines the labels and their loss; :class:`kdkernels.tasks.Classification` by default.
    """

    can_be_sharded = True
    takes_several_teachers = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | list[nn.Module] | None = None,
        student_weights: str | os.PathLike | None = None,
        # The list type comes first: otherwise jsonargparse would convert a list to a str.
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
        for name, taps in {"student_taps": student_taps, "teacher_taps": teacher_taps}.items():
            if isinstance(taps, str):
                raise TypeError(f"{name} must be a list of names of layers, got {taps!r}")
        if not callable(optimizer):
            raise TypeError(f"optimizer must be a function of the parameters, such as a partial of torch.optim.SGD, got {optimizer!r}")
        flag("check_finite", check_finite)
        self.task = Classification() if task is None else task
        if not isinstance(self.task, Task):
            raise TypeError(f"task must be a kdkernels.tasks.Task, got {type(task).__name__}")
        if teacher is None and (teacher_weights is not None or teacher_cache is not None or tuple(teacher_taps)):
            raise ValueError("teacher_weights, teacher_taps and teacher_cache need a teacher")
        if not isinstance(student, nn.Module):
            raise TypeError(f"student must be an nn.Module, got {type(student).__name__}")
        teachers = checked_teachers(type(self).__name__, teacher, self.takes_several_teachers, teacher_cache is not None)
        for network in teachers:
            check_not_shared(student, network)
        self.student = student if student_weights is None else load_weights(student, student_weights)
        for network, weights in zip(teachers, weights_by_teacher(teacher_weights, len(teachers)), strict=True):
            if weights is not None:
                load_weights(network, weights)
        check_sizes("student", student)
        # In a list, because nn.Module would register a teacher, and then save and optimize it.
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
        self.student_spec: dict | None = None  # from which the command line built the student
        self.run_config: dict | None = None  # from which it built the method and the data
        self.image_shape: list[int] | None = None
        self.preprocessing: dict | None = None  # see kdkernels.data.ImageData.preprocessing
        self._seed: int | None = None
        self._optimizer_and_schedule: list[str] | None = None  # class names
        # From the checkpoint of a resumed run: the same class names, and the optimizers' states.
        self._resumed: tuple[list[str] | None, list | None] = None, None
        # The last output of the student that contains more than its logits, and these logits.
        self._student_output: tuple[object, Tensor] | None = None
        self._networks_checked = False
        self._num_classes = 0  # of the networks; known after they have been checked
        self._label_stages_checked: set[str] = set()
        self._has_labels: bool | None = None  # whether the training batches of this run have labels
        self.stage_metrics = nn.ModuleDict()  # torchmetrics by stage and data loader
        self._labelled_rows: dict[str, int | Tensor] = {}  # of this epoch, by stage and data loader, if the task ignores rows

    @property
    def teachers(self) -> list[nn.Module]:
        return list(self._teachers)

    @property
    def teacher(self) -> nn.Module | None:
        """The first teacher, or ``None`` without teachers."""
        return self._teachers[0] if self._teachers else None

    def teachers_by_name(self) -> dict[str, nn.Module]:
        """Teachers by their names in messages: "teacher", or "teacher 1", "teacher 2", ..."""
        if len(self._teachers) == 1:
            return {"teacher": self._teachers[0]}
        return {f"teacher {i}": teacher for i, teacher in enumerate(self._teachers, 1)}

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:  # .to(device), .double(), ... reach the teachers too
        for teacher in self._teachers:
            teacher._apply(fn)
        return super()._apply(fn)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.hold_teachers()
        return self

    def hold_teachers(self) -> None:
        """Put the teachers into eval mode again, in case the caller has changed their mode."""
        for teacher in self._teachers:
            if any(module.training for module in teacher.modules()):
                teacher.eval()

    def trained_modules(self) -> dict[str, nn.Module]:
        """Return the modules that are optimized, by their names in messages."""
        return {"student": self.student}

    def optimized_parameters(self) -> Iterable[nn.Parameter] | list[dict]:
        """Return the parameters of :meth:`trained_modules` for the optimizer, or groups of them."""
        return (p for module in self.trained_modules().values() for p in module.parameters())

    def new_optimizer(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.optimized_parameters())

    def restore_modules(self, image_shape: list[int], weights: dict[str, Tensor]) -> None:
        """Construct the trained modules besides the student, and load them from a checkpoint.

        Args:
            image_shape: [C, H, W] of the run.
            weights: the state dict of the checkpoint.
        """

    # For subclasses: methods to override, then methods to call.

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the student's logits and the named loss terms, each a mean over the batch."""
        raise NotImplementedError

    def check_features(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        """Raise ValueError if the tapped features cannot be compared; called before training."""

    def check_method(self, image: Tensor) -> None:
        """Raise an error if the networks do not suit the method; called once, with two images."""

    def check_unlabelled(self) -> None:
        """Raise ValueError if the method needs labels; called before training without labels."""

    def check_labelled(self) -> None:
        """Raise ValueError if the loss is always 0, and warn if it does not train all layers.

        Called before training with labels.
        """

    def student_outputs(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and tapped features of the student."""
        output, features = self.student_taps(batch["image"])
        return self.logits_of_student(output), features

    def logits_of_student(self, output: object) -> Tensor:
        """Return the logits in an output of the student.

        An output that contains more than logits is kept until the end of the step, so that
        :meth:`label_losses` and the metrics can use all of it. Methods that run the student without
        :meth:`student_outputs` should call this function.
        """
        logits = self.task.logits(output)
        self._student_output = None if output is logits else (output, logits)
        return logits

    def _output_with(self, logits: Tensor) -> object:
        """Return the last output of the student if it contains these logits, else the logits."""
        if self._student_output is not None and self._student_output[1] is logits:
            return self._student_output[0]
        return logits

    @torch.no_grad()
    def teacher_outputs(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and tapped features of the only teacher, from the cache if it has them."""
        if len(self._teachers) != 1:
            raise ValueError(f"{type(self).__name__} needs one teacher, got {len(self._teachers)}")
        self.hold_teachers()
        if self.teacher_cache is not None and "view" in batch:
            return self.teacher_cache.outputs(batch, self._run_teacher)
        return self._run_teacher(batch["image"])

    def _run_teacher(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        output, features = cast(FeatureTaps, self.teacher_taps)(image)
        return self.task.logits(output), features

    @torch.no_grad()
    def teacher_logits(self, batch: dict) -> list[Tensor]:
        """Return the logits of each teacher."""
        if len(self._teachers) == 1:
            return [self.teacher_outputs(batch)[0]]
        self.hold_teachers()
        return [self.task.logits(teacher(batch["image"])) for teacher in self._teachers]

    def label_losses(self, logits: Tensor, batch: dict, weight: float = 1.0) -> dict[str, Tensor]:
        """Return the losses on the labels, multiplied by ``weight``; none without labels.

        They are the task's ``label_loss``, under the name "cross_entropy", and its
        ``output_losses`` of the student's output that contains these logits.
        """
        if "label" not in batch:
            return {}
        losses = {"cross_entropy": self.task.label_loss(logits, batch)} | self.task.output_losses(self._output_with(logits), batch)
        return {name: weight * value for name, value in losses.items()}

    def forward(self, image: Tensor) -> Tensor:
        return self.task.logits(self.student(image))

    # Hooks that Lightning calls.

    def build_modules(self, data: Any) -> None:
        """Construct modules besides the student whose sizes the data module gives, if it does."""

    def check_not_copied(self, option: str) -> None:
        """Raise ValueError if a callback has copied this module, and more modules are to come."""
        for callback in cast(Any, self.trainer).callbacks:
            if isinstance(callback, WeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} copies the method before the data give the sizes of its modules: give {option} to "
                    f"{type(self).__name__}"
                )

    def configure_callbacks(self) -> list[L.Callback]:
        # Before the callbacks' setup, because WeightAveraging copies the module there.
        self.build_modules(cast(Any, self.trainer).datamodule)
        return [OutputCheck(), TrainerCheck(), TeacherAccuracy()]

    def configure_model(self) -> None:
        """Shard the trained modules and their children (FSDP2) under ModelParallelStrategy."""
        if self.device_mesh is None:
            return
        if not self.can_be_sharded:
            raise ValueError(f"{type(self).__name__} needs two backward passes, and FSDP frees the weights after the first one: use DDP")
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = self.device_mesh["data_parallel"]
        for module in self.trained_modules().values():
            if not isinstance(module, FSDPModule):
                for child in module.children():
                    has_forward = not isinstance(child, (nn.ModuleList, nn.ModuleDict))  # FSDP does not support containers
                    if has_forward and any(True for _ in child.parameters()):
                        fully_shard(child, mesh=mesh)
                fully_shard(module, mesh=mesh)

    def setup(self, stage: str) -> None:
        self.stage_metrics.clear()  # metrics made in inference mode cannot be updated outside of it
        if self._seed is None:
            self._seed = torch.initial_seed() & 0x7FFFFFFFFFFFFFFF

    def on_fit_start(self) -> None:
        # If only some layers are in eval mode, this is intentional, and their mode is kept.
        for trained in self.trained_modules().values():
            if not any(module.training for module in trained.modules()):
                trained.train()
        self._has_labels = None
        data = cast(Any, self.trainer).datamodule
        self.task.check_data(data)
        self.preprocessing = data.preprocessing() if hasattr(data, "preprocessing") else None
        if getattr(data, "image_shape", None) is not None:
            self._check_networks(torch.zeros(2, *data.image_shape, device=self.device, dtype=cast(torch.dtype, self.dtype)), data.num_classes)
        if self.teacher_cache is not None:
            self.teacher_cache.open(self._teachers[0], cast(FeatureTaps, self.teacher_taps).names, data, str(self.trainer.precision))

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        # Random numbers, for example of dropout, depend only on the seed, the process and the step.
        torch.manual_seed(int(bits(cast(int, self._seed), self.global_rank, self.current_epoch, batch_idx)) & 0x7FFFFFFFFFFFFFFF)
        if self.image_shape is None:
            batch = as_batch(batch)
            self.image_shape = list(batch["image"].shape[1:])
            if not self._networks_checked:  # the data module does not give the shape of its images
                image = batch["image"].to(self.dtype)
                self._check_networks(torch.cat([image, image])[:2], None)  # batch norm needs two

    def _check_networks(self, image: Tensor, classes: int | None) -> None:
        self._num_classes = check_networks(self, image, classes)
        self._networks_checked = True

    def _check_presence_of_labels(self, batch: dict, batch_idx: int) -> None:
        """Check that the training batches have labels if the method needs them, and all or none."""
        if self._has_labels is None:
            self._has_labels = "label" in batch
            self.check_labelled() if self._has_labels else self.check_unlabelled()
        elif self._has_labels != ("label" in batch):
            first, this = ("labels", "none") if self._has_labels else ("none", "labels")
            raise ValueError(
                "either all training batches must have labels or none: the first has "
                f"{first}, but batch {batch_idx} of epoch {self.current_epoch} has {this}"
            )

    def _check_labels(self, batch: dict, classes: int, stage: str) -> None:
        if "label" not in batch:
            return
        label = batch["label"]
        # On a GPU, only the first batch of a stage: reading the values waits for the device.
        values = label.device.type == "cpu" or stage not in self._label_stages_checked
        self.task.check_labels(label, batch["image"], classes, stage, values=values)
        self._label_stages_checked.add(stage)

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        return cast(Tensor, sum(self.checked_losses(batch, batch_idx).values())) * batch.get("share", 1.0)

    def checked_losses(self, batch: dict, batch_idx: int) -> dict[str, Tensor]:
        """Compute, check and log the :meth:`losses` of a training step."""
        if not len(batch["image"]):
            raise ValueError(f"batch {batch_idx} of epoch {self.current_epoch} has no image")
        self._check_presence_of_labels(batch, batch_idx)
        self._check_labels(batch, self._num_classes, "training")
        logits, losses = self.losses(batch)
        total = cast(Tensor, sum(losses.values()))
        if self.check_finite and not torch.isfinite(total):
            self._raise_not_finite(batch, batch_idx, losses)
        values = {f"train/loss_{name}": value.detach() for name, value in losses.items()} | {"train/loss": total.detach()}
        if "label" in batch:
            values["train/cross_entropy"] = self.task.label_loss(logits.detach(), batch)
            self._count_labelled_rows("train", batch)
            self._update_metrics("train", self._output_with(logits), batch)
        self._student_output = None  # otherwise it would keep the graph of this step alive
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(batch["image"]), sync_dist=True)
        return losses

    @torch.no_grad()
    def _update_metrics(self, stage: str, output: object, batch: dict, loader: int = 0, suffix: str = "") -> None:
        logits, key = self.task.logits(output), f"{stage}{suffix}_{loader}"
        if key not in self.stage_metrics:
            metrics_of_task = self.task.training_metrics if stage == "train" else self.task.metrics
            self.stage_metrics[key] = nn.ModuleDict(metrics_of_task(logits.shape[1])).to(logits.device)
        prediction, target = self.task.output_metric_inputs(output, batch)
        metrics = cast("Mapping[str, Metric]", self.stage_metrics[key])
        for name, metric in metrics.items():
            metric.update(prediction, target)
            shown = name == self.task.main_metric and stage != "train" and not suffix
            attribute = f"stage_metrics.{key}.{name}"
            self.log(
                f"{stage}/{name}{suffix}", metric, on_step=False, on_epoch=True, prog_bar=shown, batch_size=len(logits), metric_attribute=attribute
            )

    def _raise_not_finite(self, batch: dict, batch_idx: int, losses: dict[str, Tensor]) -> None:
        folder = Path(self.trainer.default_root_dir)
        path = folder / f"not_finite_step_{self.global_step}_rank_{self.global_rank}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: float(value.detach()) for name, value in losses.items()}
        torch.save({"batch": batch, "student": self.student.state_dict(), "losses": values}, path)
        raise FloatingPointError(
            f"the loss is not finite at step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx}): "
            + ", ".join(f"{name} = {value:.4g}" for name, value in values.items())
            + f". The batch and the student's weights before the step are saved in {path}; replay(path) of the method computes the losses again"
        )

    def replay(self, path: str | os.PathLike) -> dict[str, Tensor]:
        """Compute non-finite losses again, from the file ``path`` that the error named."""
        stored = torch.load(path, map_location=self.device, weights_only=True)
        self.student.load_state_dict(stored["student"])
        losses = self.losses(stored["batch"])[1]
        self._student_output = None
        return losses

    def validation_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("val", as_batch(batch), dataloader_idx)

    def test_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", as_batch(batch), dataloader_idx)

    def predict_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return the task's predictions, such as ``logits``.

        If the batch has it, also ``index`` [B], positions in the split.
        """
        batch = as_batch(batch)
        return self.task.predictions(self.student(batch["image"])) | {name: batch[name] for name in ("index",) if name in batch}

    def predictions(self, image: Tensor) -> Mapping[str, object]:
        """Return the outputs that validation and test evaluate, by the suffix of their metrics.

        They are logits, or outputs in which the task finds them. The student's output has the
        suffix "".
        """
        return {"": self.student(image)}

    def prediction_names(self) -> list[str]:
        """Return the keys of :meth:`predictions`."""
        return [""]

    def _evaluate(self, stage: str, batch: dict, loader: int) -> None:
        if "label" not in batch:
            return
        predictions = self.predictions(batch["image"])
        logits = self.task.logits(predictions[""])
        classes = getattr(cast(Any, self.trainer).datamodule, "num_classes", None)
        if classes is not None and logits.shape[1] != classes:
            kind = type(self.student).__name__
            raise ValueError(f"the data have {classes} classes, but the student ({kind}) returned logits {list(logits.shape)}")
        self._check_labels(batch, logits.shape[1], {"val": "validation"}.get(stage, stage))
        self._count_labelled_rows(stage, batch, loader)
        for suffix, output in predictions.items():
            self._update_metrics(stage, self._output_with(output) if isinstance(output, Tensor) else output, batch, loader, suffix)
        self._student_output = None
        self.log(f"{stage}/cross_entropy", self.task.label_loss(logits, batch), batch_size=len(logits), sync_dist=True)

    def on_train_epoch_end(self) -> None:
        self._warn_without_labelled_rows("train")

    def on_validation_epoch_end(self) -> None:
        self._warn_without_labelled_rows("val")

    def on_test_epoch_end(self) -> None:
        self._warn_without_labelled_rows("test")

    def _count_labelled_rows(self, stage: str, batch: dict, loader: int = 0) -> None:
        mask = self.task.mask(batch)
        if mask is not None:
            key = f"{stage}_{loader}"
            self._labelled_rows[key] = self._labelled_rows.get(key, 0) + mask.sum()

    def _warn_without_labelled_rows(self, of_stage: str) -> None:
        for key in [key for key in self._labelled_rows if key.startswith(f"{of_stage}_")]:
            count = self._labelled_rows.pop(key)
            if not count and not self.trainer.sanity_checking:
                stage, _, loader = key.partition("_")
                rank_zero_warn(
                    f"none of the {self.task.rows} of the {stage} images (data loader {loader}) has a label: all are ignored, and the metrics "
                    "have no meaning"
                )

    @property
    def uses_default_schedule(self) -> bool:
        """Whether the default schedule is used, which needs the total number of training steps."""
        return self.make_scheduler is None and type(self).configure_optimizers is Distiller.configure_optimizers

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.new_optimizer()
        if self.make_scheduler is not None:
            schedule = self.make_scheduler(optimizer)
            self._check_resumed(optimizer, schedule)
            if not isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                return {"optimizer": optimizer, "lr_scheduler": schedule}
            monitor = getattr(schedule, "monitor", None) or {"max": f"val/{self.task.main_metric}", "min": "val/cross_entropy"}[schedule.mode]
            every = self.trainer.check_val_every_n_epoch or 1 if monitor.startswith("val/") else 1
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": monitor, "frequency": every}}

        def factor(step: int) -> float:
            # Not for step 0: total_steps makes the data loader, but a resumed run must first
            # restore its position.
            return warm_up_and_decay(step / total_steps(self.trainer) if step else 0.0)

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
            "stepped_by": self._optimizer_and_schedule,
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        stored = checkpoint.get(CHECKPOINT_KEY, {})
        self._seed = stored.get("seed", self._seed)
        self._resumed = stored.get("stepped_by"), checkpoint.get("optimizer_states")
        if self._trainer is not None and self._trainer.optimizers:  # if made before loading
            self._check_resumed(self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler)

    def _check_resumed(self, optimizer: torch.optim.Optimizer, schedule: object) -> None:
        self._optimizer_and_schedule = [optimizer_name(optimizer), type(schedule).__name__]
        check_resumed(self._optimizer_and_schedule, optimizer, *self._resumed)
