"""The command line: ``kdkernels fit|validate|test --config x.yaml``, ``kdkernels export|predict|plot|bench|demo|info``."""

from __future__ import annotations

import os
import sys

USAGE = """usage: kdkernels COMMAND [options]

  fit | validate | test    train or evaluate a method: kdkernels fit --config configs/kd_clutter_digits.yaml
                           (--help lists every option, --print_config writes a config, --ckpt_path last goes on where a run stopped)
  export                   the student of a checkpoint, alone: kdkernels export --ckpt best.ckpt --onnx student.onnx
  predict                  the classes of images in a folder: kdkernels predict --model student.onnx --images photos --out classes.csv
  plot attention           images beside attention maps: kdkernels plot attention --ckpt best.ckpt --out attention.png
  plot dfv                 singular spectra, vectors and their correlations: kdkernels plot dfv --ckpt a.ckpt b.ckpt --out dfv.png
  bench                    every op against its reference, its peers and the machine's limit: kdkernels bench --quick --report
  demo                     teacher, student alone, student distilled on the embedded images, and a report
  info                     what is built, and where each op runs
"""
_EXTRAS = {
    "train": ("lightning", "jsonargparse", "torchmetrics", "sklearn", "scipy", "matplotlib", "PIL", "safetensors", "tensorboard"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}


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
    if command not in ("bench", "demo", "export", "fit", "plot", "predict", "test", "validate"):
        print(f"kdkernels: there is no command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    try:
        return _run(command, arguments)
    except ModuleNotFoundError as error:
        extra = next((extra for extra, modules in _EXTRAS.items() if error.name in modules), None)
        if extra is not None:
            print(f"kdkernels {command} needs {error.name}: pip install --no-build-isolation '.[{extra}]' in the source folder", file=sys.stderr)
            return 1
        return _say(command, error)
    except KeyboardInterrupt:
        print(f"kdkernels {command}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        return _say(command, error)


def _run(command: str, arguments: list[str]) -> int:
    sys.path[:0] = [os.getcwd()]  # networks of the user's own
    if command == "bench":
        from .benches.cli import main as bench

        return bench(arguments[1:])
    if command == "demo":
        from .demo import main as demo

        return demo(arguments[1:])
    if command == "export":
        from .export import main as export

        return export(arguments[1:])
    if command == "predict":
        from .predict import main as predict

        return predict(arguments[1:])
    if command == "plot":
        from .plot import main as plot

        return plot(arguments[1:])
    from .cli_help import config_files
    from .train import run

    sys.path[1:1] = [os.path.dirname(os.path.abspath(path)) for path in config_files(arguments)]  # and beside their config
    return run(arguments)


def _say(command: str, error: Exception) -> int:
    """One line in place of the stack, which KDKERNELS_TRACEBACK=1 shows."""
    if os.environ.get("KDKERNELS_TRACEBACK") == "1":
        raise error
    from .mistakes import one_line

    print(f"kdkernels {command}: {one_line(error)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
