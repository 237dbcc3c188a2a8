"""Export the student of a checkpoint to safetensors, torch.export or ONNX."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import __version__
from ..files import replaced_atomically
from ..models.weights import build, describe, load_weights
from ..tasks import find_logits
from .exit_network import exit_network
from .online_network import online_network

__all__ = ["export_student"]

METADATA_KEY = "kdkernels"  # the key of the metadata in exported files

# Largest difference of a logit, relative to the largest logit. It allows for float32 sums in
# another order in a deep network.
TOLERANCE = 1e-4


def export_student(
    ckpt: str | os.PathLike,
    targets: dict[str, str],
    spec: dict | None = None,
    image_shape: list[int] | None = None,
    exit: int | Literal["ensemble"] | None = None,
    network: str | None = None,
) -> dict[str, float]:
    """Write the student of a checkpoint to files of one or several formats.

    Each file contains metadata that is needed to use the student (see :func:`metadata_of`), as
    JSON: ONNX under the key "kdkernels" of ``metadata_props``, safetensors under the same key of
    its header, and torch.export in the extra file "kdkernels.json".

    Args:
        ckpt: checkpoint of a :class:`kdkernels.distill.Distiller`.
        targets: files by format: "safetensors", "torch_export", "onnx".
        spec: ``{"class_path", "init_args"}`` of the student; needed if the checkpoint does not
            contain it.
        image_shape: [C, H, W]; needed if the checkpoint does not contain it.
        exit: export an exit of a network that BYOT or DeepSupervision has trained, see
            :class:`kdkernels.distill.ExitNetwork`. Not possible as "safetensors", which contains
            the weights of the student alone.
        network: export a network of :class:`kdkernels.distill.FFL` and related methods, see
            :func:`kdkernels.distill.online_network`. The joint networks, which are several, are not
            possible as "safetensors".

    Returns:
        For each format the largest difference between a logit of the exported student and of the
        student, relative to the largest logit. A file that differs by more than 1e-4 is not
        written.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: the checkpoint contains no ``spec`` or ``image_shape`` and none is given, or an
            exported file gives other logits.
    """
    description = describe(ckpt)
    spec, image_shape = spec or description["student"], image_shape or description["image_shape"]
    if spec is None:
        raise ValueError(
            f"{ckpt} does not contain the configuration of its student (it was trained from Python): give --student CLASS --student.ARGUMENT"
        )
    if image_shape is None:
        raise ValueError(f"{ckpt} does not contain the shape of the images: give it, for example --image_shape '[3, 32, 32]'")
    if exit is not None and "safetensors" in targets:
        raise ValueError(f"{targets['safetensors']!r} cannot contain an exit, only the weights of the student: export it as .onnx or .pt2")
    if network is not None:
        student = online_network(ckpt, network).eval()
        if network.startswith("peer_"):
            spec = description["config"]["model"]["init_args"]["peers"][int(network.removeprefix("peer_")) - 1]
        elif network != "student" and "safetensors" in targets:
            raise ValueError(f"{targets['safetensors']!r} cannot contain several networks, only the weights of one: export it as .onnx or .pt2")
    else:
        student = load_weights(build(spec), ckpt).eval() if exit is None else exit_network(ckpt, exit).eval()
    image = torch.randn(4, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = student(image)
    names = ["logits"]
    if description.get("task") == "lanes" and isinstance(output, dict) and "existence" in output:
        names.append("existence")
    expected = named_outputs(output, names)
    exported = student if output is expected["logits"] else NamedOutputs(student, names)
    metadata = json.dumps(metadata_of(description, spec, image_shape))
    differences = {}
    for name, file in targets.items():
        target = Path(file)
        with replaced_atomically(target) as temporary:
            found = _FORMATS[name](exported, image, temporary, spec, metadata, names)
            difference = max(float((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-30)) for n in names)
            if not difference <= TOLERANCE:
                raise ValueError(f"{target} is not written: its logits differ from the student's by {difference:.1e} of the largest")
        differences[name] = difference
    return differences


class NamedOutputs(nn.Module):
    """Wrapper of a network with its outputs in a tuple, a dict or an object.

    Returns the logits; or a dict of the named outputs, if there is more than one name.
    """

    def __init__(self, network: nn.Module, names: list[str]):
        super().__init__()
        self.network, self.names = network, names

    def forward(self, image: Tensor) -> Tensor | dict[str, Tensor]:
        found = named_outputs(self.network(image), self.names)
        return found if len(self.names) > 1 else found["logits"]


def named_outputs(output: Any, names: list[str]) -> dict[str, Tensor]:
    """Return the logits and the other named outputs of a network."""
    return {"logits": find_logits(output), **{name: output[name] for name in names if name != "logits"}}


def metadata_of(description: dict, spec: dict | None, image_shape: list[int]) -> dict:
    """Return the metadata that is needed to use a student.

    The keys are ``version``, ``task``, ``classes``, ``resize``, ``mean``, ``std``, ``image_shape``
    and ``student``. Values that the checkpoint does not contain, because the training used no data
    module of :mod:`kdkernels.data`, are ``None``.

    Args:
        description: description of the checkpoint, from
            :func:`kdkernels.models.weights.describe`.
        spec: ``{"class_path", "init_args"}`` of the student.
        image_shape: [C, H, W].
    """
    data = description.get("preprocessing") or {}
    values = {name: data.get(name) for name in ("classes", "resize", "mean", "std")}
    return {"version": __version__, "task": description.get("task"), **values, "image_shape": list(image_shape), "student": spec}


# Each of these functions writes the student to a file, reads the file, and returns the outputs.


def _safetensors(student: nn.Module, image: Tensor, path: Path, spec: dict, metadata: str, names: list[str]) -> dict[str, Tensor]:
    from safetensors.torch import save_file

    student = student.network if isinstance(student, NamedOutputs) else student
    # Copies, because the format does not support tied weights.
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in student.state_dict().items()}
    save_file(weights, path, {METADATA_KEY: metadata})
    with torch.no_grad():
        return named_outputs(load_weights(build(spec).eval(), path)(image), names)


def _torch_export(student: nn.Module, image: Tensor, path: Path, spec: dict, metadata: str, names: list[str]) -> dict[str, Tensor]:
    program = torch.export.export(student, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    program.graph_module.graph.eliminate_dead_code()  # for an exit, the layers behind it
    program.graph_module.recompile()
    torch.export.save(program, path, extra_files={f"{METADATA_KEY}.json": metadata})
    output = torch.export.load(path).module()(image)
    return {name: value.detach() for name, value in named_outputs(output, names).items()}


def _onnx(student: nn.Module, image: Tensor, path: Path, spec: dict, metadata: str, names: list[str]) -> dict[str, Tensor]:
    import onnxruntime

    with _silence():
        program: Any = torch.onnx.export(  # not None, because no path is given
            student,
            (image,),
            input_names=["image"],
            output_names=names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
        )
        program.model.metadata_props[METADATA_KEY] = metadata
        program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return {name: torch.from_numpy(value) for name, value in zip(names, session.run(names, {"image": image.numpy()}), strict=True)}


_FORMATS: dict[str, Callable[[nn.Module, Tensor, Path, dict, str, list[str]], dict[str, Tensor]]] = {
    "safetensors": _safetensors,
    "torch_export": _torch_export,
    "onnx": _onnx,
}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the warnings of the ONNX exporter, and the progress that it prints to stdout."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
