"""Block sizes, limits and matrix layouts for the launchers of truncated_svd's Triton kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import compile_options

ILL_CONDITIONED = tl.constexpr(0.15)  # kIllConditioned in csrc/truncated_svd/thresholds.h
TINY_SOLVE_PIVOT = tl.constexpr(1e-20)  # kTinySolvePivot in csrc/truncated_svd/thresholds.h
SIGN_TIES = tl.constexpr(1e-4)  # kSignTies in csrc/truncated_svd/thresholds.h
_MAX_ELEMENTS = 1 << 11  # largest padded p x k of the vectors that a program keeps in registers
_MAX_SIDE = 1024


def padded(n: int, minimum: int = 16) -> int:
    return max(minimum, triton.next_power_of_2(n))


def block_sizes(p: int, q: int, k: int, double: bool) -> dict[str, int]:
    """Return the block sizes of the kernels that process one matrix per program.

    PB and KB are p and k, padded. RB is the number of rows read at a time from a [p, p] matrix. BP
    and BQ are the block sizes of the Gram matrix of the residual.
    """
    pb, kb = padded(p), triton.next_power_of_2(k)
    elements = 1024 if double else 2048  # elements of a tile
    return {"PB": pb, "KB": kb, "RB": max(1, min(pb, elements // pb)), "BP": min(pb, 16 if double else 32), "BQ": 16}


def gram_sizes(p: int, double: bool) -> dict[str, int | bool]:
    """Return BP, BQ and the compiler options of the kernel that computes the Gram matrix of M."""
    side = min(padded(p), 32 if double else 64)
    return {"BP": side, "BQ": 32} | compile_options(8 if side == 64 else 4)


def warps_for(p: int) -> int:
    return 4 if p <= 32 else 8


def search_sizes(double: bool) -> dict[str, int]:
    """Return PARTS and ROUNDS of the search for eigenvalues.

    Each round divides an interval at PARTS points. ROUNDS rounds reduce it to the rounding of the
    largest eigenvalue.
    """
    return {"PARTS": 32, "ROUNDS": 11 if double else 6}


def precision(double: bool) -> str:
    return "ieee" if double or torch.version.hip is not None else "tf32x3"


def column_block(p: int, double: bool) -> int:
    return max(1, (2048 if double else 4096) // padded(p))


def state_size(p: int, k: int) -> int:
    return p * (p + 1) // 2 + 3 * p + 2 * k + 1


def one_batch(x: Tensor) -> tuple[Tensor, bool, tuple[int, int, int]]:
    """View matrices as one batch [B, M, N].

    Returns:
        The batch, whether M >= N, and the strides of the batch, of the smaller side and of the
        larger side.
    """
    x = x.reshape(-1, *x.shape[-2:]) if x.dim() != 3 else x
    tall = x.shape[1] >= x.shape[2]
    return x, tall, (x.stride(0), x.stride(2 if tall else 1), x.stride(1 if tall else 2))


def check_fits(p: int, k: int) -> None:
    if not fits(p, k):
        raise ValueError(
            f'the implementation "triton" takes matrices whose smaller side is at most {_MAX_SIDE}, and for which the product of '
            f"this side and k, both rounded up to powers of two, is at most {_MAX_ELEMENTS}; got smaller side {p} and k = {k}"
        )


def fits(p: int, k: int) -> bool:
    return p <= _MAX_SIDE and padded(p) * triton.next_power_of_2(k) <= _MAX_ELEMENTS
