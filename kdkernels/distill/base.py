"""What all distillation methods share: the student that is trained, the teacher that is not, and what is logged."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .. import __version__
from ..data.keyed_random import bits
from ..models.taps import FeatureTaps
from ..models.weights import CHECKPOINT_KEY, load_weights
from .checks import TeacherAccuracy, TrainerCheck, total_steps
from .engine import OutputCheck
from .teacher_cache import TeacherCache


def default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """What the signatures below show as a lambda, which jsonargparse reads and pickle does not."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


class Distiller(L.LightningModule):
    """Trains ``student`` with the losses that a subclass returns from :meth:`losses`.

    The teacher is frozen: in eval mode, without gradients, moved with the module, and in neither the checkpoint nor the optimizer. One teacher
    can serve several methods. A batch is a dict with ``image`` and ``label``, or a pair of them.

    Args:
        student: maps images [B, C, H, W] to logits [B, K].
        teacher: likewise; ``None`` for methods that need none.
        student_weights: file that the student starts from, see :func:`kdkernels.models.load_weights`.
        teacher_weights: file with the teacher's weights: a state dict, ``.safetensors``, or a checkpoint of this package, whose student
            becomes the teacher.
        student_taps, teacher_taps: names of layers whose outputs :meth:`losses` wants.
        teacher_cache: keeps what the teacher says of the training images on disk.
        optimizer: makes the optimizer from the student's parameters.
        scheduler: makes the schedule from the optimizer, one step an epoch; ``ReduceLROnPlateau`` one after each validation, by its ``monitor``
            where it has one (as Lightning's has), else ``val/accuracy`` in mode "max" and ``val/cross_entropy`` in mode "min". By default the
            rate rises for a fifth of all steps of the optimizer, then falls by a half cosine to zero.
        check_finite: stop before the update if the loss is NaN or infinite, and keep the batch (see :meth:`replay`). It waits for the loss
            each step; on a GPU that costs a little.
    """

    can_be_sharded = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        student_weights: str | os.PathLike | None = None,
        teacher_weights: str | os.PathLike | None = None,
        student_taps: Iterable[str] = (),
        teacher_taps: Iterable[str] = (),
        teacher_cache: TeacherCache | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
        scheduler: LRSchedulerCallable | None = None,
        check_finite: bool = True,
    ):
        super().__init__()
        if teacher is None and (teacher_weights is not None or teacher_cache is not None or tuple(teacher_taps)):
            raise ValueError("teacher_weights, teacher_taps and teacher_cache need a teacher")
        for name, network in (("student", student), ("teacher", teacher)):
            if not isinstance(network, nn.Module) and not (name == "teacher" and network is None):
                raise TypeError(f"{name} must be an nn.Module, got {type(network).__name__}")
        _check_not_shared(student, teacher)
        self.student = student if student_weights is None else load_weights(student, student_weights)
        self._teacher: list[nn.Module] = []  # in a list: a submodule would be saved, and trained
        if teacher is not None:
            teacher = teacher if teacher_weights is None else load_weights(teacher, teacher_weights)
        _check_sizes(student, teacher)
        if teacher is not None:
            self._teacher = [teacher.eval().requires_grad_(False)]
        self.student_taps = FeatureTaps(student, student_taps)
        self.teacher_taps = FeatureTaps(teacher, teacher_taps) if teacher is not None else None
        self.teacher_cache = teacher_cache
        self.make_optimizer = default_optimizer if getattr(optimizer, "__module__", None) == __name__ else optimizer
        self.make_scheduler, self.check_finite = scheduler, check_finite
        self.student_spec: dict | None = None  # how the student is made; the command line knows
        self.run_config: dict | None = None  # and how the method and its data are
        self.image_shape: list[int] | None = None
        self._seed: int | None = None
        self._stepped_by: list[str] | None = None  # names of the optimizer and the schedule, and what a checkpoint said of them
        self._resumed: tuple[list[str] | None, list | None] = None, None
        self._networks_checked = False
        self._labels_checked: set[str] = set()  # stages

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0] if self._teacher else None

    def _apply(self, fn, recurse=True):  # .to(device), .double(), ... reach the teacher too
        if self.teacher is not None:
            self.teacher._apply(fn)
        return super()._apply(fn)

    def train(self, mode: bool = True):
        super().train(mode)
        self._hold_teacher()
        return self

    def _hold_teacher(self) -> None:
        """In eval mode and without gradients, whatever has been done to it since: dropout and batch norm would move what it says."""
        if self.teacher is not None and any(module.training for module in self.teacher.modules()):
            self.teacher.eval()

    # What a method writes, and what it writes it with.

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's logits [B, K], and the named losses, each a mean over the batch, whose sum is minimised."""
        raise NotImplementedError

    def check_features(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        """Raises ValueError where a method cannot compare the tapped features (:func:`kdkernels.models.pair_features`); called once."""

    def check_method(self, image: Tensor) -> None:
        """Raises where a method cannot be used with these networks; called once before training, with two images."""

    def student_outputs(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and tapped features of the student."""
        return self.student_taps(batch["image"])

    @torch.no_grad()
    def teacher_outputs(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and tapped features of the teacher; from the cache where they are there."""
        if self.teacher is None:
            raise ValueError(f"{type(self).__name__} needs a teacher")
        self._hold_teacher()
        if self.teacher_cache is not None and "view" in batch:
            return self.teacher_cache.outputs(batch, self.teacher_taps)
        return self.teacher_taps(batch["image"])

    def cross_entropy(self, logits: Tensor, batch: dict) -> Tensor:
        """Mean cross-entropy with the labels; with both labels of a mixed image by their weights."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if "mix" not in batch:
            return F.cross_entropy(logits, batch["label"])
        first, second = (F.cross_entropy(logits, batch[name], reduction="none") for name in ("label", "mixed_label"))
        return (batch["mix"] * first + (1 - batch["mix"]) * second).mean()

    def forward(self, image: Tensor) -> Tensor:
        return self.student(image)

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
        if self._seed is None:
            self._seed = torch.initial_seed() & 0x7FFFFFFFFFFFFFFF

    def on_fit_start(self) -> None:
        if not any(module.training for module in self.student.modules()):  # handed over from use; a part in eval mode is meant to be
            self.student.train()
        data = self.trainer.datamodule
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
            if not self._networks_checked:  # data that do not say what their images are
                image = batch["image"].to(self.dtype)
                self._check_networks(torch.cat([image, image])[:2], None)  # of two: batch norm has no variance of one

    def _check_networks(self, image: Tensor, classes: int | None) -> None:
        """One look before any work at what student and teacher give for two images, in the modes in which they will be used."""
        with _untouched(self.student), self.trainer.precision_plugin.forward_context():
            self._hold_teacher()
            with torch.no_grad():
                teacher, teacher_features = self._outputs("teacher", image) if self.teacher is not None else (None, {})
            for mode in ("", "in training mode "):
                self.student.train(bool(mode))
                graph = bool(mode) and self.device_mesh is None  # FSDP would wait for a backward
                with torch.set_grad_enabled(graph):
                    student, student_features = self._outputs("student", image, mode)
                if graph and not student.requires_grad:
                    raise ValueError(
                        f"the logits of the student ({self._kind('student')}) do not depend on a parameter that is trained: is all of it frozen, or "
                        "its forward without a graph (detach, no_grad)?"
                    )
                for name, logits in {"student": student, "teacher": teacher}.items():
                    if logits is not None and classes is not None and logits.shape[1] != classes:
                        raise ValueError(f"the data have {classes} classes, but the {name} ({self._kind(name)}) has {logits.shape[1]}")
                if teacher is not None:
                    if student.shape != teacher.shape:
                        raise ValueError(f"student and teacher must have the same classes, they have {student.shape[1]} and {teacher.shape[1]}")
                    self.check_features(student_features, teacher_features)
            with torch.enable_grad():
                self.check_method(image)
        self._classes = student.shape[1]
        self._networks_checked = True

    def _kind(self, name: str) -> str:
        return type(self.student if name == "student" else self.teacher).__name__

    def _outputs(self, name: str, image: Tensor, when: str = "") -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and features of a network that is looked at for the first time."""
        try:
            logits, features = (self.student_taps if name == "student" else self.teacher_taps)(image)
        except (torch.OutOfMemoryError, NotImplementedError):
            raise
        except Exception as error:  # whatever the network's layers raise
            reason = " ".join(str(error).split())
            raise ValueError(f"{when}the {name} ({self._kind(name)}) cannot take images {list(image.shape)}: {reason}") from error
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(image):
            shown = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            cure = "" if isinstance(logits, Tensor) else "; put it into a module that returns the logits alone"
            raise ValueError(
                f"{when}the {name} ({self._kind(name)}) must return logits [B, K] for images {list(image.shape)}, it returned {shown}{cure}"
            )
        return logits, features

    def _check_labels(self, label: Tensor, classes: int, stage: str) -> None:
        """Every batch where that is free; where the labels are on another device, which would have to be waited for, the first of each stage.
        A GPU's own complaint would name neither labels nor classes."""
        first = label.device.type == "cpu" or stage not in self._labels_checked
        if label.is_floating_point():
            if label.shape[1:] != (classes,):
                raise ValueError(f"labels that are probabilities must have the shape [B, {classes}], the networks' classes; got {list(label.shape)}")
            if first and not bool(((label >= 0).all(1) & ((label.sum(1) - 1).abs() <= 1e-2)).all()):
                raise ValueError(f"labels that are probabilities must not be negative, and have a sum of 1; a {stage} batch has others")
            self._labels_checked.add(stage)
            return
        if label.dim() != 1:
            raise ValueError(f"labels must be class numbers [B], or probabilities [B, K] as floats; a {stage} batch has {list(label.shape)}")
        if not first:
            return
        low, high = int(label.min()), int(label.max())
        if low < 0 or high >= classes:
            raise ValueError(f"labels must lie in [0, {classes - 1}], the networks' classes; a {stage} batch has {low} to {high}")
        self._labels_checked.add(stage)

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        return sum(self.checked_losses(batch, batch_idx).values()) * batch.get("share", 1.0)

    def checked_losses(self, batch: dict, batch_idx: int) -> dict[str, Tensor]:
        """:meth:`losses` of a training step, once they are seen to be finite, and logged."""
        self._check_labels(batch["label"], self._classes, "training")
        logits, losses = self.losses(batch)
        total = sum(losses.values())
        if self.check_finite and not torch.isfinite(total):
            self._stop_for(batch, batch_idx, losses)
        size = len(batch["label"])
        values = {f"train/loss_{name}": value.detach() for name, value in losses.items()} | {"train/loss": total.detach()}
        values |= {"train/accuracy": accuracy(logits, batch), "train/cross_entropy": self.cross_entropy(logits.detach(), batch)}
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return losses

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
        self._evaluate("val", as_batch(batch))

    def test_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test", as_batch(batch))

    def predict_step(self, batch: object, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Logits [B, K] of the student, and ``index`` [B], the images' places in their split, where the data say them."""
        batch = as_batch(batch)
        return {"logits": self.student(batch["image"])} | {name: batch[name] for name in ("index",) if name in batch}

    def _evaluate(self, stage: str, batch: dict) -> None:
        logits = self.student(batch["image"])
        classes = getattr(self.trainer.datamodule, "num_classes", None)
        if classes is not None and logits.shape[1:] != (classes,):
            raise ValueError(f"the data have {classes} classes, but the student ({self._kind('student')}) returned {list(logits.shape)}")
        self._check_labels(batch["label"], logits.shape[1], {"val": "validation"}.get(stage, stage))
        size = len(batch["label"])
        self.log(f"{stage}/accuracy", accuracy(logits, batch), prog_bar=True, batch_size=size, sync_dist=True)
        self.log(f"{stage}/cross_entropy", self.cross_entropy(logits, batch), batch_size=size, sync_dist=True)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.student.parameters())
        if self.make_scheduler is not None:
            schedule = self.make_scheduler(optimizer)
            self._check_resumed(optimizer, schedule)
            if not isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
                return {"optimizer": optimizer, "lr_scheduler": schedule}
            monitor = getattr(schedule, "monitor", None) or {"max": "val/accuracy", "min": "val/cross_entropy"}[schedule.mode]
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


class Supervised(Distiller):
    """Cross-entropy on the labels alone: how teachers are trained, and what a distilled student is compared with.

    Args:
        student, student_weights, optimizer, scheduler, check_finite: see :class:`Distiller`.
    """

    def __init__(
        self,
        student: nn.Module,
        student_weights: str | os.PathLike | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
        scheduler: LRSchedulerCallable | None = None,
        check_finite: bool = True,
    ):
        super().__init__(student, student_weights=student_weights, optimizer=optimizer, scheduler=scheduler, check_finite=check_finite)

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits, _ = self.student_outputs(batch)
        return logits, {"cross_entropy": self.cross_entropy(logits, batch)}


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """What is done to a module inside leaves no trace: in buffers such as batch norm's, in modes, in the generators of random numbers."""
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    training = {part: part.training for part in module.modules()}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for part, mode in training.items():
            part.training = mode


def _check_not_shared(student: nn.Module, teacher: nn.Module | None) -> None:
    if teacher is None:
        return
    own = {_memory(tensor): name for name, tensor in [*student.named_parameters(), *student.named_buffers()]}
    shared = [own[_memory(tensor)] for tensor in [*teacher.parameters(), *teacher.buffers()] if _memory(tensor) in own]
    if shared:
        raise ValueError(
            f"student and teacher share {len(shared)} tensors ({', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}): the teacher is frozen, "
            "and they with it. Give the teacher layers of its own: copy.deepcopy"
        )


def _memory(tensor: Tensor) -> int:
    """The same for tensors that share memory."""
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def _check_sizes(student: nn.Module, teacher: nn.Module | None) -> None:
    for name, network in (("student", student), ("teacher", teacher)):
        if network is not None and any(is_lazy(parameter) for parameter in network.parameters()):
            raise ValueError(
                f"the {name} ({type(network).__name__}) has layers whose sizes are not known yet: call it on an image, or load its weights"
            )


def _rise_and_fall(progress: float) -> float:
    """Factor on the rate: from 1/25 to 1 in the first fifth, then to 0, both by half a cosine."""
    if progress < 0.2:
        return 1 - 0.96 * (0.5 + 0.5 * math.cos(math.pi * progress / 0.2))
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - 0.2) / 0.8))


def as_batch(batch: object) -> dict:
    """A dict with ``image`` and ``label``, also from a pair of them."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        batch = {"image": batch[0], "label": batch[1]}
    if not isinstance(batch, dict) or not {"image", "label"} <= batch.keys():
        raise TypeError(f'a batch must be (image, label) or a dict with "image" and "label", got {type(batch).__name__}')
    image, label = batch["image"], batch["label"]
    if not isinstance(image, Tensor) or not isinstance(label, Tensor):
        raise TypeError(f"image and label of a batch must be tensors, got {type(image).__name__} and {type(label).__name__}")
    if not image.is_floating_point():
        raise TypeError(f"images must be floating point, got {image.dtype}: scale them in the dataset, or give it to kdkernels.data.FromDatasets")
    if label.dim() == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if not label.is_floating_point() and label.dtype != torch.int64:
        label = label.long()
    return batch if label is batch["label"] else {**batch, "label": label}


def accuracy(logits: Tensor, batch: dict) -> Tensor:
    """Share of the images whose likeliest class is the label's (of probabilities, the likeliest)."""
    label = batch["label"]
    return (logits.argmax(1) == (label.argmax(1) if label.is_floating_point() else label)).float().mean()
