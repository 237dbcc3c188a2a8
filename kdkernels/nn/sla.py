"""Self-supervised label augmentation, SLA (Lee, Hwang, Shin, ICML 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from ..ops.registration import clone_inference_tensor
from ..ops.temperature_kl import temperature_kl
from .features import check_labels, cross_entropy
from .loss_module import LossModule


def four_rotations(
    images: Tensor,  # [B, C, H, H]
) -> Tensor:  # [4 B, C, H, H]
    """Rotate each image by 0, 90, 180 and 270 degrees counterclockwise.

    Row 4 b + k is image b, rotated k times by 90 degrees.

    Raises:
        ValueError: the images are not square.
    """
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[2] != images.shape[3]:
        given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be square [B, C, H, H], because they are rotated by 90 degrees, got {given}")
    return torch.stack([images.rot90(k, (2, 3)) for k in range(4)], 1).flatten(0, 1)


def joint_labels(
    labels: Tensor,  # [B] int64, or probabilities [B, K]
) -> Tensor:  # [4 B] int64, or probabilities [4 B, 4 K]
    """Return the labels of rotated images: 4 y + k for class y and k rotations by 90 degrees.

    The rows are in the order of :func:`four_rotations`. The label -100, which
    ``F.cross_entropy`` ignores, stays -100.
    """
    rotation = torch.arange(4, device=labels.device)
    if not labels.is_floating_point():
        labels = labels.long()[:, None]  # 4 y + k may not fit into a smaller type
        return torch.where(labels == -100, -100, 4 * labels + rotation).flatten()
    is_rotation = torch.eye(4, dtype=labels.dtype, device=labels.device)
    return (labels[:, None, :, None] * is_rotation[:, None]).flatten(2).flatten(0, 1)


def aggregate_rotations(
    joint: Tensor,  # [4 B, 4 K]
) -> Tensor:  # [B, K]
    """Return the aggregated logits of the images: the mean over the rotations k of the logits of
    (class c, rotation k) for the image rotated k times.

    Returns:
        float32 or float64.

    Raises:
        ValueError: a dimension of the logits is not a multiple of 4.
    """
    if joint.dim() != 2 or joint.shape[0] % 4 or joint.shape[1] % 4:
        raise ValueError(f"joint logits must have the shape [4 B, 4 K], got {tuple(joint.shape)}")
    batch, classes = joint.shape[0] // 4, joint.shape[1] // 4
    of_own_rotation = joint.reshape(batch, 4, classes, 4).diagonal(dim1=1, dim2=3)  # [B, K, 4]
    return of_own_rotation.mean(-1, dtype=torch.promote_types(joint.dtype, torch.float32))


def sla_loss(
    logits: Tensor,  # [B, K]
    joint: Tensor,  # [4 B, 4 K]
    labels: Tensor,  # [B] int64, or probabilities [B, K]
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    r"""Loss of self-supervised label augmentation with self-distillation (SLA+SD).

    A second classifier predicts class and rotation of rotated images, 4 K joint classes. The mean
    of its predictions over the four rotations is the teacher of the network's own classifier:

    .. math:: CE(z, y) + CE(o, 4 y + k) + \alpha T^2 KL(p_a \| p)

    where z are the logits of the images, o the joint logits of the rotated images, and p_a the
    softened predictions of the aggregated logits (:func:`aggregate_rotations`), which are detached.

    Args:
        logits: of the images that are not rotated.
        joint: of the rotated images, in the order of :func:`four_rotations`.
        labels: class indices, or probabilities.
        temperature: T > 0.
        alpha: weight of T^2 KL. With 0, the second classifier is only an auxiliary task.

    Returns:
        0-dim, float32 or float64.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit, or an option is out of range.

    References:
        H. Lee, S. J. Hwang, J. Shin. Self-supervised Label Augmentation via Input Transformations.
        ICML 2020. https://arxiv.org/abs/1910.05872
    """
    checks.positive("temperature", temperature)
    checks.not_negative("alpha", alpha)
    checks.tensor("logits", logits, "logits")
    checks.tensor("joint", joint, "logits")
    if logits.dim() != 2 or joint.shape != (4 * logits.shape[0], 4 * logits.shape[1]):
        raise ValueError(f"logits must have the shape [B, K], and joint [4 B, 4 K], got {tuple(logits.shape)} and {tuple(joint.shape)}")
    check_labels(labels, "logits", logits, 1)
    labels = clone_inference_tensor(labels)
    total = cross_entropy(logits, labels) + cross_entropy(joint, joint_labels(labels))
    if alpha:
        total = total + alpha * temperature_kl(logits, aggregate_rotations(joint).detach(), temperature)
    return total


class SLALoss(LossModule):
    """Module of :func:`sla_loss` with fixed options.

    Example: ``SLALoss(temperature=4.0)(logits, joint_logits, labels)``.

    Args:
        **options: the keyword options of :func:`sla_loss`: temperature, alpha.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        sla_loss(torch.zeros(1, 1), torch.zeros(4, 4), torch.zeros(1, dtype=torch.int64), **options)  # validate the options

    def forward(self, logits: Tensor, joint: Tensor, labels: Tensor) -> Tensor:
        return sla_loss(logits, joint, labels, **self.options)
