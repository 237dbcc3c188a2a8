"""Self attention distillation (Hou et al., ICCV 2019): layers learn from later layers' maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import checks
from ..ops.attention_pool import attention_pool
from .features import features_of_layers

Paths = Sequence[tuple[int, int]]


def sad_attention(
    x: Tensor,  # [B, C, H, W]
    size: tuple[int, int] | None = None,
    *,
    align_corners: bool = False,
    normalize: bool = False,
) -> Tensor:  # [B, H, W], or [B, *size]
    r"""Attention map whose values are positive and sum to 1 over all positions of a sample.

    :math:`\mathrm{softmax}(U(\sum_c x_c^2))`, where U is bilinear interpolation to ``size`` and the
    softmax is over the positions (Hou et al. 2019, section 3.1: AT-GEN).

    Sums of squares of many channels differ by hundreds, and the map is then one-hot: it has no
    gradient in nearly all samples, and a very large one in the others. ``normalize`` divides the
    sums by their mean over the positions of x first. The map then does not depend on the scale of
    x. This is not in the paper.

    Args:
        x: feature map; float64, float32, bfloat16 or float16 (computed in float32).
        size: height and width of the result; by default those of ``x``.
        align_corners: see :func:`torch.nn.functional.interpolate`. The authors' Lua code
            corresponds to ``True``.
        normalize: whether to divide the sums of squares by their mean (at least 1e-12).

    Returns:
        float64 for float64, else float32.

    Raises:
        TypeError: ``x`` is not a tensor of a supported dtype.
        ValueError: ``x`` is not of the shape [B, C, H, W], or has no position.
    """
    _check_map("x", x)
    checks.flag("align_corners", align_corners)
    checks.flag("normalize", normalize)
    if size is None:
        size = (x.shape[2], x.shape[3])
    sides = list(size) if isinstance(size, (tuple, list)) else [size]  # torch.Size is a tuple
    if len(sides) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sides):
        raise ValueError(f"size must be the height and the width of the map, two integers >= 1, got {size!r}")
    size = (size[0], size[1])
    same_size = size == tuple(x.shape[2:])
    if same_size and not normalize:
        return attention_pool(x, 2.0, reduce="sum", normalize="softmax")
    energy = attention_pool(x, 2.0, reduce="sum")[:, None]
    if normalize:
        energy = energy / energy.mean((2, 3), keepdim=True).clamp(min=1e-12)
    if not same_size:
        energy = F.interpolate(energy, size, mode="bilinear", align_corners=align_corners)
    return energy.flatten(1).softmax(1).reshape(len(x), *size)


def sad_loss(
    features: Sequence[Tensor],  # [B, C_i, H_i, W_i] each, from the front to the back
    paths: Paths | None = None,
    *,
    detach_target: bool = True,
    reduction: Literal["sum", "mean"] = "sum",
    align_corners: bool = False,
    normalize: bool = False,
) -> Tensor:
    r"""Self attention distillation: the squared distances between attention maps of layers.

    For each path from layer m to layer n:
    :math:`\frac{1}{B} \sum_b \| \Psi(A_m) - \Psi(A_n) \|_2^2` (Hou et al. 2019, equation 2), where
    :math:`\Psi` is :func:`sad_attention` at the size of layer n, and layer m learns from layer n.

    Args:
        features: feature maps of the layers.
        paths: pairs (m, n) of positions in ``features``. By default each layer learns from the next
            one: (0, 1), (1, 2), ... A path such as (0, 2) skips a layer, and (1, 0) is reversed.
        detach_target: whether the map of layer n is a constant. The paper does not say; the public
            implementations do not detach it.
        reduction: "sum" over the positions, or "mean", which divides by their number. The distance
            of two maps is at most 2, so a mean over many positions is very small.
        align_corners, normalize: see :func:`sad_attention`.

    Returns:
        0-dim, float32 or float64, without a weight (the paper's is 0.1).

    Raises:
        TypeError: ``features`` is not a list of tensors.
        ValueError: a feature map is not of the shape [B, C, H, W], batch sizes differ, a path is
            not a pair of two different positions, or an option is out of range.

    References:
        Y. Hou, Z. Ma, C. Liu, C. C. Loy. Learning Lightweight Lane Detection CNNs by Self Attention
        Distillation. ICCV 2019. https://arxiv.org/abs/1908.00821
    """
    features = features_of_layers("features", features)
    if len(features) < 2:
        raise ValueError(f"features must be those of at least two layers, got {len(features)}")
    for i, feature in enumerate(features):
        _check_map(f"features[{i}]", feature)
        if len(feature) != len(features[0]):
            raise ValueError(f"features must have the same batch size, got {[len(x) for x in features]}")
    checks.flag("detach_target", detach_target)
    checks.flag("align_corners", align_corners)
    checks.flag("normalize", normalize)
    checks.choice("reduction", reduction, ("sum", "mean"))
    maps: dict[tuple[int, tuple[int, int]], Tensor] = {}

    def attention(i: int, size: tuple[int, int]) -> Tensor:
        if (i, size) not in maps:
            maps[i, size] = sad_attention(features[i], size, align_corners=align_corners, normalize=normalize)
        return maps[i, size]

    total = torch.zeros((), dtype=torch.float64 if features[0].dtype == torch.float64 else torch.float32, device=features[0].device)
    for source, target in checked_paths(paths, len(features)):
        size = (features[target].shape[2], features[target].shape[3])
        goal = attention(target, size)
        distance = (attention(source, size) - (goal.detach() if detach_target else goal)).square().flatten(1)
        total = total + (distance.sum() / max(len(distance), 1) if reduction == "sum" else distance.mean())
    return total


def checked_paths(paths: Paths | None, count: int) -> list[tuple[int, int]]:
    """Return the paths between ``count`` layers; by default from each layer to the next one.

    Raises:
        ValueError: there is no path, or a path is not a pair of two different layers.
    """
    if paths is None:
        return [(i, i + 1) for i in range(count - 1)]
    if not isinstance(paths, (tuple, list)):
        raise ValueError(f"paths must be a list of pairs of positions, got {paths!r}")
    if not len(paths):
        raise ValueError("paths must have at least one pair of layers, got an empty list")
    for path in paths:
        is_pair = isinstance(path, (tuple, list)) and len(path) == 2 and all(isinstance(i, int) and not isinstance(i, bool) for i in path)
        if not is_pair or path[0] == path[1] or not all(0 <= i < count for i in path):
            raise ValueError(f"paths must be pairs of different positions in [0, {count - 1}], got {path!r}")
    pairs = [(source, target) for source, target in paths]
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"paths must not contain a pair twice, got {paths!r}")
    return pairs


def _check_map(name: str, x: Tensor) -> None:
    checks.tensor(name, x, "features")
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have the shape [B, C, H, W] with at least one channel and one position, got {tuple(x.shape)}")


class SADLoss(nn.Module):
    """Module of :func:`sad_loss` with fixed options.

    Example: ``0.1 * SADLoss()(features)``.

    Args:
        paths: pairs of positions; by default each layer learns from the next one.
        **options: the keyword options of :func:`sad_loss`: detach_target, reduction, align_corners,
            normalize.

    Raises:
        TypeError: an unknown option, or one of the wrong type.
        ValueError: an option is out of range.
    """

    def __init__(self, paths: Paths | None = None, **options: Any):
        super().__init__()
        if paths is not None and not (isinstance(paths, (tuple, list)) and all(isinstance(path, (tuple, list)) for path in paths)):
            raise ValueError(f"paths must be a list of pairs of positions, got {paths!r}")
        count = 2 if paths is None else 1 + max([1, *(i for path in paths for i in path if isinstance(i, int))])
        sad_loss([torch.ones(1, 1, 1, 1)] * count, paths, **options)  # validate the options
        self.paths, self.options = paths, options

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return sad_loss(features, self.paths, **self.options)

    def extra_repr(self) -> str:
        return ", ".join([f"paths={self.paths}", *(f"{name}={value!r}" for name, value in self.options.items())])
