"""Random numbers that are computed from a key, on any device, without a generator state.

The augmentation of an image depends only on (seed, view, sample). It therefore does not depend on
the batch, the process or the order of the samples, or on whether the run was resumed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 divided by the golden ratio, as int64


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # the mask clears the sign bits, which an int64 shift copies


def _mix(z: Tensor) -> Tensor:
    """Apply a bijection of 64-bit integers (variant 13 of Stafford, as in splitmix64).

    Flipping a bit of the input flips each bit of the output with a probability close to 1/2.
    """
    z = (z ^ _shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shift_right(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shift_right(z, 31)


def bits(*key: int | Tensor) -> Tensor:
    """Return 64 random bits as int64 for each element of the broadcast key (int64 or int)."""
    state = torch.zeros((), dtype=torch.int64, device=next((k.device for k in key if isinstance(k, Tensor)), None))
    for word in key:
        state = _mix((state ^ word) + _GAMMA)
    return state


def uniform(*key: int | Tensor) -> Tensor:
    """Return a uniform float32 in [0, 1) for each element of the broadcast key."""
    return _shift_right(bits(*key), 40).float() * 2**-24


def normal(*key: int | Tensor) -> Tensor:
    """Return a standard normal float32 for each element of the broadcast key."""
    probability = (_shift_right(bits(*key), 41).float() + 0.5) * 2**-23  # in the open interval (0, 1)
    return torch.erfinv(2 * probability - 1) * 2**0.5


def permuted(position: Tensor, size: int, *key: int | Tensor) -> Tensor:
    """Apply a random permutation of ``range(size)`` to ``position``, without storing it.

    A Feistel network permutes the range up to the next power of four. Results that are not less
    than ``size`` are permuted again until they are ("cycle walking"; Black, Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1

    def scramble(x: Tensor) -> Tensor:
        left, right = x >> half, x & mask
        for round_ in range(6):
            left, right = right, left ^ (bits(*key, round_, right) & mask)
        return left << half | right

    permuted_position = scramble(position)
    while (outside := permuted_position >= size).any():
        permuted_position = torch.where(outside, scramble(permuted_position), permuted_position)
    return permuted_position


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and random by the key; restore them on exit."""
    seed = int(bits(*key)) & 0xFFFFFFFF
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - users' transforms use this generator
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
