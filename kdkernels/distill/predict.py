"""Write the predictions of a student for a folder of images to a CSV file."""

from __future__ import annotations

import csv
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..data.decode import read_image
from ..data.listing import LeftOut, image_files
from ..files import replaced_atomically
from ..models.weights import build, describe, from_checkpoint, load_weights
from ..tasks import find_logits
from .export import METADATA_KEY, metadata_of

__all__ = ["predict_images"]

Logits = Callable[[Tensor], Tensor]  # images [B, C, H, W], normalised -> logits [B, K]


def predict_images(
    model: str | os.PathLike,
    images: str | os.PathLike,
    out: str | os.PathLike,
    top_k: int = 1,
    batch_size: int = 64,
    on_error: Literal["fail", "skip"] = "fail",
) -> int:
    """Write the most probable classes of each image to a CSV file.

    The columns are ``file`` (relative to the folder), ``class``, ``probability``, and with
    ``top_k`` > 1 also ``class_2``, ``probability_2``, and so on. If an error occurs, ``out`` is not
    changed. Images are prepared as by :class:`kdkernels.data.ImageFolder`: the square in the
    middle, resized to the image size of the student.

    Args:
        model: a file that ``kdkernels export`` wrote (.onnx, .pt2, .safetensors), or a checkpoint
            of a student.
        images: the folder of the images, including its subfolders.
        out: the CSV file.
        top_k: number of classes per image, the most probable first.
        batch_size: number of images per batch.
        on_error: "fail" raises ValueError for a file that cannot be read as an image; "skip" omits
            the file, and names it on stderr.

    Returns:
        The number of images in the CSV file.

    Raises:
        FileNotFoundError: there is no such model or folder.
        ValueError: there is no image, an image cannot be read, the model does not contain the
            metadata that are needed to prepare images, or an option is out of range.
    """
    for name, value in {"top_k": top_k, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if on_error not in ("fail", "skip"):
        raise ValueError(f'on_error must be "fail" or "skip", got {on_error!r}')
    if not os.fspath(out):
        raise ValueError("out must be the name of a file, got ''")
    if Path(out).is_dir():
        raise ValueError(f"out must be a file, but {str(out)!r} is a folder")
    not_a_folder = next((str(parent) for parent in Path(out).parents if parent.exists() and not parent.is_dir()), None)
    if not_a_folder is not None:
        raise ValueError(f"out must be in a folder, but {not_a_folder!r} is a file")
    folder, left_out = Path(images), LeftOut(Path(images))
    files = image_files(folder, left_out)
    network, metadata = load_model(model)
    columns = ["file", "class", "probability", *(f"{name}_{i}" for i in range(2, top_k + 1) for name in ("class", "probability"))]

    def rows() -> Iterator[list]:
        for paths, pixels in _batches(files, metadata, batch_size, on_error, left_out):
            top_classes = _top_classes(network(prepare(pixels, metadata)), metadata, top_k)
            for path, cells in zip(paths, top_classes, strict=True):
                yield [path.relative_to(folder).as_posix(), *cells]

    count = _write_csv(Path(out), columns, _require_rows(rows(), images))
    if left_out:
        print(left_out, file=sys.stderr)
    return count


def _require_rows(rows: Iterator[list], images: object) -> Iterator[list]:
    """Yield the rows; raise ValueError if there is none."""
    row = next(rows, None)
    if row is None:
        raise ValueError(f"images: no file in {str(images)!r} can be read as an image")
    yield row
    yield from rows


def load_model(path: str | os.PathLike) -> tuple[Logits, dict]:
    """Load a model as a function from images to logits, and its metadata.

    :func:`kdkernels.distill.export.metadata_of` describes the metadata.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has none of the four formats, cannot be read, or contains no metadata;
            or the student is not for classification, or not for square images of 1 or 3 channels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"model: there is no file {str(path)!r}")
    loaders = {".onnx": _load_onnx, ".pt2": _load_torch_export, ".safetensors": _load_safetensors, ".ckpt": _load_checkpoint}
    if path.suffix not in loaders:
        raise ValueError(f"model: {str(path)!r} must end in one of {', '.join(loaders)}")
    try:
        network, metadata = loaders[path.suffix](path)
    except (ImportError, ValueError):  # messages of this package
        raise
    except Exception as error:  # each format's library raises its own kinds for a damaged file
        raise ValueError(f"model: {str(path)!r} cannot be read, it may be damaged or incomplete: {str(error).splitlines()[0]}") from error
    if metadata.get("task") != "classification":
        raise ValueError(f"model: {str(path)!r} must be a student for classification, but its task is {metadata.get('task')}")
    channels, height, width = metadata["image_shape"]
    if height != width or channels not in (1, 3):
        raise ValueError(
            f"model: {str(path)!r} must be a student for square images of 1 or 3 channels, but its images are [{channels}, {height}, {width}]"
        )
    return network, metadata


def _load_onnx(path: Path) -> tuple[Logits, dict]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    metadata = _metadata(path, session.get_modelmeta().custom_metadata_map.get(METADATA_KEY))
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]), metadata


def _load_torch_export(path: Path) -> tuple[Logits, dict]:
    extra = {f"{METADATA_KEY}.json": ""}
    logger = logging.getLogger("torch.export")
    logger.disabled, before = True, logger.disabled  # it logs the traceback of an error that it also raises
    try:
        program = torch.export.load(path, extra_files=extra)
    finally:
        logger.disabled = before
    return torch.no_grad()(program.module()), _metadata(path, extra[f"{METADATA_KEY}.json"])


def _load_safetensors(path: Path) -> tuple[Logits, dict]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = _metadata(path, (file.metadata() or {}).get(METADATA_KEY))
    network = load_weights(build(metadata["student"]), path).eval()
    return torch.no_grad()(lambda image: find_logits(network(image))), metadata


def _load_checkpoint(path: Path) -> tuple[Logits, dict]:
    try:
        description = describe(path)
        network = from_checkpoint(path).eval()
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    return torch.no_grad()(lambda image: find_logits(network(image))), metadata_of(description, description["student"], description["image_shape"])


def _metadata(path: Path, text: str | bytes | None) -> dict:
    if not text:
        raise ValueError(f"model: {str(path)!r} does not contain the metadata of `kdkernels export`: export the checkpoint again")
    return json.loads(text)


def prepare(pixels: Tensor, metadata: dict) -> Tensor:  # [B, C, H, W] uint8 -> [B, C, H, W] float32
    """Normalise images like the student's training images."""
    image = pixels.float() / 255
    if metadata["mean"] is None:
        return image
    mean, std = (torch.tensor(metadata[name]).view(-1, 1, 1) for name in ("mean", "std"))
    return (image - mean) / std


def _batches(files: list[Path], metadata: dict, batch_size: int, on_error: str, left_out: LeftOut) -> Iterator[tuple[list[Path], Tensor]]:
    size, gray = metadata["image_shape"][1], metadata["image_shape"][0] == 1
    for start in range(0, len(files), batch_size):
        read = {}
        for path in files[start : start + batch_size]:
            try:
                read[path] = read_image(path, size, "L" if gray else "RGB")
            except ValueError as error:
                if on_error == "fail":
                    raise
                left_out.add("cannot be read as images", path, str(error.__cause__))
        if read:
            yield list(read), torch.stack(list(read.values()))


def _top_classes(logits: Tensor, metadata: dict, top_k: int) -> list[list]:
    """For each image, list the most probable classes, each followed by its probability."""
    classes = metadata["classes"] or [str(i) for i in range(logits.shape[1])]
    if top_k > logits.shape[1]:
        raise ValueError(f"top_k must be at most {logits.shape[1]}, the number of classes, got {top_k}")
    top = logits.double().softmax(1).topk(top_k)
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[cell for i, p in zip(*pair, strict=True) for cell in (classes[i], f"{p:.6f}")] for pair in pairs]


def _write_csv(path: Path, header: list[str], rows: Iterator[list]) -> int:
    """Write a CSV file, and return the number of rows."""
    count = 0
    with replaced_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            writer.writerow(row)
            count += 1
    return count
