"""A Lightning callback that records what the analysis of a training needs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from ..files import replaced_atomically
from ..models.taps import FeatureTaps

__all__ = ["KnowledgeRecord", "KnowledgeRecorder"]

VERSION = 1
NAME = "knowledge.json"


class KnowledgeRecord(NamedTuple):
    """What :class:`KnowledgeRecorder` has written to a folder."""

    folder: Path
    layer: str
    epochs: list[int]  # 0 is before the training
    by_epoch: list[float]  # weight distance at these epochs, from the weights after each epoch
    by_step: list[float]  # the same from the weights after each step
    checkpoints: list[int]  # the epochs of which the student's weights are stored

    def weights(self, epoch: int) -> dict[str, Tensor]:
        """Return the student's state dict after an epoch.

        Raises:
            FileNotFoundError: it was not stored.
        """
        if epoch not in self.checkpoints:
            raise FileNotFoundError(f"the record in {os.fspath(self.folder)!r} has the weights of the epochs {self.checkpoints}, not of {epoch}")
        return torch.load(self.folder / f"epoch_{epoch}.pt", weights_only=True)

    def distances(self, *, by: str = "epoch") -> list[float]:
        """Return the weight distance at the checkpoints, by "epoch" or by "step"."""
        if by not in ("epoch", "step"):
            raise ValueError(f'by must be "epoch" or "step", got {by!r}')
        values = dict(zip(self.epochs, self.by_epoch if by == "epoch" else self.by_step, strict=True))
        return [values[epoch] for epoch in self.checkpoints]

    @staticmethod
    def load(folder: str | os.PathLike) -> KnowledgeRecord:
        """Read the record in a folder.

        Raises:
            FileNotFoundError: the folder has no record, or a checkpoint is missing.
            ValueError: the record cannot be read.
        """
        folder = Path(folder)
        path = folder / NAME
        if not path.exists():
            raise FileNotFoundError(f"{os.fspath(folder)!r} has no record {NAME!r}: train with kdkernels.analysis.KnowledgeRecorder")
        try:
            stored = json.loads(path.read_text())
            if stored["version"] != VERSION:
                raise ValueError(f"its version is {stored['version']}, expected {VERSION}")
            record = KnowledgeRecord(folder, *(stored[name] for name in ("layer", "epochs", "by_epoch", "by_step", "checkpoints")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a record of KnowledgeRecorder: {error}") from error
        for epoch in record.checkpoints:
            if not (folder / f"epoch_{epoch}.pt").exists():
                raise FileNotFoundError(f"the record in {os.fspath(folder)!r} names epoch {epoch}, but there is no file 'epoch_{epoch}.pt'")
        return record


class KnowledgeRecorder(L.Callback):
    r"""Records the weight distance of a layer, and the student's weights, during any training.

    The weight distance is :math:`\sum_k \| w_k - w_{k-1} \| / \| w_0 \|`
    (:func:`kdkernels.analysis.weight_distance`). It is recorded after each epoch, once with the
    weights after each epoch, as in the paper, and once with those after each step, as in the
    authors' code. w is the weight of the layer. If it has none, w is all weights inside the layer
    of at least two dimensions, joined.

    The folder gets ``knowledge.json`` (:class:`KnowledgeRecord`) and ``epoch_E.pt``, the student's
    state dict. Files are written completely or not at all. The state is part of Lightning's
    checkpoints, so a resumed run continues the record. An epoch that ``max_steps`` or ``max_time``
    ends early counts as one. With ``fast_dev_run`` nothing is recorded.

    A trainer may have recorders of several layers, each with a folder of its own.

    Args:
        folder: a new folder, or that of the run which is resumed.
        layer: name of a layer of the student, as in ``student.named_modules()``.
        epochs: epochs after which the student's weights are stored; 0 is before the training. By
            default all.

    Raises:
        FileExistsError: when training begins: the folder has the record of another run.
        TypeError: ``epochs`` are no integers.
        ValueError: an epoch is negative, or there is none. When training begins: the student has no
            such layer, or it has no weights; the weights are sharded over processes; or the run is
            resumed from a checkpoint without a record of this layer, so that w_0 is not known.
    """

    def __init__(self, folder: str | os.PathLike, layer: str, epochs: Iterable[int] | None = None):
        self.folder, self.layer = Path(folder), layer
        if epochs is not None and not isinstance(epochs, Iterable):
            raise TypeError(f"epochs must be a list of integers, got {epochs!r}")
        self.epochs = None if epochs is None else sorted(set(epochs))
        if self.epochs is not None and any(isinstance(e, bool) or not isinstance(e, int) or e < 0 for e in self.epochs):
            raise ValueError(f"epochs must be integers >= 0, got {self.epochs}")
        if self.epochs == []:
            raise ValueError("epochs must have at least one epoch, or be None for all")
        self._recorded: dict[str, list] = {"epochs": [], "by_epoch": [], "by_step": [], "checkpoints": []}
        self._first_norm = 0.0
        self._path = 0.0  # of the steps so far, not yet divided by the norm
        self._after_epoch = self._after_step = torch.empty(0)  # the weights
        self._steps = 0

    @property
    def state_key(self) -> str:  # of Lightning's checkpoints: the record of another layer is not this one's
        return self._generate_state_key(layer=self.layer)

    # Hooks that Lightning calls.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        student = _student(pl_module)
        weights = layer_weights(student, self.layer)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._recorded["epochs"]:  # a resumed run
            if len(self._after_step) != len(weights):
                raise ValueError(f"the checkpoint has a record of {len(self._after_step)} weights, but layer {self.layer!r} has {len(weights)}")
            return
        if (self.folder / NAME).exists():
            raise FileExistsError(f"folder: {os.fspath(self.folder)!r} has the record of another run: give another folder, or remove it")
        if trainer.global_step:
            raise ValueError(
                f"this run is resumed after {trainer.global_step} steps from a checkpoint without a record of layer {self.layer!r}, and the weight "
                "distance begins before the training: record from the first step on"
            )
        if self.epochs is not None and trainer.max_epochs is not None and 0 <= trainer.max_epochs < self.epochs[0]:
            rank_zero_warn(f"KnowledgeRecorder stores no weights: its first epoch is {self.epochs[0]}, and the training has {trainer.max_epochs}")
        self._first_norm = float(weights.norm())
        if not self._first_norm > 0:
            raise ValueError(f"layer {self.layer!r} has weights that are all 0, and the weight distance is relative to their norm")
        self._after_epoch = self._after_step = weights
        self._steps = trainer.global_step
        self._record(trainer, student, 0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._steps and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._steps = trainer.global_step
            weights = layer_weights(_student(pl_module), self.layer)
            self._path += float((weights - self._after_step).norm())
            self._after_step = weights

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._record(trainer, _student(pl_module), trainer.current_epoch + 1)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Of a run that was resumed from a checkpoint which was written before the end of the epoch.
        self._record(trainer, _student(pl_module), trainer.current_epoch)

    def state_dict(self) -> dict[str, Any]:
        tensors = {"after_epoch": self._after_epoch, "after_step": self._after_step}
        return {"recorded": self._recorded, "first_norm": self._first_norm, "path": self._path, "steps": self._steps, **tensors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recorded = {name: list(values) for name, values in state_dict["recorded"].items()}
        self._first_norm, self._path, self._steps = (state_dict[name] for name in ("first_norm", "path", "steps"))
        self._after_epoch, self._after_step = state_dict["after_epoch"], state_dict["after_step"]

    def _record(self, trainer: L.Trainer, student: nn.Module, epoch: int) -> None:
        recorded = self._recorded
        if trainer.fast_dev_run or epoch in recorded["epochs"]:  # type: ignore[attr-defined]
            return
        weights = layer_weights(student, self.layer)
        moved = float((weights - self._after_epoch).norm()) / self._first_norm
        recorded["epochs"].append(epoch)
        recorded["by_epoch"].append((recorded["by_epoch"] or [0.0])[-1] + moved)
        recorded["by_step"].append(self._path / self._first_norm)
        self._after_epoch = weights
        store = self.epochs is None or epoch in self.epochs
        if store:
            recorded["checkpoints"].append(epoch)
        if not trainer.is_global_zero:
            return
        if store:
            with replaced_atomically(self.folder / f"epoch_{epoch}.pt") as temporary:
                torch.save({name: value.detach().cpu() for name, value in student.state_dict().items()}, temporary)
        with replaced_atomically(self.folder / NAME) as temporary:
            temporary.write_text(json.dumps({"version": VERSION, "layer": self.layer, **recorded}, indent=1) + "\n")


def _student(module: L.LightningModule) -> nn.Module:
    """Return the attribute ``student`` of a method of this package, else the module itself."""
    student = getattr(module, "student", None)
    return student if isinstance(student, nn.Module) else module


def layer_weights(network: nn.Module, layer: str) -> Tensor:
    """Return a copy of the weights of a layer [P], on the CPU in float64."""
    FeatureTaps(network, [layer])  # raises if there is no such layer
    module = network.get_submodule(layer)
    own = getattr(module, "weight", None)
    weights = [own] if isinstance(own, Tensor) else [p for p in module.parameters() if p.dim() > 1]
    if not weights:
        raise ValueError(f"layer {layer!r} of {type(network).__name__} has no weights, and no weight distance: give another layer")
    if any(hasattr(w, "full_tensor") for w in weights):
        raise ValueError("KnowledgeRecorder does not support weights that are sharded over processes: train without FSDP")
    return torch.cat([w.detach().flatten().cpu().double() for w in weights])
