"""Plot of the accuracy under noise in the weights, and of the gradients' sizes by depth."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..data import ImageData
from ..distill import Distiller
from .checkpoints import restore_with_images
from .drawing import picture_path, subplots, write_picture

__all__ = ["NOISE", "Robustness", "plot_robustness"]

NOISE = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)


class Robustness(NamedTuple):
    """The analyses of one checkpoint."""

    name: str  # folder of the checkpoint and method
    accuracies: list[list[float]]  # for each level of noise, one for each repetition
    gradients: dict[str, float]  # mean magnitude of the gradient of each weight tensor, from the front to the back


def plot_robustness(
    ckpt: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    noise: Sequence[float] = NOISE,
    repeats: int = 5,
) -> tuple[Path, list[Robustness]]:
    """Write a picture of two analyses of Zhang et al. (ICCV 2019, section 4) for several runs.

    Left: validation accuracy of the student after Gaussian noise has been added to its weights. The
    standard deviation of the noise is a multiple of the standard deviation of each weight tensor. A
    flat minimum of the loss is robust to noise. Right: mean magnitude of the gradient of the run's
    own loss with respect to each weight tensor of the student, for 256 validation images.

    Args:
        ckpt: checkpoints of ``kdkernels fit`` on classification, for example of BYOT, of
            DeepSupervision and of Supervised.
        out: file to write.
        noise: standard deviations of the noise, relative to those of the weights.
        repeats: number of random draws for each level of noise.

    Returns:
        The file, and the numbers of the picture.

    Raises:
        FileNotFoundError: a checkpoint does not exist.
        ValueError: a checkpoint does not contain the config of its run or is not of a
            classification, or an option is out of range.
    """
    out = picture_path(out)
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if not len(noise) or not all(0 <= level < float("inf") for level in noise):
        raise ValueError(f"noise must be a list of numbers >= 0, got {list(noise)}")
    results = []
    for path in ckpt:
        method, data = restore_with_images(path)
        if method.task.main_metric != "accuracy":
            raise ValueError(f"{os.fspath(path)!r} must be a run of a classification, its metric is {method.task.main_metric}")
        name = f"{Path(path).parent.name} ({type(method).__name__})"
        results.append(Robustness(name, noisy_accuracies(method, data, noise, repeats), gradient_sizes(method, data)))
    return write_picture(draw(results, noise), out), results


def noisy_accuracies(method: Distiller, data: ImageData, noise: Sequence[float], repeats: int) -> list[list[float]]:
    """Return the accuracy of the student for each level of noise and each repetition."""
    batches = [data.finish(batch) for batch in data.val_dataloader()]
    return [[_accuracy(method, with_noise(method.student, level, seed), batches) for seed in range(repeats if level else 1)] for level in noise]


def with_noise(network: nn.Module, level: float, seed: int) -> nn.Module:
    """Return a copy whose weight tensors, those of at least two dimensions, have Gaussian noise."""
    noisy = copy.deepcopy(network).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in (p for p in noisy.parameters() if p.dim() > 1):
            weight.add_(level * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return noisy


@torch.no_grad()
def _accuracy(method: Distiller, network: nn.Module, batches: list[dict]) -> float:
    correct = sum(int((method.task.logits(network(b["image"])).argmax(1) == b["label"]).sum()) for b in batches)
    return correct / sum(len(b["label"]) for b in batches)


def gradient_sizes(method: Distiller, data: ImageData, images: int = 256) -> dict[str, float]:
    """Return the mean magnitude of the gradient of the method's loss, by weight tensor."""
    method.train()
    split = data.splits["val"]
    batch = data.finish(split[list(range(min(images, len(cast("list", split)))))])
    method.zero_grad()
    cast(Tensor, sum(method.losses(batch)[1].values())).backward()
    return {name: float(p.grad.abs().mean()) for name, p in method.student.named_parameters() if p.dim() > 1 and p.grad is not None}


def draw(results: Sequence[Robustness], noise: Sequence[float]):
    figure, (left, right) = subplots(1, 2, figsize=(11, 4.2))
    for result in results:
        means = [100 * sum(values) / len(values) for values in result.accuracies]
        left.plot(noise, means, "o-", ms=4, label=result.name)
        left.fill_between(noise, [100 * min(v) for v in result.accuracies], [100 * max(v) for v in result.accuracies], alpha=0.15)
        right.plot(range(len(result.gradients)), list(result.gradients.values()), "o-", ms=4, label=result.name)
    left.set_xlabel("standard deviation of the noise / of the weights")
    left.set_ylabel("validation accuracy in %")
    right.set_yscale("log")
    right.set_ylabel("mean magnitude of the gradient")
    longest = max((list(r.gradients) for r in results), key=len)
    right.set_xticks(range(len(longest)), [name.removesuffix(".weight") for name in longest], rotation=60, ha="right", fontsize=7)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure


def table(results: Sequence[Robustness], noise: Sequence[float]) -> str:
    """Return the mean accuracies as a table of plain text."""
    lines = [f"{'accuracy with noise':32}" + "".join(f"{level:>8g}" for level in noise)]
    for result in results:
        lines.append(f"{result.name:32}" + "".join(f"{sum(v) / len(v):>8.4f}" for v in result.accuracies))
    return "\n".join(lines)
