"""Difficult matrices for the singular value decomposition, shared by the tests of all backends."""

from __future__ import annotations

import torch
from torch import Tensor


def with_singular_values(s: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """Return a float64 matrix [m, n] with the singular values s."""
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, len(s), generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, len(s), generator=g, dtype=torch.float64))
    return u @ torch.diag(s.double()) @ v.mT


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _batch(f, count: int = 3) -> Tensor:
    return torch.stack([f(seed) for seed in range(count)])


def named_matrices(m: int, n: int) -> dict[str, Tensor]:
    """Return float64 batches [3, m, n] of difficult matrices, by name."""
    p = min(m, n)
    ones = torch.ones(3, m, n, dtype=torch.float64)
    graded = 10.0 ** -torch.arange(p).double()
    cluster = torch.ones(p).double()
    cluster[p // 2 :] = 0.3
    near = cluster + 1e-7 * torch.arange(p).flip(0)
    dead = _normal(3, m, n).relu()
    dead[:, :, ::2] = 0
    bad = _normal(3, m, n)
    bad[1] *= 1e20
    return {
        "gauss": _normal(3, m, n),
        "relu": _normal(3, m, n).relu(),
        "dead channels": dead,
        "low rank": _normal(3, m, 2) @ _normal(3, 2, n, seed=1),
        "low rank and noise": _normal(3, m, 2) @ _normal(3, 2, n, seed=1) + 1e-4 * _normal(3, m, n, seed=2),
        "graded": _batch(lambda seed: with_singular_values(graded, m, n, seed)),
        "cluster": _batch(lambda seed: with_singular_values(cluster, m, n, seed)),
        "near cluster": _batch(lambda seed: with_singular_values(near, m, n, seed)),
        "zero": 0 * ones,
        "constant": -2.5 * ones,
        "rank one": _normal(3, m, 1) * _normal(3, 1, n, seed=1),
        "identity": torch.eye(m, n, dtype=torch.float64).expand(3, m, n).clone(),
        "orthogonal": _batch(lambda seed: with_singular_values(torch.ones(p), m, n, seed)),
        "diagonal": torch.eye(m, n, dtype=torch.float64) * torch.arange(1, n + 1) * torch.ones(3, 1, 1),
        "one entry": torch.nn.functional.pad(torch.full((3, 1, 1), 4.0, dtype=torch.float64), (0, n - 1, 0, m - 1)),
        "1e-30": 1e-30 * _normal(3, m, n),
        "1e30": 1e30 * _normal(3, m, n),
        "one huge": bad,
        "spread": _normal(3, m, n) * torch.logspace(-12, 12, n, dtype=torch.float64),
        "outlier": _normal(3, m, n) + 1e6 * (torch.arange(m)[:, None] == m // 2) * (torch.arange(n) == n // 3),
    }


def with_layout(x: Tensor, layout: str) -> Tensor:
    """Return x [..., m, n] with other strides: contiguous rows, contiguous columns, neither, or a
    part of a larger matrix.
    """
    if layout == "rows":
        return x.contiguous()
    if layout == "columns":
        return x.mT.contiguous().mT
    if layout == "neither":
        return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]
    assert layout == "part"
    wide = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5), 7.0, dtype=x.dtype, device=x.device)
    wide[..., 1:-2, 2:-3] = x
    return wide[..., 1:-2, 2:-3]


LAYOUTS = ("rows", "columns", "neither", "part")
# Both algorithms (direct and Krylov), wide and tall matrices, and lengths around the widths of SIMD
# vectors and tiles.
SHAPES = [(1, 1), (7, 1), (1, 9), (2, 2), (5, 3), (3, 8), (16, 16), (17, 15), (64, 16), (49, 33), (33, 66), (40, 97), (130, 115)]
