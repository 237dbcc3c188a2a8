"""Plots for the report of the demo: the ops at work, their times, and sample images."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import attention_pool, feature_svd, rbf_correlation
from ..data import ImageData
from ..models import TAPS
from ..models.taps import FeatureTaps
from .drawing import new_figure, subplots


def loss_times(bench: dict):
    """Plot the times of the reference and of torch.compile relative to the fused op, by op."""
    figure, axes = subplots(figsize=(8, 0.8 + 0.9 * len(bench)))
    for i, row in enumerate(bench.values()):
        for k, (contender, colour) in enumerate((("reference", "#868e96"), ("compiled", "#4c6ef5"))):
            if contender in row["ratios"]:
                bar = axes.barh(
                    i + 0.36 * k - 0.18,
                    row["ratios"][contender],
                    0.34,
                    color=colour,
                    label={"compiled": "torch.compile"}.get(contender, contender) if i == 0 else None,
                )
                axes.bar_label(bar, fmt="%.1fx", padding=3)
    axes.axvline(1, color="#e8590c", lw=1.5, label="fused")
    axes.set_yticks(range(len(bench)), list(bench))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xscale("log")
    axes.set_xlabel("time relative to the fused op, on a logarithmic scale")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def sample_images(data: ImageData):
    """Plot eight test images above the masks of their digits."""
    split: Any = data.splits["test"]  # a TensorImages: generated images are kept in memory
    images, count = split.fields, 8
    figure, axes = subplots(2, count, figsize=(9, 2.6))
    for i in range(count):
        axes[0, i].imshow(images["image"][i].permute(1, 2, 0).numpy())
        axes[0, i].set_title(str(int(images["label"][i])), fontsize=10)
        axes[1, i].imshow(images["mask"][i].numpy(), cmap="gray")
    for ax in axes.flat:
        ax.axis("off")
    return figure


@torch.no_grad()
def ops_at_work(network: nn.Module, data: ImageData, index: int = 0):
    """Plot what the ops compute from the outputs of a network for one test image.

    Softened probabilities, attention maps, spatial singular vectors, and the RBF correlation of the
    channel vectors of the last two layers.
    """
    split: Any = data.splits["test"]
    batch = split[[index]]
    taps = FeatureTaps(network.eval(), TAPS[type(network)])
    logits, features = taps(data.finish(batch)["image"])
    figure = new_figure(figsize=(10.5, 5.6))
    top, bottom = figure.subfigures(2, 1)
    left, right = top.subfigures(1, 2, width_ratios=(1, 1.5))
    axes = left.subplots()
    classes = logits.shape[1]
    for i, (temperature, colour) in enumerate(((1.0, "#868e96"), (2.0, "#4c6ef5"), (4.0, "#e8590c"))):
        shares = (logits[0] / temperature).softmax(0)
        axes.bar(torch.arange(classes) + 0.27 * (i - 1), shares, 0.27, color=colour, label=f"T = {temperature:g}")
    axes.set_xticks(range(classes))
    axes.set_xlabel("class")
    axes.set_ylabel("probability")
    axes.legend(fontsize=8)
    left.suptitle("temperature_kl: softened predictions", fontsize=10)
    panels = right.subplots(1, 1 + len(features))
    panels[0].imshow(batch["image"][0].permute(1, 2, 0))
    panels[0].set_title("image", fontsize=9)
    for ax, (name, maps) in zip(panels[1:], features.items(), strict=True):
        ax.imshow(attention_pool(maps, normalize=None)[0], cmap="inferno")
        ax.set_title(name, fontsize=9)
    right.suptitle("attention_pool: attention maps", fontsize=10)
    *_, (_, second), (last_name, last) = features.items()
    left, right = bottom.subfigures(1, 2, width_ratios=(1.5, 1))
    u, s, v = cast(tuple[Tensor, Tensor, Tensor], feature_svd(last, 3, return_u=True))
    vectors = left.subplots(1, 3)
    limit = float(u.abs().max())
    for j, ax in enumerate(vectors):
        ax.imshow(u[0, :, j].view(last.shape[2:]), cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_title(f"singular value {s[0, j]:.3g}", fontsize=9)
    left.suptitle(f"truncated_svd: spatial singular vectors of {last_name}", fontsize=10)
    axis = right.subplots()
    _, _, other = feature_svd(second, 1)
    picture = axis.imshow(rbf_correlation(other, v[..., :1])[0, :, :, 0], cmap="viridis", aspect="auto")
    axis.set_xlabel("channel of the last layer")
    axis.set_ylabel("channel of the layer before")
    right.colorbar(picture, ax=axis)
    right.suptitle("rbf_correlation: of two layers' vectors", fontsize=10)
    for ax in (*panels, *vectors):
        ax.set_xticks([])
        ax.set_yticks([])
    return figure
