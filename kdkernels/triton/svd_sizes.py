"""What the launchers of truncated_svd's Triton kernels share: block sizes as functions of shape, and how matrices are seen."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compile_options

ILL_CONDITIONED = tl.constexpr(0.15)  # see csrc/truncated_svd/thresholds.h
SIGN_TIES = tl.constexpr(1e-4)  # the same
_MOST_NUMBERS = 1 << 11  # of p x k vectors, padded, that a program keeps in registers
_MOST_SIDE = 1024


def padded(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n))


def block_sizes(p: int, q: int, k: int, double: bool) -> dict[str, int]:
    """PB, KB: sides that hold p and k; RB: rows of a sweep over a matrix; BP, BQ: blocks of what is left of M where that is squared again."""
    pb, kb = padded(p), triton.next_power_of_2(k)
    numbers = 1024 if double else 2048  # of a tile
    return {"PB": pb, "KB": kb, "RB": max(1, min(pb, numbers // pb)), "BP": min(pb, 16 if double else 32), "BQ": 16}


def gram_sizes(p: int, double: bool) -> dict[str, int | bool]:
    """BP, BQ and the compiler's options of the kernel that squares M."""
    side = min(padded(p), 32 if double else 64)
    return {"BP": side, "BQ": 32} | compile_options(8 if side == 64 else 4)


def warps_for(p: int) -> int:
    return 4 if p <= 32 else 8


def search_sizes(double: bool) -> dict[str, int]:
    """WAYS of a division of intervals, and ROUNDS that reach the rounding of the largest eigenvalue."""
    return {"WAYS": 32, "ROUNDS": 11 if double else 6}


def precision(double: bool) -> str:
    return "ieee" if double or torch.version.hip is not None else "tf32x3"


def column_block(p: int, double: bool) -> int:
    return max(1, (2048 if double else 4096) // padded(p))


def state_size(p: int, k: int) -> int:
    return p * (p + 1) // 2 + 3 * p + 2 * k + 1


def one_batch(x: Tensor) -> tuple[Tensor, bool, tuple[int, int, int]]:
    """x as [B, M, N], whether it is tall, and the strides of a matrix, of its smaller side and of its larger side."""
    x = x.reshape(-1, *x.shape[-2:]) if x.dim() != 3 else x
    tall = x.shape[1] >= x.shape[2]
    return x, tall, (x.stride(0), x.stride(2 if tall else 1), x.stride(1 if tall else 2))


def check_fits(p: int, k: int) -> None:
    if not fits(p, k):
        raise ValueError(
            f'the implementation "triton" takes matrices whose smaller side is at most {_MOST_SIDE}, and times k, '
            f"both rounded up to powers of two, at most {_MOST_NUMBERS}; got {p} with k = {k}"
        )


def fits(p: int, k: int) -> bool:
    return p <= _MOST_SIDE and padded(p) * triton.next_power_of_2(k) <= _MOST_NUMBERS
