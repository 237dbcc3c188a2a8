"""One training of the comparison: its data, its networks, and what is measured afterwards."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from ...analysis import calibration_error, fidelity
from ...data import Augment, ClutterDigits, ImageData, ImageFolder
from ...data.base import ItemImages, TensorImages
from ...distill import Distiller, Supervised
from ...distill.engine import AtomicCheckpointIO, checkpoints, silence_lightning
from ...files import replaced_atomically
from ...models import load_weights
from ..curve import Curve
from .methods import Networks, Row
from .networks import layers_of, network_from

EMBEDDED = "clutter_digits"
TEACHER = "teacher"  # name of the folder, and of the row in tables


@dataclass(frozen=True)
class Settings:
    """What all trainings of a comparison have in common. A run depends on nothing else but its row
    and its seed.

    Args:
        data: "clutter_digits", or a folder for :class:`kdkernels.data.ImageFolder`.
        size: side of a folder's images in pixels.
        labelled: number of training images of the students, drawn anew for each seed; ``None``:
            all. The teacher has all.
        epochs, teacher_epochs: of a student, in all of its stages, and of a teacher.
        batch_size, learning_rate: of all trainings.
        augment: random crops, and for a folder flips.
        student, teacher: networks, for :func:`network_from`.
        teacher_weights: file with the weights of the teacher of all seeds; ``None``: a teacher is
            trained for each seed.
        layers, teacher_layers: those that methods compare; empty: those of the network's family.
        quick: few images, as a test.
        device: "auto" (a GPU, if there is one), "cpu" or "cuda".
        val_fraction, on_error: of a folder, see :class:`kdkernels.data.ImageFolder`.
    """

    data: str
    size: int
    labelled: int | None
    epochs: int
    teacher_epochs: int
    batch_size: int
    learning_rate: float
    augment: bool
    student: str
    teacher: str
    teacher_weights: str | None
    layers: tuple[str, ...]
    teacher_layers: tuple[str, ...]
    quick: bool
    device: str = "auto"
    val_fraction: float | None = None
    on_error: Literal["fail", "skip"] = "fail"

    def values(self) -> dict[str, Any]:
        """Return plain values, as JSON stores them."""
        return json.loads(json.dumps(asdict(self)))


@lru_cache(maxsize=1)
def data_of(settings: Settings) -> ImageData:
    """Return the data with the splits train, val and test.

    A folder without a test split gives half of its validation images to the test.
    """
    augment = Augment(crop=settings.size // 8, flip=settings.data != EMBEDDED) if settings.augment else None
    data: ImageData
    if settings.data == EMBEDDED:
        sizes = {"train_size": 256, "val_size": 64, "test_size": 64} if settings.quick else {}
        data = ClutterDigits(batch_size=settings.batch_size, augment=augment, **sizes)
    else:
        data = ImageFolder(
            settings.data,
            size=settings.size,
            val_fraction=settings.val_fraction,
            on_error=settings.on_error,
            batch_size=settings.batch_size,
            augment=augment,
        )
    data.setup()
    if "test" not in data.splits:
        order = torch.randperm(_size(data, "val"), generator=torch.Generator().manual_seed(0)).tolist()
        half = len(order) // 2
        validation = data.splits["val"]
        data.splits = {**data.splits, "val": take(validation, sorted(order[half:])), "test": take(validation, sorted(order[:half]))}
    for split in ("train", "val", "test"):
        if _size(data, split) < 2:
            raise ValueError(
                f"--data: a comparison needs at least 2 images for training, validation and test each, and 'test' gets half of the validation images "
                f"if there is no such folder; '{split}' has {_size(data, split)}"
            )
    return data


def _size(data: ImageData, split: str) -> int:
    return len(cast(Any, data.splits[split]))


def take(dataset: Dataset, index: list[int]) -> Dataset:
    """Return the samples of a split at the given positions, as a split."""
    if isinstance(dataset, TensorImages):
        return TensorImages(**{name: field[index] for name, field in dataset.fields.items()})
    items = cast(ItemImages, dataset)
    return ItemImages(Subset(items.samples, index), items.seed, None, items.num_classes, items.split)


def student_data(settings: Settings, seed: int) -> ImageData:
    """Return the data of the students of a seed, with the labelled images alone."""
    data = copy.copy(data_of(settings))
    if settings.labelled is not None:
        order = torch.randperm(_size(data, "train"), generator=torch.Generator().manual_seed(seed)).tolist()
        data.splits = {**data.splits, "train": take(data.splits["train"], sorted(order[: settings.labelled]))}
    return data


def classes_of(data: ImageData) -> int:
    return cast(int, data.num_classes)


def run_path(folder: Path, name: str, seed: int) -> Path:
    """Return the file of the results of a training."""
    readable = name.replace(":", ",").replace("/", "-").replace(" ", "")
    return folder / "trainings" / readable / f"seed_{seed}.json"


def stored_run(folder: Path, name: str, seed: int) -> dict[str, Any] | None:
    """Return the results of a training, or ``None`` if it has not finished."""
    path = run_path(folder, name, seed)
    return json.loads(path.read_text()) if path.exists() else None


def train_teacher(settings: Settings, folder: Path, seed: int) -> dict[str, Any]:
    """Train the teacher of a seed on all images, or read it; return and store its results."""
    data = copy.copy(data_of(settings))
    method = Supervised(_network(settings, TEACHER, seed), optimizer=optimizer_of(settings))
    if settings.teacher_weights is not None:
        load_weights(method.student, settings.teacher_weights)
        found: dict[str, Any] = {}
    else:
        found = _fit(method, data, settings.teacher_epochs, run_path(folder, TEACHER, seed).with_suffix(""), seed, settings.device)
    method.student.eval()
    logits, labels = logits_of(method, data, settings.device)
    with replaced_atomically(_weights_path(folder, seed)) as temporary:
        torch.save(method.student.state_dict(), temporary)
    with replaced_atomically(_logits_path(folder, seed)) as temporary:
        torch.save(logits, temporary)
    found = _store(folder, TEACHER, seed, found | measures(logits, labels))
    _remove_checkpoint(folder, TEACHER, seed)
    return found


def train_student(settings: Settings, folder: Path, name: str, seed: int, keep: bool = False) -> dict[str, Any]:
    """Train a row with a seed; return and store its results.

    If the training fails, its error is the result: one weight for which a loss becomes infinite
    must not end the comparison.
    """
    path = run_path(folder, name, seed)
    data = student_data(settings, seed)
    try:
        method = build(settings, folder, Row.parse(name), seed, data)
        found = _fit(method, data, settings.epochs, path.with_suffix(""), seed, settings.device)
    except FloatingPointError as error:  # the loss of a step is NaN or infinite
        _remove_checkpoint(folder, name, seed)
        return _store(folder, name, seed, {"error": " ".join(str(error).split()).partition(". ")[0]})
    logits, labels = logits_of(method, data, settings.device)
    found |= measures(logits, labels)
    teacher_logits = torch.load(_logits_path(folder, seed), weights_only=True)
    found["fidelity"] = float(fidelity(logits, teacher_logits))
    if keep:
        with replaced_atomically(path.with_suffix(".pt")) as temporary:
            torch.save(method.student.state_dict(), temporary)
    found = _store(folder, name, seed, found)
    _remove_checkpoint(folder, name, seed)
    return found


def build(settings: Settings, folder: Path | None, row: Row, seed: int, data: ImageData, steps: int | None = None) -> Distiller:
    """Return the method of a row with new networks and the teacher of the seed.

    Without a folder, the teacher is not trained. ``steps`` are those of the training, from which a
    method takes when its late terms begin.
    """
    if steps is None:
        steps = settings.epochs * math.ceil(_size(data, "train") / settings.batch_size)
    L.seed_everything(seed, verbose=False)
    student = network_from(settings.student, "student", classes_of(data))
    teacher = None
    if row.kind.has_teacher:
        teacher = network_from(settings.teacher, TEACHER, classes_of(data))
        if folder is not None:
            load_weights(teacher, _weights_path(folder, seed))
    networks = Networks(
        student=student,
        teacher=teacher,
        layers=layers_of(student, settings.layers, "layers") if row.kind.has_layers else (),
        teacher_layers=layers_of(teacher, settings.teacher_layers or settings.layers, "teacher_layers")
        if teacher is not None and row.kind.has_layers
        else (),
        new_student=lambda: network_from(settings.student, "student", classes_of(data)),
        steps=steps,
    )
    return row.build(networks, optimizer_of(settings))


def optimizer_of(settings: Settings) -> Callable:
    return partial(torch.optim.SGD, lr=settings.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)


def _network(settings: Settings, which: str, seed: int) -> nn.Module:
    L.seed_everything(seed, verbose=False)
    return network_from(getattr(settings, which), which, classes_of(data_of(settings)))


def _weights_path(folder: Path, seed: int) -> Path:
    return run_path(folder, TEACHER, seed).with_suffix(".pt")


def _logits_path(folder: Path, seed: int) -> Path:
    return run_path(folder, TEACHER, seed).with_suffix(".logits.pt")


def _store(folder: Path, name: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    with replaced_atomically(run_path(folder, name, seed)) as temporary:
        temporary.write_text(json.dumps(found) + "\n")
    return found


def _remove_checkpoint(folder: Path, name: str, seed: int) -> None:
    """Remove the checkpoint from which an interrupted training would have continued."""
    shutil.rmtree(run_path(folder, name, seed).with_suffix(""), ignore_errors=True)


def _fit(method: Distiller, data: ImageData, epochs: int, folder: Path, seed: int, device: str) -> dict[str, Any]:
    """Train, from the last checkpoint if there is one; return the curve and the seconds."""
    last, curve = folder / "last.ckpt", Curve()
    L.seed_everything(seed, verbose=False)
    data.order_seed = seed
    start = time.perf_counter()
    trainer = quiet_trainer(
        device, max_epochs=epochs, callbacks=[curve, *checkpoints(folder)], plugins=[AtomicCheckpointIO()], default_root_dir=folder
    )
    trainer.fit(method.to(memory_format=torch.channels_last), data, ckpt_path=last if last.exists() else None, weights_only=True)
    return {"validation": curve.values, "seconds": time.perf_counter() - start}


def quiet_trainer(device: str, **options: Any) -> L.Trainer:
    """Return a trainer on one device that prints and logs nothing."""
    silence_lightning()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", module="kdkernels.*")
    return L.Trainer(
        accelerator={"cuda": "gpu"}.get(device, device),
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


@torch.no_grad()
def logits_of(method: Distiller, data: ImageData, device: str) -> tuple[Tensor, Tensor]:
    """Return the logits [N, K] of the test images on the CPU, and their labels [N]."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    was_training = method.training
    method.to(device).eval()
    logits, labels = [], []
    for batch in data.test_dataloader():
        batch = data.finish({name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
        logits.append(method.task.logits(method.predictions(batch["image"])[""]).float().cpu())
        labels.append(batch["label"].cpu())
    method.train(was_training)
    return torch.cat(logits), torch.cat(labels)


def measures(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return accuracy, cross-entropy, calibration error and the confusion matrix [K][K].

    The rows of the matrix are the true classes. ``reliability`` has, for each of 10 bins of the
    confidence, the number of images, the sum of the confidences, and the number of right ones.
    """
    classes = logits.shape[1]
    confidence, predicted = logits.double().softmax(1).max(1)
    right = predicted == labels
    bins = (confidence * 10).long().clamp(max=9)
    table = torch.stack([torch.bincount(bins, weights=w.double(), minlength=10) for w in (torch.ones_like(confidence), confidence, right)])
    return {
        "accuracy": float(right.double().mean()),
        "cross_entropy": float(nn.functional.cross_entropy(logits.double(), labels)),
        "calibration_error": float(calibration_error(logits, labels)),
        "reliability": table.tolist(),
        "confusion": torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes).tolist(),
    }
