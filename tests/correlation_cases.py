"""Difficult inputs of rbf_correlation and its loss, shared by the tests of all backends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class CorrelationCase:
    name: str
    shape: tuple[int, int, int, int]  # B, M, N, K
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    unit: bool = True  # columns of norm 1, as in SVD-KD
    scale: float = 1.0
    offset: float = 0.0
    distance: float = 0.1  # relative distance of student and teacher
    beta: float = 8.0
    edit: str = ""

    def shrink(self) -> CorrelationCase:
        """Return a case of the same kind that is small enough for Triton's interpreter, but still
        needs more than one block of each kernel.
        """
        batch, m, n, columns = self.shape
        return replace(self, shape=(min(batch, 2), min(m, 70), min(n, 40), min(columns, 5)))

    def make(self, device="cpu") -> list[Tensor]:
        """Return sx, sy, tx and ty."""
        generator = torch.Generator().manual_seed(0)
        batch, m, n, columns = self.shape
        inputs = []
        for size in (m, n):
            x = torch.rand(batch, size, columns, generator=generator, dtype=torch.float64)
            x = x / x.norm(dim=1, keepdim=True) if self.unit else x - 0.5
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            teacher, student = self.scale * x, self.scale * (x + self.distance * noise * x.abs().mean(1, keepdim=True))
            inputs.append((student + self.offset, teacher + self.offset))
        (sx, tx), (sy, ty) = inputs
        tensors = [sx, sy, tx, ty]
        if self.edit == "equal":
            tensors = [tx, ty, tx, ty]
        if self.edit == "constant":
            tensors = [torch.full_like(v, 0.3) for v in tensors]
        if self.edit == "zeros":
            tensors = [v * 0 for v in tensors]
        if self.edit == "one side constant":
            sx[:], tx[:] = 0.1, 0.1
        if self.edit == "outlier":
            sx[0, 0] = 100.0
        if self.edit == "columns of two kinds":
            for v in tensors:
                v[..., 1] *= 300
        if self.edit == "nan":
            sy[0, 0, 0] = float("nan")
        if self.edit == "inf":
            tx[0, -1, 0] = float("inf")
        return [_with_layout(v.to(self.dtype), self.layout).to(device) for v in tensors]


def _with_layout(x: Tensor, layout: str) -> Tensor:
    """Return the same values with another memory layout."""
    if layout == "rows":  # the layout of truncated_svd's vectors
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice":
        return torch.cat([x, x + 1], 2)[..., : x.shape[2]]
    if layout == "every other":
        return x.repeat_interleave(2, 1)[:, ::2]
    if layout == "expanded batch":
        return x[:1].expand(x.shape)
    if layout == "expanded numbers":
        return x[:, :1].expand(x.shape)
    return x


CORRELATION_CASES = [
    CorrelationCase("vectors of two layers", (3, 128, 64, 2)),
    CorrelationCase("one vector", (4, 70, 130, 1), layout="rows"),
    CorrelationCase("rows", (3, 40, 33, 3), layout="rows"),
    CorrelationCase("one pair", (2, 1, 1, 1)),
    CorrelationCase("one against many", (2, 1, 300, 2)),
    CorrelationCase("few pairs", (3, 3, 5, 2)),
    CorrelationCase("blocks of numbers", (1, 1100, 600, 1)),
    CorrelationCase("many columns", (2, 20, 25, 37)),
    CorrelationCase("student near the teacher", (3, 256, 128, 2), distance=1e-4),
    CorrelationCase("student at the teacher", (2, 256, 128, 1), distance=1e-6),
    CorrelationCase("few pairs, student near the teacher", (3, 4, 6, 2), distance=1e-4),
    CorrelationCase("other beta", (2, 64, 48, 2), beta=0.05),
    CorrelationCase("wide", (2, 90, 80, 2), unit=False, scale=3.0),
    CorrelationCase("wider", (2, 90, 300, 2), unit=False, scale=6.0, distance=1e-3),
    CorrelationCase("pair by pair", (2, 150, 140, 2), unit=False, scale=40.0),
    CorrelationCase("pair by pair, near the teacher", (2, 150, 140, 2), unit=False, scale=40.0, distance=1e-4),
    CorrelationCase("pair by pair, far", (1, 300, 60, 1), unit=False, scale=1e4),
    CorrelationCase("many pairs of one column", (1, 400, 500, 1), unit=False, scale=40.0),
    CorrelationCase("columns of two kinds", (2, 100, 90, 2), edit="columns of two kinds"),
    CorrelationCase("far from zero", (2, 64, 48, 1), offset=50.0, distance=1e-2),
    CorrelationCase("outlier", (2, 64, 48, 1), edit="outlier"),
    CorrelationCase("slice", (3, 20, 30, 2), layout="slice"),
    CorrelationCase("every other", (3, 20, 30, 2), layout="every other"),
    CorrelationCase("expanded batch", (3, 40, 30, 2), layout="expanded batch"),
    CorrelationCase("expanded numbers", (3, 20, 30, 2), layout="expanded numbers"),
    CorrelationCase("bfloat16", (3, 64, 48, 2), torch.bfloat16),
    CorrelationCase("float16", (3, 64, 48, 2), torch.float16),
    CorrelationCase("float64", (3, 64, 48, 2), torch.float64),
    CorrelationCase("float64, few pairs", (3, 5, 7, 2), torch.float64),
    CorrelationCase("float64, near the teacher", (2, 200, 100, 2), torch.float64, distance=1e-4),
    CorrelationCase("float64, pair by pair", (2, 60, 70, 2), torch.float64, unit=False, scale=40.0),
    CorrelationCase("equal", (2, 40, 30, 2), edit="equal"),
    CorrelationCase("constant", (2, 40, 30, 2), edit="constant"),
    CorrelationCase("zeros", (2, 40, 30, 2), edit="zeros"),
    CorrelationCase("one side constant", (2, 40, 30, 2), edit="one side constant"),
    CorrelationCase("NaN in one sample", (3, 40, 30, 2), edit="nan"),
    CorrelationCase("infinity in one sample", (3, 40, 30, 2), edit="inf"),
    CorrelationCase("empty batch", (0, 20, 30, 2)),
]
