"""``kdkernels predict``: write the classes of the images in a folder to a CSV file."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser

from ..distill.predict import predict_images
from .arguments import parse_typed


def main(arguments: list[str]) -> int:
    parser = ArgumentParser(
        prog="kdkernels predict",
        description="Write the most probable classes of each image in a folder to a CSV file.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=str, required=True, help="an exported student (.onnx, .pt2, .safetensors), or a checkpoint (.ckpt)")
    parser.add_argument("--images", type=str, required=True, help="the folder of images; it is searched to any depth")
    parser.add_argument("--out", type=str, required=True, help="the CSV file to write")
    parser.add_argument("--top_k", type=int, default=1, help="number of classes per image, the most probable first")
    parser.add_argument("--batch_size", type=int, default=64, help="number of images per batch")
    parser.add_argument("--on_error", type=Literal["fail", "skip"], default="fail", help="what to do if a file cannot be read")
    options = parse_typed(parser, arguments)
    values = (options[name] for name in ("model", "images", "out", "top_k", "batch_size", "on_error"))
    print(f"{options.out}: {predict_images(*values)} images")
    return 0
