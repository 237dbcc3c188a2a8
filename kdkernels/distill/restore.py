"""Construct a method and its data from a config or from a checkpoint of ``kdkernels fit``."""

from __future__ import annotations

import os

import lightning as L
from lightning.pytorch.cli import LightningCLI

from ..models.weights import describe, load_weights, read_weights
from .base import Distiller
from .engine import silence_lightning

__all__ = ["instantiate", "restore"]


def restore(ckpt: str | os.PathLike) -> tuple[Distiller, L.LightningDataModule]:
    """Return the method with its trained modules, and its data, set up for validation.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of this package, or does not contain the config of
            its run.
    """
    description = describe(ckpt)
    config = description.get("config")
    if config is None:
        raise ValueError(f"{os.fspath(ckpt)!r} does not contain the config of its run: give a checkpoint that `kdkernels fit` wrote")
    method, data = instantiate(config)
    load_weights(method.student, ckpt)
    method.restore_modules(description["image_shape"], read_weights(ckpt))
    data.setup("validate")
    return method, data


def instantiate(config: dict) -> tuple[Distiller, L.LightningDataModule]:
    """Return the method and the data of the sections ``model`` and ``data`` of a config."""
    silence_lightning()
    cli = LightningCLI(
        Distiller,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=False,
        save_config_callback=None,
        trainer_defaults={"logger": False, "enable_checkpointing": False, "accelerator": "cpu", "devices": 1},
        args=config,
        run=False,
    )
    return cli.model, cli.datamodule
