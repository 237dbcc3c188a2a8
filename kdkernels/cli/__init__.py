"""The command line ``kdkernels COMMAND``. Each command is a module with ``main(arguments)``."""

from __future__ import annotations

import importlib
import os
import sys

from .arguments import UsageError
from .user_errors import close_match, one_line

USAGE = """usage: kdkernels COMMAND [options]

  fit | validate | test    train or evaluate a method: kdkernels fit --config configs/kd_clutter_digits.yaml
                           (--help lists the options, --print_config prints the config, --ckpt_path last resumes a run)
  export                   write the student of a checkpoint: kdkernels export --ckpt best.ckpt --out student.onnx
  predict                  classify a folder of images: kdkernels predict --model student.onnx --images photos --out classes.csv
  plot attention           plot images and their attention maps: kdkernels plot attention --ckpt best.ckpt --out attention.png
  plot confusion           plot confusion matrices, and the difference of two of them: --ckpt a.ckpt b.ckpt
  plot curves              plot a metric and the training loss through the epochs: kdkernels plot curves --runs runs/kd runs/alone
  plot dfnd                plot the images that a run of DFND selected, its matrix Q, and the shares of the classes
  plot dfv                 plot singular values, vectors and their correlations: kdkernels plot dfv --ckpt a.ckpt b.ckpt --out dfv.png
  plot exits               plot accuracy against computation of a network with exits, and print the table
  plot lanes               plot predicted and labelled lanes, and the attention maps of each layer: --ckpt a.ckpt b.ckpt
  plot robustness          plot accuracy under noise in the weights, and the sizes of gradients: --ckpt a.ckpt b.ckpt
  compare                  train several methods on the same data and seeds, and write a table and a report: --methods kd,at,fsp,svd_kd
  quantify                 count the visual concepts of a distilled student through its training, and write a report
  bench                    time each op, its reference and its peers, and compare with hardware limits: kdkernels bench --quick --report
  demo                     train a teacher, a student alone and a distilled student on generated images, and write a report
  info                     print which kernels are built, and which implementation runs each op

kdkernels COMMAND --help lists the options of a command.
"""
TRAINING = ("fit", "validate", "test")
COMMANDS = (*TRAINING, "bench", "compare", "demo", "export", "info", "plot", "predict", "quantify")
_EXTRAS = {
    "train": ("lightning", "jsonargparse", "torchmetrics", "sklearn", "scipy", "matplotlib", "PIL", "safetensors", "tensorboard"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    Errors are printed as one line, ``kdkernels COMMAND: ...``.

    Args:
        arguments: the command and its options; by default the arguments of the process.

    Returns:
        0 for success, 1 for a failure, 2 for invalid arguments, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if command not in COMMANDS:
        print(f"kdkernels: there is no command {command!r}{close_match(command, COMMANDS)}; kdkernels --help lists them", file=sys.stderr)
        return 2
    try:
        return _run(command, arguments[1:])
    except UsageError as error:
        return _fail(command, error, status=2)
    except ModuleNotFoundError as error:
        extra = next((extra for extra, modules in _EXTRAS.items() if error.name in modules), None)
        if extra is None:
            return _fail(command, error)
        print(
            f"kdkernels {command}: the package {error.name} is missing; install it with: pip install --no-build-isolation '.[{extra}]' "
            "in the source folder",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"kdkernels {command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _fail(command, error)


def _run(command: str, options: list[str]) -> int:
    sys.path[:0] = [os.getcwd()]  # makes modules in the current folder importable
    if command in TRAINING:
        from . import fit

        return fit.main([command, *options])
    return importlib.import_module(f".{command}", __name__).main(options)


def _fail(command: str, error: Exception, status: int = 1) -> int:
    """Print the error as one line and return ``status``.

    With ``KDKERNELS_TRACEBACK=1`` in the environment, raise the error instead.
    """
    if os.environ.get("KDKERNELS_TRACEBACK") == "1":
        raise error
    print(f"kdkernels {command}: {one_line(error)}", file=sys.stderr)
    return status
