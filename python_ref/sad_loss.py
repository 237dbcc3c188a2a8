"""Self attention distillation in plain PyTorch.

Y. Hou, Z. Ma, C. Liu, C. C. Loy. Learning Lightweight Lane Detection CNNs by Self Attention
Distillation. ICCV 2019. https://arxiv.org/abs/1908.00821
"""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor

from .attention_pool import attention_pool


def sad_loss(
    features: Sequence[Tensor],  # [B, C_i, H_i, W_i] each
    paths: Sequence[tuple[int, int]] | None = None,
    *,
    detach_target: bool = True,
    reduction: str = "sum",
    align_corners: bool = False,
    normalize: bool = False,
) -> Tensor:  # 0-dim
    """Sum over paths (m, n) of the squared distance between the attention maps of layers m and n.

    See :func:`kdkernels.nn.sad_loss`.
    """

    def attention(x: Tensor, size: Sequence[int]) -> Tensor:  # [B, positions]
        energy = attention_pool(x, 2.0, reduce="sum")[:, None]
        if normalize:
            energy = energy / energy.mean((2, 3), keepdim=True).clamp(min=1e-12)
        if list(energy.shape[2:]) != list(size):
            energy = F.interpolate(energy, list(size), mode="bilinear", align_corners=align_corners)
        return energy.flatten(1).softmax(1)

    total: float | Tensor = 0.0
    for source, target in paths or [(i, i + 1) for i in range(len(features) - 1)]:
        size = features[target].shape[2:]
        goal = attention(features[target], size)
        squares = (attention(features[source], size) - (goal.detach() if detach_target else goal)).square()
        total = total + (squares.sum(1).mean() if reduction == "sum" else squares.mean())
    return cast(Tensor, total)
