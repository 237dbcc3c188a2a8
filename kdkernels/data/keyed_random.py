"""Random numbers that are a function of a key, on any device: no stream whose position would have to be kept.

An image's augmentation depends on (seed, view, sample) alone, so it is the same whatever the batch, the process, the order, and whether the
run was resumed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)  # as int64: 2^64 over the golden ratio


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts keep the sign


def _mix(z: Tensor) -> Tensor:
    """A bijection of 64 bits in which each bit of the input flips half of the outputs (variant 13 of Stafford, as in splitmix64)."""
    z = (z ^ _shift_right(z, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ _shift_right(z, 27)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ _shift_right(z, 31)


def bits(*key: int | Tensor) -> Tensor:
    """64 random bits as int64 for each element of the broadcast key (ints and int64 tensors)."""
    state = torch.zeros((), dtype=torch.int64, device=next((k.device for k in key if isinstance(k, Tensor)), None))
    for word in key:
        state = _mix((state ^ word) + _GAMMA)
    return state


def uniform(*key: int | Tensor) -> Tensor:
    """float32 in [0, 1), one for each element of the broadcast key."""
    return _shift_right(bits(*key), 40).float() * 2**-24


def normal(*key: int | Tensor) -> Tensor:
    """float32 of the standard normal distribution, one for each element of the broadcast key."""
    middle = (_shift_right(bits(*key), 41).float() + 0.5) * 2**-23  # never 0, never 1
    return torch.erfinv(2 * middle - 1) * 2**0.5


def permuted(position: Tensor, size: int, *key: int | Tensor) -> Tensor:
    """Where a random permutation of ``range(size)`` takes each position, without a table of it.

    A Feistel network permutes the next power of four; who lands beyond ``size`` goes on until he does not (Black, Rogaway 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1

    def scramble(x: Tensor) -> Tensor:
        left, right = x >> half, x & mask
        for turn in range(6):
            left, right = right, left ^ (bits(*key, turn, right) & mask)
        return left << half | right

    place = scramble(position)
    while (beyond := place >= size).any():
        place = torch.where(beyond, scramble(place), place)
    return place


@contextlib.contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Inside, the global generators of torch, numpy and random start from the key; afterwards they are as before."""
    seed = int(bits(*key)) & 0xFFFFFFFF
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - what users' transforms draw from
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
