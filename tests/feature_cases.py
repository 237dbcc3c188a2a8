"""Difficult feature maps [B, C, *spatial], shared by the tests of all backends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class FeatureCase:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    scale: float = 1.0
    edit: str = ""

    def make(self, device="cpu", seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return self.scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

        x = _edited(normal(*self.shape), self.edit)
        return _with_layout(x.to(self.dtype), self.layout).to(device)


def _edited(x: Tensor, edit: str) -> Tensor:
    if edit == "zero map":
        x[0] = 0
    elif edit == "zeros":
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0  # as after a ReLU
    elif edit == "dead channels":
        x[:, ::2] = 0
    elif edit == "ties":
        x = x.round().clamp(-2, 2)
    elif edit == "nan sample":
        x[0, 0, 0] = float("nan")
    elif edit == "inf sample":
        x[0, 0, 0] = float("inf")
    return x


def _with_layout(x: Tensor, layout: str) -> Tensor:
    """Return the same values with another memory layout."""
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "channel slice":
        return torch.cat([x, x + 1], 1)[:, : x.shape[1]]
    if layout == "channels_last slice":
        return torch.cat([x, x + 1], 1).to(memory_format=torch.channels_last)[:, : x.shape[1]]
    if layout == "space slice":
        return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded batch":
        return x[:1].expand(x.shape)
    if layout == "expanded space":
        return x[..., :1].expand(x.shape)
    return x


FEATURE_CASES = [
    FeatureCase("plain", (3, 5, 7, 7)),
    FeatureCase("one element", (1, 1, 1, 1)),
    FeatureCase("one position", (4, 33, 1, 1)),
    FeatureCase("one position, fewer channels than lanes", (6, 5, 1, 1)),
    FeatureCase("channels_last, few channels, fewer positions", (5, 7, 2, 3), layout="channels_last"),
    FeatureCase("one channel", (3, 1, 9, 9)),
    FeatureCase("fewer positions than lanes", (3, 6, 2, 3)),
    FeatureCase("whole vectors", (2, 16, 8, 8)),
    FeatureCase("many positions", (2, 19, 20, 21)),
    FeatureCase("many channels", (2, 300, 5, 5)),
    FeatureCase("larger than a tile", (1, 70, 40, 40)),
    FeatureCase("samples fewer than threads", (1, 40, 64, 64)),
    FeatureCase("sequence", (3, 8, 50)),
    FeatureCase("volume", (2, 5, 3, 4, 5)),
    FeatureCase("volume, channels_last", (2, 20, 3, 4, 5), layout="channels_last"),
    FeatureCase("channels_last", (3, 37, 7, 5), layout="channels_last"),
    FeatureCase("channels_last, few channels", (2, 3, 9, 8), layout="channels_last"),
    FeatureCase("channels_last, whole vectors", (2, 64, 6, 6), layout="channels_last"),
    FeatureCase("channels_last, samples fewer than threads", (1, 32, 60, 60), layout="channels_last"),
    FeatureCase("channel slice", (3, 8, 6, 6), layout="channel slice"),
    FeatureCase("channels_last slice", (3, 8, 6, 6), layout="channels_last slice"),
    FeatureCase("space slice", (3, 8, 6, 6), layout="space slice"),
    FeatureCase("transposed", (3, 8, 6, 5), layout="transposed"),
    FeatureCase("expanded batch", (3, 8, 6, 6), layout="expanded batch"),
    FeatureCase("expanded space", (3, 8, 6, 6), layout="expanded space"),
    FeatureCase("bfloat16", (3, 20, 7, 7), torch.bfloat16),
    FeatureCase("bfloat16, channels_last", (3, 40, 7, 7), torch.bfloat16, "channels_last"),
    FeatureCase("float16", (3, 20, 8, 8), torch.float16),
    FeatureCase("float16 whose squares overflow", (2, 8, 5, 5), torch.float16, scale=3e3),
    FeatureCase("float16 whose squares vanish", (2, 8, 5, 5), torch.float16, scale=1e-4),
    FeatureCase("float64", (2, 9, 5, 5), torch.float64),
    FeatureCase("float64, channels_last", (2, 9, 5, 5), torch.float64, "channels_last"),
    FeatureCase("tiny", (2, 9, 5, 5), scale=1e-7),
    FeatureCase("zero map", (3, 6, 5, 5), edit="zero map"),
    FeatureCase("zeros", (3, 16, 6, 6), edit="zeros"),
    FeatureCase("dead channels", (3, 6, 5, 5), edit="dead channels"),
    FeatureCase("ties", (3, 12, 6, 6), edit="ties"),
    FeatureCase("ties, channels_last", (3, 40, 6, 6), layout="channels_last", edit="ties"),
    FeatureCase("NaN in one sample", (3, 6, 5, 5), edit="nan sample"),
    FeatureCase("infinity in one sample", (3, 6, 5, 5), edit="inf sample"),
    FeatureCase("empty batch", (0, 6, 5, 5)),
]
