"""``kdkernels fit|validate|test``: LightningCLI over the methods and data of the package, or the user's own by import path."""

from __future__ import annotations

import enum
import json
import os
import sys
from pathlib import Path

import lightning as L
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ..distill import Distiller
from ..distill.engine import AtomicCheckpointIO, EpochLines, checkpoints, silence_lightning
from ..models.weights import describe
from .configs import config_files, with_bases
from .fit_help import brief_help


class CLI(LightningCLI):
    """LightningCLI with this package's defaults: where a config says nothing, the last and the best checkpoint, CSV and TensorBoard logs."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--checkpoint_every", type=int | None, default=None, help="steps between checkpoints besides those after each epoch")
        parser.add_argument("--restart", type=bool, default=False, help="start anew in a folder that holds a run, and write over its checkpoints")

    def init_parser(self, **options) -> LightningArgumentParser:
        return super().init_parser(**options | {"exit_on_error": False})  # a mistake is raised, not printed below the usage of everything

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        last = _root(config.trainer) / "last.ckpt"
        if self.subcommand == "fit" and last.exists() and not (config.get("ckpt_path") or config.restart or config.trainer.fast_dev_run):
            raise ValueError(
                f"{last.parent} holds a run already: go on with it by --ckpt_path last, start anew by --restart true, or choose another folder "
                "by --trainer.default_root_dir"
            )
        if config.get("ckpt_path") is None and self.subcommand != "fit" and (last.exists() or (last.parent / "best.ckpt").exists()):
            rank_zero_warn(f"the student is judged as it is made, not as it was trained in {last.parent}: that takes --ckpt_path best, or last")
        if config.get("ckpt_path") == "best" or (config.get("ckpt_path") == "last" and self.subcommand != "fit"):  # fit finds its own last one
            path = _root(config.trainer) / f"{config.ckpt_path}.ckpt"
            if not path.exists():
                raise FileNotFoundError(f"ckpt_path: there is no {path}; --trainer.default_root_dir says where the run is")
            config.ckpt_path = str(path)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        config = {name: _plain(self._get(self.config, name)) for name in ("model", "data")}
        self.model.run_config = config
        spec = config["model"]["init_args"]["student"]
        self.model.student_spec = _origin(spec) if isinstance(spec, dict) else None

    def instantiate_trainer(self, **overrides) -> L.Trainer:
        config = self._get(self.config_init, "trainer", default={})
        root = _root(config)
        overrides["default_root_dir"] = str(root)
        if config.get("barebones"):  # for which Lightning takes no loggers, checkpoints or bars
            return super().instantiate_trainer(**overrides)
        if config.get("logger") in (None, True):
            csv = CSVLogger(root, name="")
            overrides["logger"] = [csv, TensorBoardLogger(root, name="", version=csv.version)]
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_checkpointing") is not False and not any(isinstance(c, ModelCheckpoint) for c in given):
            monitor = None if config.get("limit_val_batches") == 0 else f"val/{self.model.task.main_metric}"
            given = [*given, *checkpoints(root, monitor, self.config[self.subcommand].checkpoint_every)]
        if config.get("enable_progress_bar") is False:
            given = [*given, EpochLines()]
        overrides["callbacks"] = given
        if config.get("plugins") is None:
            overrides["plugins"] = [AtomicCheckpointIO()]
        return super().instantiate_trainer(**overrides)

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            print(report(self.trainer))


def report(trainer: L.Trainer) -> str:
    """The monitored number of the last epoch and of the best, each with its checkpoint."""
    lines = {}
    main = f"val/{trainer.lightning_module.task.main_metric}"
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            kind, name = ("last", main) if callback.monitor is None else ("best", callback.monitor)
            value = trainer.callback_metrics.get(name) if kind == "last" else callback.best_model_score
            shown = f"{name} {float(value):.4f}  " if value is not None else ""
            lines[kind] = f"{kind}  {shown}{os.path.relpath(callback.best_model_path)}"
    return "\n".join(lines.values())


def main(arguments: list[str]) -> int:
    """Runs ``fit``, ``validate`` or ``test``, the first of the arguments, with the options that follow it."""
    silence_lightning()
    folders = (os.path.dirname(os.path.abspath(path)) for path in config_files(arguments))
    sys.path[1:1] = folders  # so that networks beside a config can be imported
    if {"-h", "--help"} & set(arguments):
        print(brief_help(arguments), end="")
        return 0
    arguments = ["--help" if argument == "--help_all" else argument for argument in arguments]
    arguments = ["--print_config=skip_null" if argument == "--print_config" else argument for argument in arguments]
    # A callback's default that is a member of an enumeration (Timer's interval) goes into config.yaml by its value.
    yaml.SafeDumper.add_multi_representer(enum.Enum, lambda dumper, member: dumper.represent_data(member.value))
    sys.argv = [sys.argv[0], *arguments]  # with which Lightning starts the other processes of DDP
    CLI(
        Distiller,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,  # the method makes them
        save_config_kwargs={"overwrite": True},
        args=with_bases(arguments),
    )
    return 0


def _plain(config: Namespace) -> dict:
    """Numbers, strings, lists and dicts, which load without unpickling."""
    return json.loads(json.dumps(config.as_dict(), default=str))


def _origin(spec: dict) -> dict:
    """How a student that comes from a checkpoint was made at first: its new checkpoints have its weights, and need the old one no more."""
    if spec.get("class_path", "").endswith("from_checkpoint"):
        return _origin(describe(spec["init_args"]["path"])["student"])
    return spec


def _root(trainer_config: Namespace | dict) -> Path:
    return Path(trainer_config.get("default_root_dir") or "runs/last")
