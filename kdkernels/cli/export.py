"""``kdkernels export``: write the student of a checkpoint as ONNX, torch.export or safetensors."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser
from torch import nn

from ..distill.export import export_student
from .arguments import UsageError, parse_typed

FORMATS = {".onnx": "onnx", ".pt2": "torch_export", ".safetensors": "safetensors"}


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(
        prog="kdkernels export",
        description="Write the student of a checkpoint to files, and check that each file gives the same logits.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of kdkernels fit, or of a Distiller trained in Python")
    parser.add_argument(
        "--out",
        type=str,
        nargs="+",
        required=True,
        help="files to write: .onnx (any batch size), .pt2 (a torch.export program), .safetensors (the weights)",
    )
    parser.add_argument("--image_shape", type=list[int], help="shape [C, H, W] of an image; by default that of the training images")
    parser.add_subclass_arguments(nn.Module, "student", required=False, help="class of the student, if the checkpoint does not contain it")
    parser.add_argument("--exit", type=str, help="export an exit of a network trained with BYOT or DeepSupervision: its number from 1, or ensemble")
    parser.add_argument(
        "--network",
        type=str,
        help="export another network trained with FFL, DML, ONE or DualNet: peer_1, ensemble, fused or gated",
    )
    options = parse_typed(parser, arguments)
    if options.exit is not None and options.network is not None:
        raise UsageError("--exit and --network cannot be given together")
    if options.exit is not None and options.exit != "ensemble" and not options.exit.isdigit():
        raise UsageError(f"--exit must be a number from 1, or ensemble, got {options.exit!r}")
    exit = int(options.exit) if options.exit and options.exit.isdigit() else options.exit
    targets = targets_of(options.out)
    spec = options.student.as_dict() if options.get("student") is not None else None
    for name, difference in export_student(options.ckpt, targets, spec, options.image_shape, exit, options.network).items():
        print(f"{targets[name]}: the logits differ by at most {difference:.1e} relative to the largest logit")
    return 0


def targets_of(files: list[str]) -> dict[str, str]:
    """Return a dict from format to file, by the suffixes of the files."""
    targets: dict[str, str] = {}
    for file in files:
        kind = FORMATS.get(Path(file).suffix)
        if kind is None:
            raise UsageError(f"--out: files must end in {', '.join(FORMATS)}, got {file!r}")
        if kind in targets:
            raise UsageError(f"--out: give at most one file per format, got {targets[kind]!r} and {file!r}")
        targets[kind] = file
    return targets
