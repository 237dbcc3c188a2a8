"""Attention transfer of activations and of gradients (Zagoruyko, Komodakis, ICLR 2017)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..models.taps import pair_features
from ..nn import attention_transfer_losses  # in kdkernels.nn, because it does not need Lightning
from ..tasks import Classification, Task
from .base import Distiller
from .checks import check_layers_behind_taps, check_weights

__all__ = ["AttentionTransfer", "GradientAttentionTransfer", "attention_transfer_losses", "gradient_attention_loss", "input_gradient"]


class AttentionTransfer(Distiller):
    """Match the attention maps of student and teacher at pairs of layers.

    The loss is ``gamma CE + beta sum_j attention_transfer_loss(student_j, teacher_j) + alpha T^2
    KL``, where j runs over the pairs of layers. With ``variant="authors"`` and ``beta=1000`` it is
    the loss of the authors' code. For the paper's loss, use ``variant="paper"`` and ``beta=0.05``:
    the paper multiplies the norms by half of its beta, which is about 0.1.

    Args:
        student, teacher: networks that map images [B, C, H, W] to logits [B, K].
        student_taps, teacher_taps: names of layers; layers at the same position in both lists are a
            pair. The feature maps [B, C, *spatial] of a pair may differ in their channels and
            spatial sizes.
        p: exponent, one for all pairs or one for each.
        reduce: "mean", "sum" or "max" over channels, one for all pairs or one for each.
        variant: "authors" (mean square of the difference of the normalised maps) or "paper" (norm
            of the difference).
        beta: the whole weight of the attention losses.
        gamma: weight of the cross-entropy.
        alpha: weight of T^2 KL; 0 omits it (attention transfer with KD: 0.9, and gamma 0.1).
        temperature: T of the KL.
        **options: the other arguments of :class:`Distiller`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_taps: Iterable[str],
        teacher_taps: Iterable[str],
        p: float | list[float] = 2.0,
        reduce: str | list[str] = "mean",
        variant: Literal["authors", "paper"] = "authors",
        beta: float = 1000.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        temperature: float = 4.0,
        **options,
    ):
        super().__init__(student, teacher, student_taps=student_taps, teacher_taps=teacher_taps, **options)
        if not self.student_taps.names:
            raise ValueError("student_taps and teacher_taps must name at least one pair of layers")
        check_weights(beta=beta, gamma=gamma, alpha=alpha)
        self.p, self.reduce, self.variant = p, reduce, variant
        self.beta, self.gamma, self.alpha, self.temperature = beta, gamma, alpha, temperature

    def check_features(self, student: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
        pairs = pair_features(student, teacher)
        student_maps, teacher_maps = zip(*pairs, strict=True)
        attention_transfer_losses(student_maps, teacher_maps, p=self.p, reduce=self.reduce, variant=self.variant)

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        teacher_logits, teacher_features = self.teacher_outputs(batch)
        logits, features = self.student_outputs(batch)
        pairs = pair_features(features, teacher_features)
        student_maps, teacher_maps = zip(*pairs, strict=True)
        attention = cast(Tensor, sum(attention_transfer_losses(student_maps, teacher_maps, p=self.p, reduce=self.reduce, variant=self.variant)))
        losses = self.label_losses(logits, batch, self.gamma) | {"attention": self.beta * attention}
        if self.alpha:
            losses["kl"] = self.alpha * self.task.divergence(logits, teacher_logits, self.temperature, batch)
        return logits, losses

    def check_labelled(self) -> None:
        check_layers_behind_taps(type(self).__name__, self.alpha, self.gamma)

    def check_unlabelled(self) -> None:
        check_layers_behind_taps(type(self).__name__, self.alpha)


class GradientAttentionTransfer(Distiller):
    """Match the gradients of the losses of student and teacher with respect to the image.

    The loss is ``CE + beta gradient_attention_loss``. It is differentiated through the student's
    gradient, so every operation of the student must be twice differentiable. If one is not, an
    error before training lists the student's operations.

    Args:
        student, teacher: networks that map images [B, C, H, W] to logits [B, K].
        beta: weight, the paper's beta: the squared distance is multiplied by ``beta / 2``.
        symmetry: compare the student's gradient with the student's gradient for the mirrored image,
            mirrored back, instead of with the teacher's gradient (section 3.2 of the paper).
        **options: the other arguments of :class:`Distiller`.
    """

    can_be_sharded = False

    def __init__(self, student: nn.Module, teacher: nn.Module | None = None, beta: float = 1.0, symmetry: bool = False, **options):
        super().__init__(student, teacher, **options)
        if not symmetry and teacher is None:
            raise ValueError("GradientAttentionTransfer needs a teacher, or symmetry=True; got neither")
        check_weights(beta=beta)
        self.beta, self.symmetry = beta, symmetry

    def losses(self, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        image, label, task = batch["image"], batch["label"], self.task
        gradient, output = _input_gradient(self.student, image, label, True, task)
        logits = self.logits_of_student(output)
        if self.symmetry:
            mirrored, _ = input_gradient(self.student, image.flip(-1), task.mirrored_label(label), create_graph=True, task=task)
            target = mirrored.flip(-1)
        else:
            target, _ = input_gradient(cast(nn.Module, self.teacher), image, label, task=task)
        attention = gradient_attention_loss(gradient, target)
        return logits, self.label_losses(logits, batch) | {"gradient": self.beta * attention}

    def check_unlabelled(self) -> None:
        raise ValueError(
            "GradientAttentionTransfer needs labels, because it differentiates the loss on the labels; the first training batch has none"
        )

    def check_method(self, image: Tensor) -> None:
        """Check that the student can be differentiated twice."""
        shape = [size for i, size in enumerate(self(image).shape) if i != 1]  # without classes
        label = torch.zeros(shape, dtype=torch.int64, device=image.device)
        try:
            gradient, _ = input_gradient(self.student, image, label, create_graph=True, task=self.task)
            # These nodes raise an error only if the backward pass reaches them.
            if any(name.endswith(("Error", "NotImplemented")) for name in _operations(gradient)):
                raise RuntimeError("an operation is marked as once differentiable")
            torch.autograd.grad(gradient.square().sum(), list(self.student.parameters()), allow_unused=True)
        except RuntimeError as error:
            operations = ", ".join(_operations(self(image.detach().requires_grad_())))
            raise RuntimeError(
                f"{type(self.student).__name__} cannot be differentiated twice: {error}. One of these operations has no double backward: {operations}"
            ) from error


def input_gradient(
    network: nn.Module, image: Tensor, label: Tensor, *, create_graph: bool = False, task: Task | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of each sample's loss with respect to its image, and the logits.

    Args:
        network: maps images to logits. Batch norm in training mode makes the loss of a sample
            depend on the other images; the gradient includes these contributions.
        image: [B, C, *spatial].
        label: [B], or labels in the format of the task.
        create_graph: whether the gradient can be differentiated.
        task: defines the loss; by default :class:`kdkernels.tasks.Classification`, whose loss is
            the cross-entropy.

    Returns:
        The gradient J [B, C, *spatial], and the logits.

    Raises:
        RuntimeError: ``create_graph`` is true, and the network cannot be differentiated twice.
    """
    task = Classification() if task is None else task
    gradient, output = _input_gradient(network, image, label, create_graph, task)
    return gradient, task.logits(output)


def _input_gradient(network: nn.Module, image: Tensor, label: Tensor, create_graph: bool, task: Task) -> tuple[Tensor, object]:
    """Return the gradient of :func:`input_gradient` and all that the network returned."""
    with torch.enable_grad():
        image = image.detach().requires_grad_()
        output = network(image)
        loss = task.label_loss(task.logits(output), {"image": image, "label": label}, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, image, create_graph=create_graph)
        if create_graph and not gradient.requires_grad:
            raise RuntimeError(f"{type(network).__name__} cannot be differentiated twice: one of its operations has no double backward")
    return gradient if create_graph else gradient.detach(), output


def gradient_attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Half of the squared distance between two input gradients, as a mean over the samples.

    :math:`\frac{1}{2B} \sum_b \|J_s - J_t\|_2^2` (Zagoruyko, Komodakis 2017, equation 4, without
    its beta).

    Args:
        student, teacher: gradients [B, C, *spatial] of the loss of each sample, see
            :func:`input_gradient`.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    return (student - teacher).square().flatten(1).sum(1).mean() / 2


def _operations(output: Tensor) -> list[str]:
    """Return the names of the nodes in the autograd graph of a tensor, without duplicates."""
    names: dict[str, None] = {}
    seen, queue = set(), [output.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names[node.name()] = None
        queue += [next_node for next_node, _ in node.next_functions]
    return list(names)
