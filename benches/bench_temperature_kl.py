"""Times of temperature_kl against eager PyTorch, Inductor, the textbook form and a copy."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from kdkernels import reference, temperature_kl

from .suite import DEVICE, Cell, Problem, compiled, for_cells, limit_shape

T = 4.0


def textbook(student, teacher, dim):
    """Compute the loss as most distillation scripts do."""
    rows = student.numel() // student.shape[dim]
    return F.kl_div(F.log_softmax(student / T, dim), F.softmax(teacher / T, dim), reduction="sum") * T**2 / rows


def problem(shape, dim=1, dtype=torch.float32, both=False, **options) -> Problem:
    shape = limit_shape(shape, 16)
    teacher = torch.randn(shape, device=DEVICE)
    student = (teacher + 0.5 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
    teacher = teacher.to(dtype).requires_grad_(both)
    eager = partial(reference.temperature_kl, temperature=T, dim=dim, **options)
    functions: dict[str, Callable] = {"fused": partial(temperature_kl, temperature=T, dim=dim, **options), "eager": eager}
    functions["Inductor"] = compiled(lambda s, t: eager(s, t))
    if not options and not both:
        functions["textbook"] = partial(textbook, dim=dim)
        functions["Inductor textbook"] = compiled(lambda s, t: textbook(s, t, dim))
    error_inputs = (
        (student, teacher) if student.numel() <= 1 << 21 else (student[:8].detach().requires_grad_(), teacher[:8].detach().requires_grad_(both))
    )
    value = 2.0**-24 * (24 + shape[dim] ** 0.5 / 4)  # a sum over the classes, whose terms have a few rounding errors each
    gradient = 4 * value + (2.0**-8 if dtype == torch.bfloat16 else 0.0)  # the gradient is rounded to the dtype of the logits
    n = student.nbytes
    return Problem(
        functions,
        (student, teacher),
        exact=eager,
        error_inputs=error_inputs,
        tolerance={"value": value, "gradient": gradient},
        moved={"forward": 2 * n, "forward + backward": (4 if both else 3) * n},  # reads both logits, writes the gradients
    )


def cell(name, *args, seconds=3.0, main=False, **options) -> Cell:
    return Cell("temperature_kl", name, partial(problem, *args, **options), seconds, main)


CELLS = [
    cell("128 x 100", (128, 100), seconds=1.0, main=True),
    cell("1024 x 1000", (1024, 1000), main=True),
    cell("2048 x 32000", (2048, 32000), seconds=15.0, main=True),
    cell("2048 x 32000, bfloat16", (2048, 32000), dtype=torch.bfloat16, seconds=15.0),
    cell("32 x 21 x 128 x 128, dim=1", (32, 21, 128, 128), seconds=8.0, main=True),
    cell("1024 x 1000, reverse", (1024, 1000), direction="reverse"),
    cell("1024 x 1000, jsd", (1024, 1000), direction="jsd"),
    cell("1024 x 1000, cross-entropy", (1024, 1000), include_entropy=False),
    cell("1024 x 1000, both gradients", (1024, 1000), both=True),
    cell("1024 x 1000, bfloat16", (1024, 1000), dtype=torch.bfloat16),
]
GPU_CELLS = [
    cell("8192 x 32000, bfloat16", (8192, 32000), dtype=torch.bfloat16),
    cell("4096 x 128256, bfloat16", (4096, 128256), dtype=torch.bfloat16, main=True),
    cell("65536 x 1000", (65536, 1000), main=True),
]


@for_cells(CELLS + (GPU_CELLS if DEVICE == "cuda" else []))
def bench_temperature_kl(cell, direction, bench):
    bench(cell, direction)
