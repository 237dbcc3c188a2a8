"""Calls the CUDA kernel of temperature_kl for long rows on its own."""

import torch
from torch import Tensor


def run_long_rows(
    teacher: Tensor, student: Tensor, grad: Tensor | None = None, *, row_temperature: Tensor | None = None, mask: Tensor | None = None,
    weight: Tensor | None = None, upstream: Tensor | None = None, scale_by_t2: bool = True, threads: int = 0, ranks: int = 0,
) -> tuple[bool, Tensor, Tensor, Tensor, int]:  # fmt: skip
    """Run the kernel on logits [B, C], whose rows have any distance, with T = 3 and weight 0.5.

    CPU tensors need testing_ops. Returns whether the kernel supports the rows, the losses, the
    gradient, the states of the rows, and the number of those that are left.
    """
    (rows, classes), device = teacher.shape, teacher.device
    grad = torch.full_like(student, torch.nan) if grad is None else grad
    loss, state = torch.full((rows,), torch.nan, device=device), torch.zeros(rows, dtype=torch.int32, device=device)
    left = torch.zeros(1, dtype=torch.int32, device=device)
    strides = [stride for x in (teacher, student, grad) for stride in (0, x.stride(0))]
    computed = torch.ops.kdkernels._temperature_kl_long_rows(
        teacher, student, grad, strides, rows, rows, classes, 3.0, row_temperature, mask, 0.5, weight, upstream, int(upstream is not None),
        scale_by_t2, loss, state, left, threads, ranks,
    )  # fmt: skip
    return computed, loss, grad, state, int(left.item())
