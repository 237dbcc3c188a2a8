"""The loss and the margins of "A Comprehensive Overhaul of Feature Distillation".

B. Heo, J. Kim, S. Yun, H. Park, N. Kwak, J. Y. Choi. ICCV 2019. https://arxiv.org/abs/1904.01866
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def overhaul_margins(
    weight: Tensor,  # [C]
    bias: Tensor,  # [C]
) -> Tensor:  # [C], float32 or float64
    r"""Return for each channel the mean of the negative outputs of a batch norm.

    The outputs of channel c are taken to be normally distributed with mean b = ``bias[c]`` and
    standard deviation s = ``|weight[c]|``:

    .. math:: E[x | x < 0] = b - s \frac{\phi(b / s)}{\Phi(-b / s)}

    where :math:`\phi` and :math:`\Phi` are the density and the distribution function of the
    standard normal distribution. If at most 0.1 % of the outputs are negative, the margin is -3 s.

    Both are those of the code of Heo et al. The results are detached.

    Raises:
        ValueError: weight and bias do not have the same shape [C].
    """
    if weight.dim() != 1 or weight.shape != bias.shape:
        raise ValueError(f"weight and bias must have the same shape [C], got {tuple(weight.shape)} and {tuple(bias.shape)}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # A constant channel (weight 0) has the margin min(b, 0), the limit for small s.
    std, mean = weight.detach().to(dtype).abs().clamp(min=1e-12), bias.detach().to(dtype)
    ratio = mean / std
    negative = torch.special.ndtr(-ratio)  # fraction of negative outputs
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    return torch.where(negative > 0.001, mean - std * density / negative.clamp(min=0.001), -3 * std)


def overhaul_loss(
    student: Tensor,  # [B, C, *spatial], before the ReLU
    teacher: Tensor,  # [B, C, *spatial], before the ReLU
    margins: Tensor,  # [C]
) -> Tensor:
    r"""Squared distance of features before their ReLU, where they matter behind the ReLU.

    With the target t = max(teacher, margin), the loss is the sum of :math:`(s - t)^2` over all
    features with s > t or t > 0, as a mean over the samples. A student that is below a negative
    target has no loss there. The teacher is detached.

    Returns:
        0-dim, float32 or float64.

    Raises:
        ValueError: the shapes of student and teacher differ, or there is not one margin for each
            channel.
    """
    if student.shape != teacher.shape or student.dim() < 2:
        raise ValueError(f"student and teacher must have the same shape [B, C, ...], got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if tuple(margins.shape) != (student.shape[1],):
        raise ValueError(f"margins must have the shape ({student.shape[1]},), one for each channel, got {tuple(margins.shape)}")
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, margins = student.to(dtype), margins.to(dtype).reshape(-1, *[1] * (student.dim() - 2))
    target = torch.maximum(teacher.detach().to(dtype), margins.detach())
    return ((student - target).square() * ((student > target) | (target > 0))).sum() / max(len(student), 1)
