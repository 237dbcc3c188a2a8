"""What Lightning's engine lacks for runs that must survive: checkpoints that are whole or not there, and a look at the disk before the work."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to the disk, then puts it in its place: what is there is whole at every moment.

    Lightning's own goes by way of the folder for temporary files, from which a file on another disk is copied, not renamed.
    """

    def save_checkpoint(self, checkpoint: dict, path: str | os.PathLike, storage_options: object = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise


def checkpoints(folder: str | os.PathLike, monitor: str | None = None, every: int | None = None) -> list[ModelCheckpoint]:
    """Callbacks that keep ``last.ckpt`` after each epoch, and after every ``every`` steps; and ``best.ckpt``, of the highest ``monitor``.

    Not ``save_last=True``: Lightning then writes the last checkpoint only where another one is written too (seen in 2.6.6). Nor is it left to
    Lightning when an epoch counts as done: that would be when it has been validated.
    """
    options = {"enable_version_counter": False}
    callbacks = [LastCheckpoint(folder, "last", save_on_train_epoch_end=True, **options)]
    if every is not None:
        callbacks.append(ModelCheckpoint(folder, "last", every_n_train_steps=every, **options))
    if monitor is not None:
        callbacks.append(BestCheckpoint(folder, "best", monitor=monitor, mode="max", **options))
    return callbacks


class LastCheckpoint(ModelCheckpoint):
    """Also where a run ends within an epoch (max_steps, max_time): after the batch, as long as the rest of the epoch counts as not done."""

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        ends = trainer.should_stop or trainer.global_step >= trainer.max_steps != -1
        if ends and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.global_step not in (0, self._last_global_step_saved) and not trainer.fast_dev_run:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint of the highest metric; none where the validation images have no labels, so that there is no metric."""

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict) -> None:
        if self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)


class EpochLines(L.Callback):
    """A line for each epoch, where there is no progress bar."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        names = ("train/loss", f"val/{module.task.main_metric}")
        metrics = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        shown = "".join(f"  {name} {value:.4f}" for name, value in metrics.items())
        print(f"epoch {trainer.current_epoch + 1}{of}{shown}  {time.monotonic() - self._began:.0f} s", flush=True)


class OutputCheck(L.Callback):
    """Fails before training where a folder for checkpoints or logs cannot be made or written to, or its disk has no room for them."""

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        weights = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        checkpoint = 3 * weights + 2**20  # with two moments per weight, as of Adam
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                folder = callback.dirpath or trainer.default_root_dir
                kept = callback.save_top_k if callback.save_top_k >= 0 else 1
                # the ones that are there already are written beside, then over
                self.check(folder, (kept + bool(callback.save_last) + 1) * checkpoint)
        for logger in trainer.loggers:
            if logger.save_dir is not None:
                self.check(logger.save_dir, 2**20)

    @staticmethod
    def check(folder: str | os.PathLike, size: int) -> None:
        """Whether ``folder`` is there, or can be made, and has room for ``size`` bytes, some of which are written and given back.

        Raises:
            OSError: that cannot be done; names the folder, the reason and the room there is.
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
                reserve(handle, min(size, 2**26))  # quotas and limits do not show in what is free
            finally:
                os.close(handle)
        except OSError as error:
            room = f", {shutil.disk_usage(folder).free / 2**20:.0f} MiB are free" if folder.is_dir() else ""
            raise OSError(
                error.errno, f"checkpoints and logs need {size / 2**20:.0f} MiB in {folder}, and cannot be written: {error.strerror}{room}"
            ) from error
        finally:
            if temporary is not None:
                os.unlink(temporary)


def reserve(handle: int, size: int) -> None:
    """Takes the room for a file's first ``size`` bytes: a full disk is an error here, and not later while writing."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(handle, 0, size)
    elif os.fstat(handle).st_size < size:
        os.truncate(handle, size)


def umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def silence_lightning() -> None:
    """Silences Lightning's tips, and warnings about settings that are intentional."""
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
