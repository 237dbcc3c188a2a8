"""What is checked about student and teacher before training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..models.taps import FeatureTaps
from ..tasks import Task, describe_output
from ..tasks.outputs import EXPECTED

if TYPE_CHECKING:
    from .base import Distiller


def check_networks(method: Distiller, image: Tensor, classes: int | None) -> int:
    """Run student and teachers once on two images, in the modes that training uses, and check their outputs.

    Args:
        method: whose networks, task and taps are checked.
        image: [2, C, H, W].
        classes: of the data; ``None`` if the data do not say.

    Returns:
        The number of the networks' classes.

    Raises:
        ValueError: a network cannot take the images or returns no logits; classes or features that cannot be compared.
    """
    with unchanged(method.student), method.trainer.precision_plugin.forward_context():
        method.hold_teachers()
        with torch.no_grad():
            taught = {name: _outputs(method, name, image) for name in method.teachers_by_name()}
        for mode in ("", "in training mode "):
            method.student.train(bool(mode))
            graph = bool(mode) and method.device_mesh is None  # FSDP would wait for a backward pass
            with torch.set_grad_enabled(graph):
                logits, features = _outputs(method, "student", image, mode)
            if graph and not logits.requires_grad:
                raise ValueError(
                    f"the logits of the student ({_kind(method, 'student')}) do not depend on a parameter that is trained: is all of it frozen, or "
                    "its forward without a graph (detach, no_grad)?"
                )
            _check_classes(method, {"student": logits} | {name: outputs[0] for name, outputs in taught.items()}, classes)
            if len(taught) == 1:
                ((_, teacher_features),) = taught.values()
                method.check_features(features, teacher_features)
        with torch.enable_grad():
            method.check_method(image)
    return logits.shape[1]


def _kind(method: Distiller, name: str) -> str:
    return type(method.student if name == "student" else method.teachers_by_name()[name]).__name__


def _check_classes(method: Distiller, logits: dict[str, Tensor], classes: int | None) -> None:
    for name, values in logits.items():
        if classes is not None and values.shape[1] != classes:
            raise ValueError(f"the data have {classes} classes, but the {name} ({_kind(method, name)}) has {values.shape[1]}")
    student = logits["student"]
    for name, values in logits.items():
        if values.shape[1] != student.shape[1]:
            raise ValueError(f"student and {name} must have the same classes, they have {student.shape[1]} and {values.shape[1]}")


def _outputs(method: Distiller, name: str, image: Tensor, when: str = "") -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and tapped features of a network that is run for the first time."""
    network = method.student if name == "student" else method.teachers_by_name()[name]
    taps = method.student_taps if name == "student" else method.teacher_taps or FeatureTaps(network, ())
    kind = type(network).__name__
    try:
        output, features = taps(image)
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except Exception as error:  # whatever the network's layers raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{when}the {name} ({kind}) cannot take images {list(image.shape)}: {reason}") from error
    return checked_logits(method.task, output, image, f"{when}the {name} ({kind})"), features


def checked_logits(task: Task, output: object, image: Tensor, who: str) -> Tensor:
    """The logits in a network's output, if they fit the task and the images.

    Raises:
        ValueError: no logits were found, or they have another shape.
    """
    wanted = f"{who} must return logits {task.logits_shape} for images {list(image.shape)}"
    try:
        logits = task.logits(output)
    except TypeError as error:
        raise ValueError(f"{wanted}: {EXPECTED}; it returned {describe_output(output)}") from error
    if not task.check_logits(logits, image):
        raise ValueError(f"{wanted}, it returned {list(logits.shape)}")
    return logits


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Restores what running a module inside changes: buffers such as batch norm's, modes, and the state of random number generators."""
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    training = {part: part.training for part in module.modules()}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for part, mode in training.items():
            part.training = mode


def check_not_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError if the networks share parameters or buffers: freezing the teacher would freeze the student's too."""
    own = {_memory(tensor): name for name, tensor in [*student.named_parameters(), *student.named_buffers()]}
    shared = [own[_memory(tensor)] for tensor in [*teacher.parameters(), *teacher.buffers()] if _memory(tensor) in own]
    if shared:
        raise ValueError(
            f"student and teacher share {len(shared)} tensors ({', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}): the teacher is frozen, "
            "and they with it. Give the teacher layers of its own: copy.deepcopy"
        )


def _memory(tensor: Tensor) -> int:
    """The same number for tensors that share memory."""
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def check_sizes(name: str, network: nn.Module) -> None:
    """Raises ValueError if the network has lazy layers, whose sizes are not known yet."""
    if any(is_lazy(parameter) for parameter in network.parameters()):
        raise ValueError(f"the {name} ({type(network).__name__}) has layers whose sizes are not known yet: call it on an image, or load its weights")
