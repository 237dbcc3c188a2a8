"""The losses of HobbitLong/RepDistiller: ``distiller_zoo``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.fsp import fsp_loss
from ..nn.svd_kd import svd_kd_terms
from ..ops import checks
from ..ops.attention_pool import attention_pool, attention_transfer_loss
from .attention_transfer import require_one_size
from .functional import kl_div_of_logits


class DistillKL(nn.Module):
    """T^2 KL of logits [B, K]: the sum, divided by B."""

    def __init__(self, T: float):
        super().__init__()
        checks.positive("T", T)
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return kl_div_of_logits(y_s, y_t, self.T, dim=1, reduction="batchmean", scale_by_t2=True)


class Attention(nn.Module):
    """Attention transfer losses of pairs of feature maps [B, C, H, W], as a list.

    The map is the mean of ``f ** p`` over the channels. If the heights differ, the larger feature
    map is averaged to the smaller one. For an odd p, ``f ** p`` has the sign of f, as in
    RepDistiller; these maps are computed by torch. The fused op takes absolute values.
    """

    def __init__(self, p: float = 2):
        super().__init__()
        checks.positive("p", p)
        self.p = p

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return [self.at_loss(f_s, f_t) for f_s, f_t in zip(g_s, g_t, strict=False)]

    def at_loss(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        s_height, t_height = f_s.shape[2], f_t.shape[2]
        if s_height > t_height:
            f_s = F.adaptive_avg_pool2d(f_s, (t_height, t_height))
        elif s_height < t_height:
            f_t = F.adaptive_avg_pool2d(f_t, (s_height, s_height))
        require_one_size(f_s, f_t)
        if self.p % 2 == 0:
            return attention_transfer_loss(f_s, f_t, self.p)
        squares = (self.at(f_s) - self.at(f_t)).square()
        return squares.sum() / max(squares.numel(), 1)

    def at(self, f: Tensor) -> Tensor:
        if self.p % 2 == 0:
            return attention_pool(f, self.p, normalize="l2").flatten(1)
        return F.normalize((f if f.dtype == torch.float64 else f.float()).pow(self.p).mean(1).flatten(1))


class FSP(nn.Module):
    """FSP losses of neighbouring layers, as a list. Maps of two sizes are averaged to the smaller.

    Args:
        s_shapes, t_shapes: shapes [B, C, H, W] of the feature maps of student and teacher.

    Raises:
        ValueError: the numbers of layers or of channels differ.
    """

    def __init__(self, s_shapes: Sequence[Sequence[int]], t_shapes: Sequence[Sequence[int]]):
        super().__init__()
        channels = [[shape[1] for shape in shapes] for shapes in (s_shapes, t_shapes)]
        if channels[0] != channels[1]:
            raise ValueError(f"s_shapes and t_shapes must have the same numbers of channels, got {channels[0]} and {channels[1]}")

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        if len(g_s) != len(g_t):
            raise ValueError(f"g_s and g_t must have the same number of feature maps, got {len(g_s)} and {len(g_t)}")
        for g in (g_s, g_t):
            for front, back in itertools.pairwise(g):
                small = min(front, back, key=lambda f: f.shape[2])
                if front.shape[2] == back.shape[2]:
                    require_one_size(front, back)
                elif small.shape[2] != small.shape[3]:
                    raise ValueError(
                        f"of two maps of different heights the smaller one must be square, as in RepDistiller, got {list(front.shape[2:])} and "
                        f"{list(back.shape[2:])}"
                    )
        pairs = [list(itertools.pairwise(g)) for g in (g_s, g_t)]
        return [fsp_loss([s], [t], variant="repdistiller") for s, t in zip(*pairs, strict=True)]


class KDSVD(nn.Module):
    """SVD-KD losses of neighbouring layers, as a list.

    RepDistiller's value depends on the signs that the SVD gives the teacher's vectors, which differ
    between libraries and devices. Here the signs are fixed by :func:`kdkernels.truncated_svd`, and
    gradients are finite for every finite input, also for maps with dead channels.

    Args:
        k: number of singular vectors; the student's are selected among k + 3.
    """

    def __init__(self, k: int = 1):
        super().__init__()
        checks.integer("k", k)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k

    def forward(self, g_s: Sequence[Tensor], g_t: Sequence[Tensor]) -> list[Tensor]:
        return svd_kd_terms(g_s, g_t, self.k, align="student", loss="mean", extra=3)[0]
