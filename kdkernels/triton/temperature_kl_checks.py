"""Checks of the operands of temperature_kl and temperature_kl_rescale."""

from __future__ import annotations

import torch

from ..options import Reduction
from .temperature_kl_rows import row_shape


def check_operands(student, teacher, row_temperature, mask, normalizer, dim, upstream=None, reduction=Reduction.NONE) -> None:
    """Check dtypes, shapes and devices, so that the kernels do not read memory outside the tensors.

    The public function has checked them too, but the ops can be called directly.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a dimension, shape or device does not match.
    """
    for name, x in (("student", student), ("teacher", teacher), ("temperature", row_temperature), ("grad_loss", upstream)):
        if x is not None and x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if not -student.dim() <= dim < student.dim():
        raise ValueError(f"dim must lie in [{-student.dim()}, {student.dim() - 1}], got {dim}")
    if teacher.shape != student.shape:
        raise ValueError(f"student and teacher must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if student.shape[dim] == 0:
        raise ValueError(f"student and teacher must have at least one class, got shape {tuple(student.shape)}")
    rows = row_shape(student, dim)
    for name, x, shape in (
        ("temperature", row_temperature, rows),
        ("mask", mask, rows),
        ("grad_loss", upstream, rows if reduction == Reduction.NONE else ()),
    ):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if normalizer is not None and (normalizer.numel() != 1 or normalizer.is_complex()):
        raise ValueError(f"normalizer must be one real number, got shape {tuple(normalizer.shape)} of {normalizer.dtype}")
    for name, x in (("teacher", teacher), ("temperature", row_temperature), ("mask", mask), ("normalizer", normalizer), ("grad_loss", upstream)):
        if x is not None and x.device != student.device:
            raise ValueError(f"{name} must be on {student.device}, got {x.device}")
