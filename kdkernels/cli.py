"""The command line: ``kdkernels fit|validate|test --config x.yaml``, ``kdkernels demo``, ``kdkernels info``."""

from __future__ import annotations

import sys

USAGE = """usage: kdkernels COMMAND [options]

  fit | validate | test    train or evaluate a method: kdkernels fit --config configs/kd_clutter_digits.yaml
                           (--help lists every option, --print_config writes a config)
  demo                     teacher, student alone, student distilled on the embedded images, and a report
  info                     what is built, and where each op runs
"""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if command == "info":
        from . import show_config

        show_config()
        return 0
    if command not in ("demo", "fit", "validate", "test"):
        print(f"kdkernels: there is no command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        if command == "demo":
            from .demo import main as demo

            return demo(arguments[1:])
        train(arguments)
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "jsonargparse", "torchmetrics", "sklearn", "matplotlib"):
            raise
        print(f"kdkernels {command} needs {error.name}: pip install 'kdkernels[train]'", file=sys.stderr)
        return 1
    return 0


def train(arguments: list[str]) -> None:
    """LightningCLI over the methods and data modules of the package, or the user's own by import path."""
    import lightning as L
    from lightning.pytorch.cli import LightningCLI

    from .distill import Distiller

    LightningCLI(
        Distiller,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
