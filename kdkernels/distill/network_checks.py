"""Checks of student and teachers before training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..models.taps import FeatureTaps
from ..nn.outputs import ACCEPTED_OUTPUTS
from ..tasks import Task, describe_output

if TYPE_CHECKING:
    from .base import Distiller


def check_networks(method: Distiller, image: Tensor, classes: int | None) -> int:
    """Run student and teachers once on two images, and check their outputs.

    The teachers run in eval mode, the student in eval mode and in training mode.

    Args:
        method: the method whose networks, task and taps are checked.
        image: [2, C, H, W].
        classes: number of classes of the data; ``None`` if it is not known.

    Returns:
        The number of classes of the networks.

    Raises:
        ValueError: a network cannot process the images or returns no logits, the numbers of classes
            differ, or the method cannot compare the tapped features.
    """
    with unchanged(*method.trained_modules().values()), method.trainer.precision_plugin.forward_context():
        method.hold_teachers()
        with torch.no_grad():
            teacher_outputs = {name: _outputs(method, name, image) for name in method.teachers_by_name()}
        for mode in ("", "in training mode "):
            method.student.train(bool(mode))
            # With gradients, FSDP would wait for a backward pass.
            with_gradients = bool(mode) and method.device_mesh is None
            with torch.set_grad_enabled(with_gradients):
                logits, features = _outputs(method, "student", image, mode)
            if with_gradients and not logits.requires_grad:
                raise ValueError(
                    f"the logits of the student ({_class_name(method, 'student')}) do not depend on any trainable parameter: "
                    "check that its parameters are not frozen, and that its forward uses neither detach nor no_grad"
                )
            _check_classes(method, {"student": logits} | {name: outputs[0] for name, outputs in teacher_outputs.items()}, classes)
            if len(teacher_outputs) == 1:
                ((_, teacher_features),) = teacher_outputs.values()
                method.check_features(features, teacher_features)
        with torch.enable_grad():
            method.check_method(image)
    return logits.shape[1]


def _class_name(method: Distiller, name: str) -> str:
    return type(method.student if name == "student" else method.teachers_by_name()[name]).__name__


def _check_classes(method: Distiller, logits: dict[str, Tensor], classes: int | None) -> None:
    for name, values in logits.items():
        if classes is not None and values.shape[1] != classes:
            raise ValueError(f"the data have {classes} classes, but the {name} ({_class_name(method, name)}) has {values.shape[1]}")
    student = logits["student"]
    for name, values in logits.items():
        if values.shape[1] != student.shape[1]:
            raise ValueError(f"student and {name} must have the same number of classes, got {student.shape[1]} and {values.shape[1]}")


def _outputs(method: Distiller, name: str, image: Tensor, mode: str = "") -> tuple[Tensor, dict[str, Tensor]]:
    """Return logits and tapped features of a network, which may never have run before."""
    network = method.student if name == "student" else method.teachers_by_name()[name]
    taps = method.student_taps if name == "student" else method.teacher_taps or FeatureTaps(network, ())
    kind = type(network).__name__
    try:
        output, features = taps(image)
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except Exception as error:  # layers can raise any exception
        reason = " ".join(str(error).split())
        raise ValueError(f"{mode}the {name} ({kind}) cannot process images {list(image.shape)}: {reason}") from error
    return checked_logits(method.task, output, image, f"{mode}the {name} ({kind})"), features


def checked_logits(task: Task, output: object, image: Tensor, network_name: str) -> Tensor:
    """Return the logits in a network's output, after a check that they fit the task and the images.

    Raises:
        ValueError: no logits were found, or they have another shape.
    """
    expected = f"{network_name} must return logits {task.logits_shape} for images {list(image.shape)}"
    try:
        logits = task.logits(output)
    except TypeError as error:
        raise ValueError(f"{expected}: {ACCEPTED_OUTPUTS}; it returned {describe_output(output)}") from error
    if not task.check_logits(logits, image):
        raise ValueError(f"{expected}, it returned {list(logits.shape)}")
    try:
        task.check_output(output, image)
    except ValueError as error:
        raise ValueError(f"{network_name}: {error}") from error
    return logits


@contextlib.contextmanager
def unchanged(*modules: nn.Module) -> Iterator[None]:
    """Restore on exit what a forward pass of the modules changes.

    This is the buffers (for example of batch norm), the modes of the layers, and the states of the
    random number generators.
    """
    buffers = {buffer: buffer.clone() for module in modules for buffer in module.buffers()}
    training = {layer: layer.training for module in modules for layer in module.modules()}
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
        for layer, mode in training.items():
            layer.training = mode


def check_not_shared(student: nn.Module, teacher: nn.Module, names: tuple[str, str] | None = None) -> None:
    """Raise ValueError if the networks share parameters or buffers.

    Those of a teacher would be frozen. ``names`` are given for networks that are both trained.
    """
    student_names = {_storage_id(tensor): name for name, tensor in [*student.named_parameters(), *student.named_buffers()]}
    shared = [student_names[_storage_id(tensor)] for tensor in [*teacher.parameters(), *teacher.buffers()] if _storage_id(tensor) in student_names]
    if shared and names is not None:
        raise ValueError(
            f"{names[0]} and {names[1]} share {len(shared)} tensors ({', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}), but must be "
            "networks of their own: give copies (copy.deepcopy) or new networks"
        )
    if shared:
        raise ValueError(
            f"student and teacher share {len(shared)} tensors ({', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}), which would be frozen "
            "together with the teacher: give the teacher copies of these layers (copy.deepcopy)"
        )


def _storage_id(tensor: Tensor) -> int:
    """Return the same number for tensors that share memory."""
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided or not tensor.numel():
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def check_sizes(name: str, network: nn.Module) -> None:
    """Raise ValueError if the network has lazy layers whose sizes are not known yet."""
    if any(is_lazy(parameter) for parameter in network.parameters()):
        raise ValueError(f"the {name} ({type(network).__name__}) has layers whose sizes are not known yet: run it on an image, or load its weights")
