"""Times of attention_transfer_loss and attention_pool against PyTorch, Inductor and a copy."""

from collections.abc import Callable
from functools import partial

import torch

from kdkernels import attention_pool, attention_transfer_loss, reference

from .suite import DEVICE, Cell, Problem, compiled, for_cells, limit_shape


def problem(shape, p=2.0, dtype=torch.float32, channels_last=False, pool=False, **options) -> Problem:
    shape = limit_shape(shape, 9)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    inputs = tuple(torch.randn(shape, device=DEVICE).to(dtype).to(memory_format=layout) for _ in range(1 if pool else 2))
    inputs[0].requires_grad_()
    fused, plain = (attention_pool, reference.attention_pool) if pool else (attention_transfer_loss, reference.attention_transfer_loss)
    eager = partial(plain, p=p, **options)
    functions: dict[str, Callable] = {"fused": partial(fused, p=p, **options), "eager": eager, "Inductor": compiled(lambda *x: eager(*x))}
    error_inputs = inputs if inputs[0].numel() <= 1 << 21 else tuple(x[:4].detach().requires_grad_(x.requires_grad) for x in inputs)
    # Rounding errors of a sum of powers over the channels, which is normalised, squared and summed.
    value = 2.0**-22 * (24 + 16 * p + shape[1] ** 0.5 / 4)
    gradient = value + (2.0**-8 if dtype == torch.bfloat16 else 0.0)  # the gradient is rounded to the dtype of the features
    n = inputs[0].nbytes
    upstream = (torch.randn(shape[0], *shape[2:], device=DEVICE),) if pool else None
    # The forward reads student and teacher (attention_pool: one input). The backward reads the
    # student again and writes its gradient.
    moved = {"forward": n, "forward + backward": 3 * n} if pool else {"forward": 2 * n, "forward + backward": 4 * n}
    return Problem(functions, inputs, eager, error_inputs, {"value": value, "gradient": 4 * gradient}, upstream, moved)


def cell(name, *args, seconds=3.0, main=False, **options) -> Cell:
    return Cell("attention_pool", name, partial(problem, *args, **options), seconds, main)


CELLS = [
    cell("128 x 64 x 32 x 32", (128, 64, 32, 32), main=True),
    cell("128 x 64 x 32 x 32, channels_last", (128, 64, 32, 32), channels_last=True),
    cell("64 x 256 x 56 x 56", (64, 256, 56, 56), seconds=8.0, main=True),
    cell("64 x 256 x 56 x 56, channels_last", (64, 256, 56, 56), channels_last=True, seconds=8.0),
    cell("128 x 256 x 8 x 8", (128, 256, 8, 8), seconds=2.0, main=True),
    cell("128 x 256 x 8 x 8, channels_last", (128, 256, 8, 8), channels_last=True, seconds=2.0),
    cell("128 x 64 x 32 x 32, bfloat16", (128, 64, 32, 32), dtype=torch.bfloat16),
    cell("128 x 64 x 32 x 32, p = 1.5", (128, 64, 32, 32), 1.5, main=True),
    cell("128 x 64 x 32 x 32, p = 2.7", (128, 64, 32, 32), 2.7),
    cell("128 x 64 x 32 x 32, maximum", (128, 64, 32, 32), reduce="max"),
    cell("1 x 256 x 128 x 128", (1, 256, 128, 128), seconds=2.0),
    cell("128 x 512 x 2 x 2", (128, 512, 2, 2), seconds=2.0),
    cell("pool 128 x 64 x 32 x 32, l2", (128, 64, 32, 32), pool=True, normalize="l2"),
    cell("pool 64 x 256 x 56 x 56", (64, 256, 56, 56), pool=True, seconds=6.0),
]
GPU_CELLS = [cell("128 x 512 x 56 x 56", (128, 512, 56, 56), main=True)]


@for_cells(CELLS + (GPU_CELLS if DEVICE == "cuda" else []))
def bench_attention_pool(cell, direction, bench):
    bench(cell, direction)
