"""The student of a checkpoint, alone, in formats that others read: safetensors, torch.export and ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.weights import build, describe, load_weights
from .engine import umask

__all__ = ["export_student"]

# Largest difference of a logit, relative to the largest logit: float32 in another order of summation through a deep network.
TOLERANCE = 1e-4


def export_student(
    ckpt: str | os.PathLike, targets: dict[str, str], spec: dict | None = None, image_shape: list[int] | None = None
) -> dict[str, float]:
    """Writes the student of a checkpoint.

    Args:
        ckpt: checkpoint of a :class:`kdkernels.distill.Distiller`.
        targets: files by format: "safetensors", "torch_export", "onnx".
        spec: ``{"class_path", "init_args"}`` of the student, where the checkpoint does not say.
        image_shape: [C, H, W], where the checkpoint does not say.

    Returns:
        For each format the largest difference of a logit from the student's own, relative to the largest logit. A file that differs by more
        than 1e-4 is not left there.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or it says too little; a file that does not give the same logits.
    """
    description = describe(ckpt)
    spec, image_shape = spec or description["student"], image_shape or description["image_shape"]
    if spec is None:
        raise ValueError(
            f"{ckpt} does not say how its student is made (its training was started from Python): give --student CLASS --student.ARGUMENT"
        )
    if image_shape is None:
        raise ValueError(f"{ckpt} does not say the shape of the images: give --image_shape '[3, 32, 32]'")
    student = load_weights(build(spec), ckpt).eval()
    image = torch.randn(4, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = student(image)
    differences = {}
    for name, target in targets.items():
        target = Path(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            temporary = Path(folder) / target.name
            logits = _FORMATS[name](student, image, temporary, spec)
            difference = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
            if not difference <= TOLERANCE:
                raise ValueError(f"{target} is not written: its logits differ from the student's by {difference:.1e} of the largest")
            os.chmod(temporary, 0o666 & ~umask())  # safetensors' own is private
            os.replace(temporary, target)
        differences[name] = difference
    return differences


# Each writes the student to a file, and returns the logits that the file gives.


def _safetensors(student: nn.Module, image: Tensor, path: Path, spec: dict) -> Tensor:
    from safetensors.torch import save_file

    # A copy of each: the format has no place for tied weights.
    save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in student.state_dict().items()}, path)
    with torch.no_grad():
        return load_weights(build(spec).eval(), path)(image)


def _torch_export(student: nn.Module, image: Tensor, path: Path, spec: dict) -> Tensor:
    program = torch.export.export(student, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, path)
    return torch.export.load(path).module()(image).detach()


def _onnx(student: nn.Module, image: Tensor, path: Path, spec: dict) -> Tensor:
    import onnxruntime

    with _silence():
        torch.onnx.export(
            student,
            (image,),
            path,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


_FORMATS: dict[str, Callable[[nn.Module, Tensor, Path, dict], Tensor]] = {
    "safetensors": _safetensors,
    "torch_export": _torch_export,
    "onnx": _onnx,
}


@contextlib.contextmanager
def _silence():
    """The exporter reports its progress on stdout."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
