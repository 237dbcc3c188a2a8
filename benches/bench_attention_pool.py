"""Times of attention_transfer_loss, attention_pool and sad_loss against eager and Inductor."""

from collections.abc import Callable
from functools import partial

import torch

from kdkernels import attention_pool, attention_transfer_loss, reference
from kdkernels.nn import sad_loss

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


def sad_problem(shape, source_shape=None) -> Problem:
    """Self attention distillation between two layers, of which the first is trained.

    The features are scaled so that the attention maps are not one-hot.
    """
    shapes = [limit_shape(s, 9) for s in (source_shape or shape, shape)]
    source, target = (torch.randn(s, device=DEVICE) / s[1] ** 0.5 for s in shapes)
    inputs = (source.requires_grad_(), target)
    functions: dict[str, Callable] = {
        "fused": lambda *x: sad_loss(x),
        "eager": lambda *x: reference.sad_loss(x),
        "Inductor": compiled(lambda *x: reference.sad_loss(x)),
    }
    error_inputs = tuple(x[:4].detach().requires_grad_(x.requires_grad) for x in inputs)
    value = 2.0**-22 * (56 + shapes[0][1] ** 0.5 / 4)  # rounding errors of a sum over the channels, and of the softmax
    moved = {"forward": source.nbytes + target.nbytes, "forward + backward": 3 * source.nbytes + target.nbytes}
    return Problem(functions, inputs, functions["eager"], error_inputs, {"value": value, "gradient": 16 * value}, None, moved)


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
CELLS += [
    Cell("attention_pool", "SAD 64 x 128 x 36 x 100", partial(sad_problem, (64, 128, 36, 100)), 4.0, True),
    Cell("attention_pool", "SAD 8 x 128 x 72 x 200", partial(sad_problem, (8, 128, 72, 200)), 4.0, True),
    Cell("attention_pool", "SAD 64 x 128 x 36 x 100 to half of the size", partial(sad_problem, (64, 128, 18, 50), (64, 128, 36, 100)), 4.0, False),
]
GPU_CELLS = [cell("128 x 512 x 56 x 56", (128, 512, 56, 56), main=True)]


@for_cells(CELLS + (GPU_CELLS if DEVICE == "cuda" else []))
def bench_attention_pool(cell, direction, bench):
    bench(cell, direction)
