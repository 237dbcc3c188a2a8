"""What a network has learned at each checkpoint of a training, compared with another training."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .concepts import (
    LearningSpeed,
    OptimizationStability,
    VisualConcepts,
    block_mask,
    bootstrap_interval,
    learning_speed,
    optimization_stability,
    suitable_images,
    visual_concepts,
)
from .pixel_entropy import pixel_entropy
from .recorder import KnowledgeRecord

__all__ = ["Training", "TrainingKnowledge", "knowledge_of_trainings", "knowledge_table"]


class Training(NamedTuple):
    """A recorded training, and its network with any weights."""

    record: KnowledgeRecord
    network: nn.Module


class TrainingKnowledge(NamedTuple):
    """What a network knew at each checkpoint."""

    epochs: list[int]
    distances: Tensor  # [M] float64, weight distance
    entropy: Tensor  # [M, N, g, g], of the kept images
    concepts: VisualConcepts
    speed: LearningSpeed
    stability: OptimizationStability


def knowledge_of_trainings(
    trainings: Mapping[str, Training],
    images: Tensor,
    mask: Tensor,
    folder: str | os.PathLike,
    *,
    grid: int = 16,
    threshold: float = 0.2,
    reference: Literal["background", "image"] = "background",
    by: Literal["epoch", "step"] = "epoch",
    filter_from: float = 0.25,
    **options: Any,
) -> tuple[dict[str, TrainingKnowledge], Tensor]:
    """Compute all metrics of Cheng et al. (CVPR 2020) for several trainings on the same images.

    An image is kept if it is suitable (:func:`suitable_images`) for all trainings at all
    checkpoints from the epoch ``filter_from`` times the last one on. The authors do so from epoch
    40 of 150 on.

    Args:
        trainings: the recorded trainings, by their names. Each is analysed at the layer of its
            record.
        images: [N, C, H, W] floats, normalised as the networks expect.
        mask: [N, H, W], > 0 in the foreground.
        folder: for the results of :func:`pixel_entropy`, a file for each training and epoch. Files
            that exist are used, so an interrupted analysis is continued.
        grid: see :func:`pixel_entropy`.
        threshold, reference: see :func:`visual_concepts`.
        by: whether the weight distance is that of the paper ("epoch") or of the authors' code
            ("step").
        filter_from: fraction of the epochs before the filter, in [0, 1].
        **options: the other options of :func:`pixel_entropy`.

    Returns:
        The results by name, and which images were kept [N] bool.

    Raises:
        ValueError: masks do not fit; weights do not fit the network; or no image is kept.
    """
    if not 0 <= filter_from <= 1:
        raise ValueError(f"filter_from must lie in [0, 1], got {filter_from}")
    if mask.shape != (len(images), *images.shape[2:]):
        raise ValueError(f"mask must have the shape {[len(images), *images.shape[2:]]} of the images, got {list(mask.shape)}")
    blocks = block_mask(mask, grid)
    entropies = {name: _entropies(name, training, images, Path(folder), grid, options) for name, training in trainings.items()}
    keep = torch.ones(len(images), dtype=torch.bool)
    for name, (record, _) in trainings.items():
        late = torch.tensor([epoch >= filter_from * record.checkpoints[-1] for epoch in record.checkpoints])
        keep &= suitable_images(entropies[name][late], blocks) & entropies[name].isfinite().flatten(2).all(2).all(0)
    if not keep.any():
        raise ValueError(
            f"none of the {len(images)} images is suitable: at some late checkpoint, the foreground of each has the larger mean entropy, or the "
            "feature does not react to noise; give more images, or another layer"
        )
    results = {}
    for name, (record, _) in trainings.items():
        entropy = entropies[name][:, keep]
        found = visual_concepts(entropy, blocks[keep], threshold=threshold, reference=reference)
        distances = torch.tensor(record.distances(by=by), dtype=torch.float64)
        results[name] = TrainingKnowledge(
            record.checkpoints,
            distances,
            entropy,
            found,
            learning_speed(found.foreground, distances),
            optimization_stability(found.concepts, blocks[keep]),
        )
    return results, keep


def knowledge_table(results: Mapping[str, TrainingKnowledge]) -> list[dict[str, Any]]:
    """Return the quantities of the paper's tables for two trainings, and their differences.

    Args:
        results: of :func:`knowledge_of_trainings`, for a student and a baseline.

    Returns:
        A dict for each quantity: its name (``quantity``), the mean over images by the name of the
        training, ``difference`` (first minus second), and ``interval``, the bootstrap interval over
        images of the paired difference, of 95 %. It is ``None`` for D_std, which is no mean over
        images.

    Raises:
        ValueError: there are not two trainings.
    """
    if len(results) != 2:
        raise ValueError(f"results must be those of two trainings, got {len(results)}")
    by_image: dict[str, dict[str, Tensor]] = {}
    for name, result in results.items():
        found = result.concepts
        by_image[name] = {
            "concepts in the foreground, N_fg": found.foreground[-1].double(),
            "concepts in the background, N_bg": found.background[-1].double(),
            "share in the foreground, lambda": found.ratio[-1],
            "weight distance at most concepts, D_mean": result.speed.distances,
            "kept concepts of the foreground, rho": result.stability.by_image[0],
            "kept concepts of all blocks": result.stability.by_image[2],
        }
    student, baseline = by_image.values()
    rows: list[dict[str, Any]] = []
    for quantity, values in student.items():
        low, high = bootstrap_interval(values - baseline[quantity])
        means = {name: float(found[quantity].mean()) for name, found in by_image.items()}
        rows.append(
            {"quantity": quantity, **means, "difference": float((values - baseline[quantity]).mean()), "interval": [round(low, 4), round(high, 4)]}
        )
        if quantity.endswith("D_mean"):
            stds = {name: result.speed.std for name, result in results.items()}
            first, second = stds.values()
            rows.append({"quantity": "its standard deviation over images, D_std", **stds, "difference": first - second, "interval": None})
    return rows


def _entropies(name: str, training: Training, images: Tensor, folder: Path, grid: int, options: dict[str, Any]) -> Tensor:
    """Return the entropies [M, N, grid, grid] of all checkpoints of a training."""
    record, network = training.record, copy.deepcopy(training.network)
    found = []
    for epoch in record.checkpoints:
        try:
            network.load_state_dict(record.weights(epoch))
        except RuntimeError as error:
            kind = type(network).__name__
            raise ValueError(
                f"the weights of epoch {epoch} in {os.fspath(record.folder)!r} are not those of this network ({kind}): {error}"
            ) from error
        result = pixel_entropy(network, record.layer, images, grid=grid, path=folder / f"{name}_epoch_{epoch}.npz", **options)
        found.append(result.entropy)
    return torch.stack(found)
