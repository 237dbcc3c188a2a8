"""Plot of the quantities that SVD-KD compares: singular values, aligned singular vectors and their
correlations (heat maps), for one or more checkpoints.
"""

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
    """Singular values and vectors of a layer of student and teacher, for one image."""

    name: str
    spectra: tuple[Tensor, Tensor]  # singular values of student and teacher, relative to the largest
    vectors: tuple[Tensor, Tensor]  # the aligned singular vectors [C] of student and teacher that are shown


def plot_dfv(
    ckpts: list[str | os.PathLike],
    out: str | os.PathLike,
    layers: list[str] | None = None,
    teacher_layers: list[str] | None = None,
    image: int = 0,
    vector: int = 1,
) -> Path:
    """Write a picture with a row for each checkpoint.

    A row shows the singular values and the aligned singular vectors of each layer and, for each
    pair of consecutive layers, the correlations of the student, those of the teacher, and their
    difference.

    Args:
        ckpts: checkpoints of ``kdkernels fit`` with a teacher, in the order of the rows.
        out: file to write.
        layers, teacher_layers: names of the layers, which are paired in order; by default the taps
            of the method or, if it has none, those of the network's family.
        image: index of the image in the validation split.
        vector: number of the teacher's singular vector, from 1.

    Raises:
        FileNotFoundError: a checkpoint does not exist.
        ValueError: a checkpoint does not contain the config of method and data, or has no teacher;
            a layer does not exist, or two layers do not match; ``image`` or ``vector`` is out of
            range; or the suffix of ``out`` is not a known format.
    """
    out = picture_path(out)
    if vector < 1:
        raise ValueError(f"vector must be at least 1, got {vector}")
    rows = []
    for ckpt in ckpts:
        method, data = restore_with_images(ckpt)
        if method.teacher is None:
            raise ValueError(f"{os.fspath(ckpt)!r} was trained without a teacher; plot dfv compares a student with its teacher")
        taps = taps_of(method, layers, teacher_layers)
        if len(taps["student"].names) < 2:
            raise ValueError(f"layers must name at least two layers, got {taps['student'].names}")
        count = count_images(data)
        if not 0 <= image < count:
            raise ValueError(f"image must be in [0, {count - 1}], the indices of the validation split, got {image}")
        _, batch = batch_of(data, [image])
        with torch.no_grad():
            student, teacher = (taps[name](batch["image"])[1] for name in ("student", "teacher"))
            rows.append((_title(ckpt), compare_layers(student, teacher, vector)))
    figure = _draw(rows, vector)
    return write_picture(figure, out)


def compare_layers(student: dict[str, Tensor], teacher: dict[str, Tensor], vector: int = 1) -> list[Layer]:
    """Compute singular values and aligned singular vectors of each layer, for the first image.

    Raises:
        ValueError: two paired layers have different numbers of channels, or a layer has less than
            ``vector`` spatial positions or channels.
    """
    result = []
    for (name, s), (teacher_name, t) in zip(student.items(), teacher.items(), strict=True):
        if s.dim() < 3 or s.shape[1] != t.shape[1]:
            raise ValueError(
                f"layers: features must be [B, C, *spatial] with the same C, got student {name!r} {list(s.shape)} and "
                f"teacher {teacher_name!r} {list(t.shape)}"
            )
        rank = min(s.shape[1], s[0, 0].numel(), t[0, 0].numel())
        if vector > rank:
            raise ValueError(f"vector must be at most {rank} at layer {name!r} {list(s.shape)}, got {vector}")
        s, t = s[:1].float(), t[:1].float()
        svds = [feature_svd(x, min(x.shape[1], x[0, 0].numel())) for x in (s, t)]
        v, w = align_singular_vectors(svds[0][2][..., : vector + 1], svds[1][2][..., :vector], flip="student")
        student_spectrum, teacher_spectrum = (F.normalize(sigma[0], p=torch.inf, dim=0) for _, sigma, _ in svds)
        result.append(Layer(name, (student_spectrum, teacher_spectrum), (v[0, :, -1], w[0, :, -1])))
    return result


def _title(ckpt: str | os.PathLike) -> str:
    epoch = describe(ckpt).get("epoch")
    return f"{Path(ckpt).parent.name}/{Path(ckpt).name}" + (f"\nafter epoch {epoch + 1}" if epoch is not None else "")


def _draw(rows: list[tuple[str, list[Layer]]], vector: int):
    layer_count = len(rows[0][1])
    columns = 1 + layer_count + 3 * (layer_count - 1)
    widths = [1.5] + [1.2] * layer_count + [1.0] * (3 * (layer_count - 1))
    size = (1.75 * sum(widths), 1.9 * len(rows) + 1.0)
    figure, axes = subplots(len(rows), columns, figsize=size, squeeze=False, width_ratios=widths)
    largest = max(float((a - b).abs().max()) for _, layers in rows for pair in _correlations(layers) for a, b in [pair]) or 1.0
    lowest = min(float(x.min()) for _, layers in rows for pair in _correlations(layers) for x in pair)
    for row, (title, layers) in enumerate(rows):
        spectrum = axes[row, 0]
        for i, layer in enumerate(layers):
            for values, style in zip(layer.spectra, ("-", "--"), strict=True):
                clamped = values.clamp(min=1e-7)
                spectrum.semilogy(
                    range(1, len(clamped) + 1), clamped, style, color=f"C{i}", linewidth=1.2, label=layer.name if style == "-" else None
                )
        spectrum.set_xscale("log")
        spectrum.set_ylim(1e-4, 1.5)
        spectrum.set_ylabel(title, fontsize=8)
        spectrum.tick_params(labelsize=7)
        for i, layer in enumerate(layers, start=1):
            order = layer.vectors[1].argsort(descending=True)
            for values, style in zip(layer.vectors, ("-", "--"), strict=True):
                axes[row, i].plot(values[order], style, color=f"C{i - 1}", linewidth=1.0)
            cosine = float((layer.vectors[0] * layer.vectors[1]).sum())
            axes[row, i].set_xlabel(f"cosine {cosine:.3f}", fontsize=8)
            axes[row, i].tick_params(labelsize=7)
        for i, pair in enumerate(_correlations(layers)):
            first = 1 + layer_count + 3 * i
            for j, (x, scale) in enumerate(zip((*pair, pair[0] - pair[1]), ((lowest, 1), (lowest, 1), (-largest, largest)), strict=True)):
                low, high = scale
                heat_map = axes[row, first + j].imshow(
                    x, cmap="RdBu" if j == 2 else "viridis", vmin=low, vmax=high, aspect="auto", interpolation="none"
                )
                axes[row, first + j].set_xticks([])
                axes[row, first + j].set_yticks([])
                if row == len(rows) - 1 and i == layer_count - 2 and j > 0:
                    bar = figure.colorbar(
                        heat_map, ax=axes[row, 1 + layer_count :: 1].tolist(), orientation="horizontal", fraction=0.05, pad=0.03, aspect=60
                    )
                    bar.ax.tick_params(labelsize=7)
                    bar.set_label("student minus teacher" if j == 2 else "correlation of channels", fontsize=8)
            axes[row, first + 2].set_xlabel(f"sum of squares {float((pair[0] - pair[1]).square().sum()):.2g}", fontsize=8)
            if row == 0:
                names = f"{layers[i].name} x {layers[i + 1].name}"
                for j, panel in enumerate(("student", "teacher", "difference")):
                    axes[0, first + j].set_title(f"{panel}\n{names}", fontsize=8)
    axes[0, 0].set_title("singular values, relative\n- student, -- teacher", fontsize=8)
    axes[0, 0].legend(fontsize=6)
    for i, layer in enumerate(rows[0][1], start=1):
        axes[0, i].set_title(f"{layer.name}: vector {vector}\nchannels sorted by teacher", fontsize=8)
    return figure


def _correlations(layers: list[Layer]) -> list[tuple[Tensor, Tensor]]:
    """Return the correlations [C1, C2] of consecutive layers, of student and of teacher."""
    pairs = []
    for front, back in pairwise(layers):
        vector_pairs = zip(front.vectors, back.vectors, strict=True)
        student, teacher = (rbf_correlation(v[None, :, None], w[None, :, None])[0, :, :, 0] for v, w in vector_pairs)
        pairs.append((student, teacher))
    return pairs
