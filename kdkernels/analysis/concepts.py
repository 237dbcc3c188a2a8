"""Visual concepts: the blocks of an image that a layer keeps, and how they are learned.

X. Cheng, Z. Rao, Y. Chen, Q. Zhang. Explaining Knowledge Distillation by Quantifying the Knowledge.
CVPR 2020. M is the number of checkpoints of a training, N that of images.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..ops import checks

__all__ = [
    "LearningSpeed",
    "OptimizationStability",
    "VisualConcepts",
    "block_mask",
    "bootstrap_interval",
    "learning_speed",
    "optimization_stability",
    "suitable_images",
    "visual_concepts",
    "weight_distance",
]


class VisualConcepts(NamedTuple):
    """The concepts of images, for each checkpoint; without the dimension M for one checkpoint."""

    concepts: Tensor  # [M, N, g, g] bool
    foreground: Tensor  # [M, N] int64, number of concepts in the foreground, N_fg
    background: Tensor  # [M, N] int64, N_bg
    ratio: Tensor  # [M, N] float64, N_fg / (N_fg + N_bg), 0 without concepts; its mean is the paper's lambda


class LearningSpeed(NamedTuple):
    """How far the weights have moved when most concepts of the foreground are learned."""

    mean: float  # D_mean
    std: float  # D_std, the population standard deviation over the images
    variance: float  # its square, which the paper and the authors' code call D_std
    distances: Tensor  # [N] float64, of each image
    checkpoints: Tensor  # [N] int64, the first one with the most concepts of the foreground, from 0


class OptimizationStability(NamedTuple):
    """The share of all concepts that appeared during training which the last checkpoint keeps."""

    foreground: float  # rho
    background: float
    all: float
    by_image: Tensor  # [3, N] float64, of foreground, background and all


def block_mask(mask: Tensor, grid: int) -> Tensor:  # [N, H, W] -> [N, grid, grid] bool
    """Return which blocks belong to the foreground: those whose first pixel does.

    This is nearest-neighbour downsampling, as in the authors' code, if the grid divides H and W.
    Otherwise nearest-neighbour downsampling takes some pixels from the block before; here each
    pixel is one of the block to which :func:`pixel_entropy` adds the noise.

    Args:
        mask: bool or numbers; the foreground is where they are > 0.
        grid: number of blocks along each side.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``mask`` is not of the shape [N, H, W], is smaller than the grid, or has NaN.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    checks.integer("grid", grid)
    if mask.dim() != 3:
        raise ValueError(f"mask must have the shape [N, H, W], got {list(mask.shape)}")
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    if mask.is_floating_point() and mask.isnan().any():
        raise ValueError("mask must not have NaN")
    if min(mask.shape[1:]) < grid:
        raise ValueError(f"grid must be at most the height and the width of the masks, {list(mask.shape[1:])}, got {grid}")
    # Pixel p belongs to block p * grid // size: block i begins at i * size / grid, rounded up.
    rows, columns = (-(-torch.arange(grid, device=mask.device) * size // grid) for size in mask.shape[1:])
    return (mask > 0)[:, rows][:, :, columns]


def visual_concepts(
    entropy: Tensor,  # [N, g, g] or [M, N, g, g]
    mask: Tensor,  # [N, g, g], or [N, H, W]
    *,
    threshold: float = 0.2,
    reference: Literal["background", "image"] = "background",
) -> VisualConcepts:
    r"""Find the blocks whose entropy is smaller than the average by more than ``threshold``.

    The average :math:`\bar H` of a checkpoint is the mean entropy of the blocks of the background
    ("background", as in the authors' code) or of all blocks ("image"), first over the blocks of an
    image, then over the images. Block i is a concept if :math:`\bar H - H_i` > ``threshold``.

    Args:
        entropy: of :func:`pixel_entropy`, for one or several checkpoints.
        mask: > 0 in the foreground; blocks, or pixels (:func:`block_mask`).
        threshold: b, in nats; 0.2 means that sigma is smaller by a factor of 1.22.
        reference: the blocks of which the average is taken.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes do not fit; an image has no foreground, or the average needs a background
            and an image has none; or an entropy is not finite.
    """
    checks.choice("reference", reference, ("background", "image"))
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number, got {threshold!r}")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}")
    foreground = _foreground(entropy, mask)
    values = entropy.double()
    bad = (~values.isfinite()).flatten(2).any(2).any(0) if values.dim() == 4 else (~values.isfinite()).flatten(1).any(1)
    if bad.any():
        raise ValueError(f"entropy must be finite, but that of the images {_indices(bad)} is not: leave out the images that pixel_entropy rejected")
    if reference == "background":
        _require("background", ~foreground)
        weights = (~foreground).double()
    else:
        weights = torch.ones_like(foreground, dtype=torch.float64)
    by_image = (values * weights).sum((-2, -1)) / weights.sum((-2, -1))  # [M, N]
    concepts = by_image.mean(-1)[..., None, None, None] - values > threshold
    in_foreground = (concepts & foreground).sum((-2, -1))
    in_background = (concepts & ~foreground).sum((-2, -1))
    ratio = in_foreground.double() / (in_foreground + in_background).clamp(min=1)
    return VisualConcepts(concepts, in_foreground, in_background, ratio)


def suitable_images(entropy: Tensor, mask: Tensor) -> Tensor:  # [N] bool
    """Return which images the paper keeps.

    An image is kept if its entropies are finite and, at every given checkpoint, the mean entropy of
    the background is at least that of the foreground. The authors give the checkpoints from epoch
    40 on, and keep the images that are suitable for both networks.

    Args:
        entropy: [N, g, g] or [M, N, g, g].
        mask: as for :func:`visual_concepts`.

    Raises:
        ValueError: shapes do not fit, or an image has no foreground or no background.
    """
    foreground = _foreground(entropy, mask)
    _require("background", ~foreground)
    values = entropy.double() if entropy.dim() == 4 else entropy.double()[None]

    def mean(part: Tensor) -> Tensor:
        return (values * part).sum((2, 3)) / part.sum((1, 2))

    # A comparison with NaN is false.
    return (mean(~foreground) >= mean(foreground)).all(0) & values.isfinite().flatten(2).all(2).all(0)


def weight_distance(weights: Sequence[Tensor]) -> Tensor:  # M + 1 tensors of one shape -> [M] float64
    r"""Length of the path of weights, relative to their first norm.

    Element m - 1 is :math:`\sum_{k=1}^m \| w_k - w_{k-1} \| / \| w_0 \|`. The paper takes the
    weights after each epoch. The authors' code takes them after each step, which gives a longer
    path. :class:`KnowledgeRecorder` records both.

    Args:
        weights: w_0, w_1, ..., w_M of a layer, real or complex.

    Raises:
        TypeError: the weights are no list of tensors.
        ValueError: there are fewer than two weights, their shapes differ, one is not finite, or w_0
            is zero.
    """
    if not isinstance(weights, Sequence) or not all(isinstance(w, Tensor) for w in weights):
        raise TypeError(f"weights must be a list of tensors, got {checks.kind(weights)}")
    if len(weights) < 2:
        raise ValueError(f"weights must be at least two tensors, got {len(weights)}")
    shapes = sorted({tuple(w.shape) for w in weights})
    if len(shapes) > 1:
        raise ValueError(f"weights must have one shape, got {shapes}")
    values = [w.detach().to(torch.complex128 if w.is_complex() else torch.float64) for w in weights]
    if not all(bool(w.isfinite().all()) for w in values):
        raise ValueError("weights must be finite")
    first = values[0].norm()
    if not first > 0:
        raise ValueError("the first of the weights must not be zero, because the distance is relative to its norm")
    return torch.stack([(b - a).norm() for a, b in itertools.pairwise(values)]).cumsum(0) / first


def learning_speed(foreground: Tensor, distances: Tensor | Sequence[float]) -> LearningSpeed:
    """Return how far the weights have moved when most concepts of the foreground are learned.

    For each image, this is the weight distance at the first checkpoint with the largest number of
    concepts in the foreground. A small mean says that concepts are learned early, a small
    deviation that they are learned at the same time. For an image that never has a concept, this
    is the first checkpoint.

    Args:
        foreground: [M, N], N_fg of :func:`visual_concepts`.
        distances: [M], the weight distance at each of these checkpoints.

    Raises:
        TypeError: ``foreground`` is not a tensor.
        ValueError: shapes do not fit, or a number is not finite.
    """
    if not isinstance(foreground, Tensor):
        raise TypeError(f"foreground must be a tensor, got {checks.kind(foreground)}")
    path = torch.as_tensor(distances, dtype=torch.float64).detach()
    if foreground.dim() != 2 or not foreground.numel():
        raise ValueError(f"foreground must have the shape [M, N] with at least one image and checkpoint, got {list(foreground.shape)}")
    if not (foreground.isfinite().all() and path.isfinite().all()):
        raise ValueError("foreground and distances must be finite")
    if path.shape != foreground.shape[:1]:
        raise ValueError(f"distances must have the shape [{len(foreground)}], one for each checkpoint, got {list(path.shape)}")
    best = foreground.double().argmax(0)  # the first of equal ones
    found = path.to(best.device)[best]
    variance = float(found.var(correction=0))
    return LearningSpeed(float(found.mean()), variance**0.5, variance, found, best)


def optimization_stability(concepts: Tensor, mask: Tensor) -> OptimizationStability:
    r"""Return the share of the concepts of all checkpoints that the last checkpoint keeps.

    For an image, :math:`\rho = |S_M \cap \Lambda| / |\bigcup_j S_j \cap \Lambda|` with the concepts
    S_j and the blocks Lambda of the foreground; 0 if there were none. The result is the mean over
    the images. A large rho says that the optimization makes few detours.

    Args:
        concepts: [M, N, g, g] bool, of :func:`visual_concepts`.
        mask: as for :func:`visual_concepts`.

    Raises:
        TypeError: ``concepts`` is not bool.
        ValueError: shapes do not fit, or an image has no foreground.
    """
    if not isinstance(concepts, Tensor) or concepts.dtype != torch.bool:
        raise TypeError(f"concepts must be a tensor of bool, as visual_concepts(...).concepts, got {checks.kind(concepts)}")
    if concepts.dim() != 4 or not concepts.numel():
        raise ValueError(f"concepts must have the shape [M, N, g, g], got {list(concepts.shape)}")
    foreground = _foreground(concepts, mask)
    shares = []
    for part in (foreground, ~foreground, torch.ones_like(foreground)):
        kept, seen = ((blocks & part).sum((1, 2)).double() for blocks in (concepts[-1], concepts.any(0)))
        shares.append(kept / seen.clamp(min=1))
    by_image = torch.stack(shares)
    foreground_share, background_share, share = by_image.mean(1).tolist()
    return OptimizationStability(foreground_share, background_share, share, by_image)


def bootstrap_interval(values: Tensor, *, confidence: float = 0.95, samples: int = 10000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean over images, by resampling the images with replacement.

    Args:
        values: [N], one for each image; differences of two networks for a paired comparison.
        confidence: in (0, 1).
        samples: number of resamples.
        seed: seed of the resamples.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``values`` is not of the shape [N] with N >= 1, or not finite; or an option is
            out of range.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a tensor, got {checks.kind(values)}")
    for name, value in (("samples", samples), ("seed", seed)):
        checks.integer(name, value)
    if values.dim() != 1 or not len(values):
        raise ValueError(f"values must have the shape [N] with N >= 1, got {list(values.shape)}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    if samples < 1 or not 0 <= seed < 2**63:
        raise ValueError(f"samples must be at least 1 and seed in [0, 2**63), got {samples} and {seed}")
    if not values.isfinite().all():
        raise ValueError("values must be finite")
    generator = torch.Generator().manual_seed(seed)
    data = values.detach().double().cpu()
    at_once = max(1, 2**20 // len(data))  # resamples, for a bounded memory
    parts = [min(at_once, samples - first) for first in range(0, samples, at_once)]
    means = torch.cat([data[torch.randint(len(data), (part, len(data)), generator=generator)].mean(1) for part in parts])
    tail = (1 - confidence) / 2
    low, high = means.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _foreground(blocks: Tensor, mask: Tensor) -> Tensor:
    """Return the mask of the foreground's blocks [N, g, g] bool, after checks."""
    if not isinstance(blocks, Tensor) or blocks.dim() not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        got = list(blocks.shape) if isinstance(blocks, Tensor) else type(blocks).__name__
        raise ValueError(f"entropy and concepts must have the shape [N, g, g] or [M, N, g, g], got {got}")
    if not blocks.numel():
        raise ValueError(f"entropy and concepts must have at least one checkpoint, image and block, got {list(blocks.shape)}")
    count, grid = blocks.shape[-3], blocks.shape[-1]
    if not isinstance(mask, Tensor) or mask.dim() != 3 or len(mask) != count:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must have the shape [{count}, {grid}, {grid}], or [{count}, H, W] of pixels, for these images, got {got}")
    foreground = mask > 0 if mask.shape[1:] == (grid, grid) else block_mask(mask, grid)
    _require("foreground", foreground)
    return foreground.to(blocks.device)


def _require(name: str, blocks: Tensor) -> None:
    empty = ~blocks.flatten(1).any(1)
    if empty.any():
        raise ValueError(f"mask: the images {_indices(empty)} have no block of the {name}")


def _indices(chosen: Tensor) -> str:
    found = chosen.nonzero()[:, 0].tolist()
    return ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
