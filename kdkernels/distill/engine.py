"""Additions to Lightning's training loop: atomic checkpoints, and a check of the disk."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from ..files import replaced_atomically

if TYPE_CHECKING:
    from .base import Distiller


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically: a checkpoint file is complete at every moment.

    The checkpoint is written to a temporary file in the same folder, flushed to disk, and renamed.
    Lightning's own implementation writes to the system's folder for temporary files; from there, a
    file is copied and not renamed if its destination is on another disk.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replaced_atomically(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)


def checkpoints(folder: str | os.PathLike, monitor: str | None = None, every: int | None = None) -> list[ModelCheckpoint]:
    """Return callbacks that write ``last.ckpt`` and ``best.ckpt`` to ``folder``.

    ``last.ckpt`` is written after each epoch, and after every ``every`` steps. ``best.ckpt`` is the
    checkpoint with the highest ``monitor``.

    This does not use ``save_last=True``: Lightning then writes the last checkpoint only when it
    writes another one too (seen in 2.6.6). ``save_on_train_epoch_end=True`` is given, because by
    default Lightning writes the checkpoint only after validation.
    """
    folder = Path(folder)
    callbacks: list[ModelCheckpoint] = [LastCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)]
    if every is not None:
        callbacks.append(ModelCheckpoint(folder, "last", every_n_train_steps=every, enable_version_counter=False))
    if monitor is not None:
        callbacks.append(BestCheckpoint(folder, "best", monitor=monitor, mode="max", enable_version_counter=False))
    return callbacks


class LastCheckpoint(ModelCheckpoint):
    """Write the checkpoint also if a run ends within an epoch (max_steps, max_time).

    It is written right after the last batch, while Lightning still counts the epoch as incomplete,
    so that a resumed run trains the rest of the epoch.
    """

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        run_ends = trainer.should_stop or trainer.global_step >= trainer.max_steps != -1
        if run_ends and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.global_step not in (0, self._last_global_step_saved) and not cast(Any, trainer).fast_dev_run:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def of_first_loader(name: str) -> str:
    """Return the name of a validation metric of the first of several validation loaders."""
    return f"{name}/dataloader_idx_0"


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint with the highest metric. Without labels in validation, there is none.

    With several validation loaders, the metric is that of the first one.
    """

    def _monitor_candidates(self, trainer: L.Trainer) -> dict:
        candidates = super()._monitor_candidates(trainer)
        first = of_first_loader(str(self.monitor))
        return candidates | {self.monitor: candidates[first]} if first in candidates else candidates

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict) -> None:
        if self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)


class EpochLines(L.Callback):
    """Print one line per epoch, for runs without a progress bar."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start_time = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        task = cast("Distiller", module).task
        names = ("train/loss", f"val/{task.main_metric}", of_first_loader(f"val/{task.main_metric}"))
        metrics = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        total = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        values = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
        print(f"epoch {trainer.current_epoch + 1}{total}{values}  {time.monotonic() - self._start_time:.0f} s", flush=True)


class OutputCheck(L.Callback):
    """Check before training that the folders for checkpoints and logs can be written to.

    Raises OSError if a folder cannot be created or written to, or has too little free disk space.
    """

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or cast(Any, trainer).fast_dev_run:
            return
        weights = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        checkpoint = 3 * weights + 2**20  # the optimizer may store two moments per weight, as Adam
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                folder = callback.dirpath or trainer.default_root_dir
                kept = callback.save_top_k if callback.save_top_k >= 0 else 1
                # One more, because a checkpoint is written before the old one is deleted.
                self.check(folder, (kept + bool(callback.save_last) + 1) * checkpoint)
        for logger in trainer.loggers:
            if logger.save_dir is not None:
                self.check(logger.save_dir, 2**20)

    @staticmethod
    def check(folder: str | os.PathLike, size: int) -> None:
        """Check that ``folder`` exists or can be created, and has space for ``size`` bytes.

        Up to 64 MiB are allocated as a test, in a temporary file that is then deleted.

        Raises:
            OSError: the check failed; names the folder, the reason and the free disk space.
        """
        folder = Path(folder)
        if "://" in str(folder) or ":/" in str(folder):
            return
        temporary = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(folder).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=".room.")
            try:
                # The free disk space does not include quotas and limits on file sizes.
                reserve(handle, min(size, 2**26))
            finally:
                os.close(handle)
        except OSError as error:
            free = f", {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free" if folder.is_dir() else ""
            raise OSError(
                error.errno, f"checkpoints and logs need {size / 2**20:.0f} MiB in {folder}, but cannot be written: {error.strerror}{free}"
            ) from error
        finally:
            if temporary is not None:
                os.unlink(temporary)


def reserve(handle: int, size: int) -> None:
    """Allocate the first ``size`` bytes of a file, so that a full disk raises OSError here."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(handle, 0, size)
    elif os.fstat(handle).st_size < size:
        os.truncate(handle, size)


def silence_lightning() -> None:
    """Silence Lightning's tips, and warnings about settings that are intentional."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.getMessage())
    for message in (
        ".*does not have many workers.*",
        ".*exists and is not empty.*",
        ".*isinstance.treespec.*",
        ".*LeafSpec.*",
        ".*smaller than the logging interval.*",
        ".*args parameter is intended to run from within Python.*",
        ".*weights_only. was not set.*",
    ):
        warnings.filterwarnings("ignore", message=message)
