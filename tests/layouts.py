"""Tensors of random strides, for tests of kernels that read tensors in place."""

import random

import torch


def random_shape(rng: random.Random, dims: int, most: int = 4000, sizes=(1, 1, 2, 3, 5, 8, 9, 17, 31)) -> list[int]:
    shape = [rng.choice(sizes) for _ in range(dims)]
    while torch.Size(shape).numel() > most:
        shape[rng.randrange(dims)] = 1
    return shape


def random_layout(rng: random.Random, shape, dtype: torch.dtype, spread: float = 2.0) -> torch.Tensor:
    """Return a tensor of this shape with a random memory layout: permuted, sliced, with steps, or
    expanded. Dimensions of size 1 have arbitrary strides.
    """
    order = rng.sample(range(len(shape)), len(shape))
    expanded = [rng.random() < 0.25 for _ in shape]
    starts, steps = [rng.randint(0, 2) for _ in shape], [rng.choice((1, 1, 1, 2, 3)) for _ in shape]
    memory = [1 if expanded[d] else starts[d] + shape[d] * steps[d] for d in order]
    x = (spread * torch.randn(memory)).to(dtype).permute([order.index(d) for d in range(len(shape))])
    for d in range(len(shape)):
        if not expanded[d]:
            x = x.narrow(d, starts[d], shape[d] * steps[d])[(slice(None),) * d + (slice(None, None, steps[d]),)]
    return x.expand(shape)
