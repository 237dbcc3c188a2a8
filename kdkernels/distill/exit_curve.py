"""Accuracy and computation of a network with exits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .exit_network import ExitNetwork, is_confident

__all__ = ["CurvePoint", "exit_curve"]

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999)


class CurvePoint(NamedTuple):
    """Accuracy and cost of one way of inference."""

    name: str  # "exit 1", ..., "whole network", "ensemble", or "threshold 0.9"
    accuracy: float
    operations: float  # floating-point operations per image, a mean over the images
    shares: list[float]  # shares of the images that leave at each exit and, last, at the end


@torch.no_grad()
def exit_curve(network: ExitNetwork, batches: Iterable[dict], thresholds: Sequence[float] = THRESHOLDS) -> list[CurvePoint]:
    """Evaluate each exit, the whole network, the ensemble, and adaptive depth for each threshold.

    The predictions of :meth:`ExitNetwork.adaptive` are computed from the logits of all exits, which
    gives the same result. Batches are dicts with ``image`` and ``label`` [B].

    Raises:
        ValueError: there is no image, an image has no label, a threshold is not in [0, 1], or the
            exits return label maps.
    """
    if network.exits.label_maps:
        raise ValueError("exit_curve needs one class per image, but these exits return label maps")
    for threshold in thresholds:
        if not 0 <= threshold <= 1:
            raise ValueError(f"thresholds must lie in [0, 1], got {threshold}")
    logits, label, image = _all_logits(network, batches)  # [E + 1, N, K], [N]
    alone, adaptive = network.operations(image)
    costs = torch.tensor(adaptive, dtype=torch.float64)
    correct = logits.argmax(2) == label
    count = len(logits)
    points = []
    for i in range(count):
        name = "whole network" if i == count - 1 else f"exit {i + 1}"
        points.append(CurvePoint(name, _mean(correct[i]), float(alone[i]), [float(j == i) for j in range(count)]))
    ensemble = logits.mean(0).argmax(1) == label
    points.append(CurvePoint("ensemble", _mean(ensemble), float(costs[-1]), [0.0] * (count - 1) + [1.0]))
    for threshold in thresholds:
        confident = torch.stack([is_confident(z, threshold) for z in logits[:-1]] + [torch.ones_like(label, dtype=torch.bool)])
        first = confident.int().argmax(0)  # the first exit that is confident
        hit = correct.gather(0, first[None])[0]
        shares = torch.bincount(first, minlength=count).double() / len(label)
        points.append(CurvePoint(f"threshold {threshold:g}", _mean(hit), float(shares @ costs), shares.tolist()))
    return points


def _all_logits(network: ExitNetwork, batches: Iterable[dict]) -> tuple[Tensor, Tensor, Tensor]:
    found, labels, image = [], [], None
    for batch in batches:
        if "label" not in batch:
            raise ValueError("exit_curve needs labels, but a batch has none")
        last, exits = network.all_logits(batch["image"])
        found.append(torch.stack([*exits, last]))
        labels.append(batch["label"])
        image = batch["image"][:1]
    if image is None:
        raise ValueError("exit_curve needs at least one image, got none")
    return torch.cat(found, 1), torch.cat(labels), image


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
