"""What SVD-KD compares, over training: singular spectra, aligned vectors, and their correlations as heat maps."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.weights import describe
from ..ops.rbf_correlation import rbf_correlation
from ..ops.truncated_svd import align_singular_vectors, feature_svd
from .checkpoints import batch_of, count_images, restore_with_images, taps_of
from .drawing import picture_path, subplots, write_picture

__all__ = ["plot_dfv"]


class Layer(NamedTuple):
    """Of one image: what SVD-KD makes of a layer of student and teacher."""

    name: str
    spectra: tuple[Tensor, Tensor]  # singular values, relative to the largest
    vectors: tuple[Tensor, Tensor]  # [C] of the vector that is shown, aligned


def plot_dfv(
    ckpts: list[str | os.PathLike],
    out: str | os.PathLike,
    layers: list[str] | None = None,
    teacher_layers: list[str] | None = None,
    image: int = 0,
    vector: int = 1,
) -> Path:
    """Writes a picture: a row for each checkpoint; in it the singular spectra of each layer, its aligned vectors, and for each pair of
    neighbouring layers the correlations of the student and of the teacher and their difference.

    Args:
        ckpts: checkpoints of ``kdkernels fit`` with a teacher, in the order of the rows.
        out: file of the picture.
        layers, teacher_layers: names of layers, in order; by default the method's taps, else those of the networks' families.
        image: which image of the validation split.
        vector: which of the teacher's singular vectors, from 1.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or it does not say how method and data are made, or has no teacher; layers that are
            not there or do not fit; an image or a vector that is not there; a file name whose format is unknown.
    """
    out = picture_path(out)
    if vector < 1:
        raise ValueError(f"vector must be at least 1, got {vector}")
    rows = []
    for ckpt in ckpts:
        method, data = restore_with_images(ckpt)
        if method.teacher is None:
            raise ValueError(f"{os.fspath(ckpt)!r} was trained without a teacher; plot dfv compares a student with one")
        taps = taps_of(method, layers, teacher_layers)
        if len(taps["student"].names) < 2:
            raise ValueError(f"layers must name at least two layers, got {taps['student'].names}")
        count = count_images(data)
        if not 0 <= image < count:
            raise ValueError(f"image must be in [0, {count - 1}], the validation split, got {image}")
        _, batch = batch_of(data, [image])
        with torch.no_grad():
            student, teacher = (taps[name](batch["image"])[1] for name in ("student", "teacher"))
            rows.append((_title(ckpt), compare_layers(student, teacher, vector)))
    figure = _draw(rows, vector)
    return write_picture(figure, out)


def compare_layers(student: dict[str, Tensor], teacher: dict[str, Tensor], vector: int = 1) -> list[Layer]:
    """Spectra and aligned vectors of the first image of the features of each layer.

    Raises:
        ValueError: a pair with other channels, or fewer places or channels than ``vector``.
    """
    result = []
    for (name, s), (other, t) in zip(student.items(), teacher.items(), strict=True):
        if s.dim() < 3 or s.shape[1] != t.shape[1]:
            raise ValueError(f"layers: student {name!r} {list(s.shape)} and teacher {other!r} {list(t.shape)} need as many channels [B, C, *spatial]")
        least = min(s.shape[1], s[0, 0].numel(), t[0, 0].numel())
        if vector > least:
            raise ValueError(f"vector must be at most {least} at layer {name!r} {list(s.shape)}, got {vector}")
        s, t = s[:1].float(), t[:1].float()
        found = [feature_svd(x, min(x.shape[1], x[0, 0].numel())) for x in (s, t)]
        v, w = align_singular_vectors(found[0][2][..., : vector + 1], found[1][2][..., :vector], flip="student")
        spectrum, of_teacher = (F.normalize(sigma[0], p=torch.inf, dim=0) for _, sigma, _ in found)
        result.append(Layer(name, (spectrum, of_teacher), (v[0, :, -1], w[0, :, -1])))
    return result


def _title(ckpt: str | os.PathLike) -> str:
    epoch = describe(ckpt).get("epoch")
    return f"{Path(ckpt).parent.name}/{Path(ckpt).name}" + (f"\nafter epoch {epoch + 1}" if epoch is not None else "")


def _draw(rows: list[tuple[str, list[Layer]]], vector: int):
    layers = len(rows[0][1])
    columns = 1 + layers + 3 * (layers - 1)
    widths = [1.5] + [1.2] * layers + [1.0] * (3 * (layers - 1))
    size = (1.75 * sum(widths), 1.9 * len(rows) + 1.0)
    figure, axes = subplots(len(rows), columns, figsize=size, squeeze=False, width_ratios=widths)
    largest = max(float((a - b).abs().max()) for _, found in rows for pair in _correlations(found) for a, b in [pair]) or 1.0
    lowest = min(float(x.min()) for _, found in rows for pair in _correlations(found) for x in pair)
    for row, (title, found) in enumerate(rows):
        spectrum = axes[row, 0]
        for i, layer in enumerate(found):
            for values, style in zip(layer.spectra, ("-", "--"), strict=True):
                shown = values.clamp(min=1e-7)
                spectrum.semilogy(range(1, len(shown) + 1), shown, style, color=f"C{i}", linewidth=1.2, label=layer.name if style == "-" else None)
        spectrum.set_xscale("log")
        spectrum.set_ylim(1e-4, 1.5)
        spectrum.set_ylabel(title, fontsize=8)
        spectrum.tick_params(labelsize=7)
        for i, layer in enumerate(found, start=1):
            order = layer.vectors[1].argsort(descending=True)
            for values, style in zip(layer.vectors, ("-", "--"), strict=True):
                axes[row, i].plot(values[order], style, color=f"C{i - 1}", linewidth=1.0)
            cosine = float((layer.vectors[0] * layer.vectors[1]).sum())
            axes[row, i].set_xlabel(f"cosine {cosine:.3f}", fontsize=8)
            axes[row, i].tick_params(labelsize=7)
        for i, pair in enumerate(_correlations(found)):
            first = 1 + layers + 3 * i
            for j, (x, scale) in enumerate(zip((*pair, pair[0] - pair[1]), ((lowest, 1), (lowest, 1), (-largest, largest)), strict=True)):
                low, high = scale
                shown = axes[row, first + j].imshow(x, cmap="RdBu" if j == 2 else "viridis", vmin=low, vmax=high, aspect="auto", interpolation="none")
                axes[row, first + j].set_xticks([])
                axes[row, first + j].set_yticks([])
                if row == len(rows) - 1 and i == layers - 2 and j > 0:
                    bar = figure.colorbar(shown, ax=axes[row, 1 + layers :: 1].tolist(), orientation="horizontal", fraction=0.05, pad=0.03, aspect=60)
                    bar.ax.tick_params(labelsize=7)
                    bar.set_label("difference, student less teacher" if j == 2 else "correlation of channels", fontsize=8)
            axes[row, first + 2].set_xlabel(f"sum of squares {float((pair[0] - pair[1]).square().sum()):.2g}", fontsize=8)
            if row == 0:
                names = f"{found[i].name} x {found[i + 1].name}"
                for j, what in enumerate(("student", "teacher", "difference")):
                    axes[0, first + j].set_title(f"{what}\n{names}", fontsize=8)
    axes[0, 0].set_title("singular values, relative\n- student, -- teacher", fontsize=8)
    axes[0, 0].legend(fontsize=6)
    for i, layer in enumerate(rows[0][1], start=1):
        axes[0, i].set_title(f"{layer.name}: vector {vector}\nchannels by the teacher's", fontsize=8)
    return figure


def _correlations(found: list[Layer]) -> list[tuple[Tensor, Tensor]]:
    """Of each two neighbouring layers, student's and teacher's [C1, C2]."""
    pairs = []
    for front, back in pairwise(found):
        nets = zip(front.vectors, back.vectors, strict=True)
        student, teacher = (rbf_correlation(f[None, :, None], h[None, :, None])[0, :, :, 0] for f, h in nets)
        pairs.append((student, teacher))
    return pairs
