"""``kdkernels export``: the student of a checkpoint, alone, in formats that others read."""

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
        description="Writes the student of a checkpoint, and checks that each file gives the same logits.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of kdkernels fit, or of a Distiller")
    parser.add_argument(
        "--out",
        type=str,
        nargs="+",
        required=True,
        help="files to write: .onnx (any batch size), .pt2 (a program of torch.export), .safetensors (the weights alone)",
    )
    parser.add_argument("--image_shape", type=list[int], help="[C, H, W]; by default that of the training images")
    parser.add_subclass_arguments(nn.Module, "student", required=False, help="how the student is made, where the checkpoint does not say")
    options = parse_typed(parser, arguments)
    targets = targets_of(options.out)
    spec = options.student.as_dict() if options.get("student") is not None else None
    for name, difference in export_student(options.ckpt, targets, spec, options.image_shape).items():
        print(f"{targets[name]}: the logits differ by at most {difference:.1e} of the largest")
    return 0


def targets_of(files: list[str]) -> dict[str, str]:
    """The files by format, which their suffixes say."""
    targets: dict[str, str] = {}
    for file in files:
        kind = FORMATS.get(Path(file).suffix)
        if kind is None:
            raise UsageError(f"--out: files must end in {', '.join(FORMATS)}, got {file!r}")
        if kind in targets:
            raise UsageError(f"--out: one file of each format, got {targets[kind]!r} and {file!r}")
        targets[kind] = file
    return targets
