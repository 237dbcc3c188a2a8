"""``kdkernels fit|validate|test``: LightningCLI for methods and data of the package or the user."""

from __future__ import annotations

import enum
import json
import os
import sys
from pathlib import Path
from typing import Any, cast

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ..distill import Distiller
from ..distill.engine import AtomicCheckpointIO, EpochLines, checkpoints, of_first_loader, silence_lightning
from ..models.weights import describe
from .config_checks import check_configs, wrong_arguments
from .configs import config_files, with_bases
from .fit_help import brief_help


class CLI(LightningCLI):
    """LightningCLI with the defaults of this package.

    Unless a config sets them otherwise, the last and the best checkpoint, a CSV log and a
    TensorBoard log are written.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--checkpoint_every", type=int | None, default=None, help="also write last.ckpt every N steps")
        parser.add_argument("--restart", type=bool, default=False, help="start a new run in a folder that contains one; overwrite its checkpoints")

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        return super().init_parser(**options | {"exit_on_error": False})  # raise errors instead of printing the usage

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        for section in ("model", "data"):
            for problem in wrong_arguments(config[section].as_dict(), section):
                raise ValueError(f"--{problem}")
        last = _run_folder(config.trainer) / "last.ckpt"
        if self.subcommand == "fit" and last.exists() and not (config.get("ckpt_path") or config.restart or config.trainer.fast_dev_run):
            raise ValueError(
                f"{last.parent} already contains a run: resume it with --ckpt_path last, start a new run with --restart true, or give another "
                "folder with --trainer.default_root_dir"
            )
        if config.get("ckpt_path") is None and self.subcommand != "fit" and (last.exists() or (last.parent / "best.ckpt").exists()):
            rank_zero_warn(
                f"the student is evaluated with its initial weights, not with those trained in {last.parent}: for these, give --ckpt_path best "
                "or --ckpt_path last"
            )
        # With fit, Lightning resolves "last" itself.
        if config.get("ckpt_path") == "best" or (config.get("ckpt_path") == "last" and self.subcommand != "fit"):
            path = _run_folder(config.trainer) / f"{config.ckpt_path}.ckpt"
            if not path.exists():
                raise FileNotFoundError(f"ckpt_path: there is no file {str(path)!r}; give the folder of the run with --trainer.default_root_dir")
            config.ckpt_path = str(path)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        config = {name: _to_plain_values(self._get(self.config, name)) for name in ("model", "data")}
        self.model.run_config = config
        spec = config["model"]["init_args"]["student"]
        self.model.student_spec = _original_spec(spec) if isinstance(spec, dict) else None

    def instantiate_trainer(self, **overrides: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer", default={})
        root = _run_folder(config)
        overrides["default_root_dir"] = str(root)
        if config.get("barebones"):  # Lightning does not allow loggers, checkpoints or progress bars with it
            return super().instantiate_trainer(**overrides)
        if config.get("logger") in (None, True):
            csv = CSVLogger(root, name="")
            overrides["logger"] = [csv, TensorBoardLogger(root, name="", version=csv.version)]
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if config.get("enable_checkpointing") is not False and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            monitor = None if config.get("limit_val_batches") == 0 else f"val/{self.model.task.main_metric}"
            callbacks = [*callbacks, *checkpoints(root, monitor, self.config[self.subcommand].checkpoint_every)]
        if config.get("enable_progress_bar") is False:
            callbacks = [*callbacks, EpochLines()]
        overrides["callbacks"] = callbacks
        if config.get("plugins") is None:
            overrides["plugins"] = [AtomicCheckpointIO()]
        return super().instantiate_trainer(**overrides)

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            print(report(self.trainer))


def report(trainer: L.Trainer) -> str:
    """Return the main validation metric and the checkpoint of the last and of the best epoch."""
    lines = {}
    main = f"val/{cast(Distiller, trainer.lightning_module).task.main_metric}"
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            kind, name = ("last", main) if callback.monitor is None else ("best", callback.monitor)
            last = trainer.callback_metrics.get(name, trainer.callback_metrics.get(of_first_loader(name)))
            value = last if kind == "last" else callback.best_model_score
            shown = f"{name} {float(value):.4f}  " if value is not None else ""
            lines[kind] = f"{kind}  {shown}{os.path.relpath(callback.best_model_path)}"
    return "\n".join(lines.values())


def main(arguments: list[str]) -> int:
    """Run the command ``arguments[0]`` (``fit``, ``validate`` or ``test``) with its options."""
    silence_lightning()
    folders = (os.path.dirname(os.path.abspath(path)) for path in config_files(arguments))
    sys.path[1:1] = folders  # makes modules in the folder of a config importable
    if {"-h", "--help"} & set(arguments):
        print(brief_help(arguments), end="")
        return 0
    check_configs(arguments)
    arguments = ["--help" if argument == "--help_all" else argument for argument in arguments]
    arguments = ["--print_config=skip_null" if argument == "--print_config" else argument for argument in arguments]
    # Write enum members, such as the default of Timer's interval, to config.yaml as their values.
    yaml.SafeDumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_data(member.value))
    sys.argv = [sys.argv[0], *arguments]  # Lightning starts the other processes of DDP with these arguments
    CLI(
        Distiller,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,  # the method creates its optimizer
        save_config_kwargs={"overwrite": True},
        args=with_bases(arguments),
    )
    return 0


def _to_plain_values(config: Namespace) -> dict:
    """Convert a config to numbers, strings, lists and dicts, which load without unpickling."""
    return json.loads(json.dumps(config.as_dict(), default=str))


def _original_spec(spec: dict) -> dict:
    """Return the class and arguments of a student, also if it is loaded from a checkpoint.

    New checkpoints contain the weights of the student, so they must not depend on the old
    checkpoint.
    """
    if spec.get("class_path", "").endswith("from_checkpoint"):
        return _original_spec(describe(spec["init_args"]["path"])["student"])
    return spec


def _run_folder(trainer_config: Namespace | dict) -> Path:
    return Path(trainer_config.get("default_root_dir") or "runs/last")
