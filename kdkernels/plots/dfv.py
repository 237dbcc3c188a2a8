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
from .drawing import new_figure, picture_path, write_picture

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
    """Write a picture with two rows for each checkpoint.

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
    """Draw two rows for each checkpoint: spectra and vectors, and the correlations below them."""
    layer_count = len(rows[0][1])
    height = 2 if layer_count > 1 else 1
    figure = new_figure(figsize=(max(9.0, 2.0 * max(1 + layer_count, 3 * (layer_count - 1))), 1.9 * height * len(rows) + 1.2))
    grid = figure.add_gridspec(height * len(rows), 1)
    largest = max([float((a - b).abs().max()) for _, layers in rows for a, b in _correlations(layers)], default=0.0) or 1.0
    lowest = min([float(x.min()) for _, layers in rows for pair in _correlations(layers) for x in pair], default=0.0)
    shown: list = [None, None, None]  # the last image of the student, of the teacher and of the difference
    panels = []
    for row, (title, layers) in enumerate(rows):
        axes = grid[height * row].subgridspec(1, 1 + layer_count).subplots(squeeze=False)[0]
        _draw_spectra(axes[0], layers)
        axes[0].set_ylabel(title, fontsize=8)
        for i, (ax, layer) in enumerate(zip(axes[1:], layers, strict=True)):
            order = layer.vectors[1].argsort(descending=True)
            for values, style in zip(layer.vectors, ("-", "--"), strict=True):
                ax.plot(values[order], style, color=f"C{i}", linewidth=1.0)
            cosine = float((layer.vectors[0] * layer.vectors[1]).sum())
            ax.set_xlabel(f"cosine {cosine:.3f}", fontsize=8)
            ax.tick_params(labelsize=7)
            ax.set_title(f"{layer.name}: vector {vector}\nchannels sorted by teacher", fontsize=8)
        if layer_count == 1:
            continue
        axes = grid[height * row + 1].subgridspec(1, 3 * (layer_count - 1)).subplots(squeeze=False)[0]
        panels += list(axes)
        for i, pair in enumerate(_correlations(layers)):
            for j, x in enumerate((*pair, pair[0] - pair[1])):
                low, high = (-largest, largest) if j == 2 else (lowest, 1)
                ax = axes[3 * i + j]
                shown[j] = ax.imshow(x, cmap="RdBu" if j == 2 else "viridis", vmin=low, vmax=high, aspect="auto", interpolation="none")
                ax.set_xticks([])
                ax.set_yticks([])
                ax.set_title(f"{('student', 'teacher', 'difference')[j]}\n{layers[i].name} x {layers[i + 1].name}", fontsize=8)
            axes[3 * i + 2].set_xlabel(f"sum of squares {float((pair[0] - pair[1]).square().sum()):.2g}", fontsize=8)
    for image, label in zip(shown[1:], ("correlation of channels", "student minus teacher"), strict=True):
        if image is not None:
            bar = figure.colorbar(image, ax=panels, orientation="horizontal", fraction=0.05, pad=0.03, aspect=60)
            bar.ax.tick_params(labelsize=7)
            bar.set_label(label, fontsize=8)
    return figure


def _draw_spectra(ax, layers: list[Layer]) -> None:
    for i, layer in enumerate(layers):
        for values, style in zip(layer.spectra, ("-", "--"), strict=True):
            clamped = values.clamp(min=1e-7)
            ax.semilogy(range(1, len(clamped) + 1), clamped, style, color=f"C{i}", linewidth=1.2, label=layer.name if style == "-" else None)
    ax.set_xscale("log")
    ax.set_ylim(1e-4, 1.5)
    ax.tick_params(labelsize=7)
    ax.set_title("singular values, relative\n- student, -- teacher", fontsize=8)
    ax.legend(fontsize=6)


def _correlations(layers: list[Layer]) -> list[tuple[Tensor, Tensor]]:
    """Return the correlations [C1, C2] of consecutive layers, of student and of teacher."""
    pairs = []
    for front, back in pairwise(layers):
        vector_pairs = zip(front.vectors, back.vectors, strict=True)
        student, teacher = (rbf_correlation(v[None, :, None], w[None, :, None])[0, :, :, 0] for v, w in vector_pairs)
        pairs.append((student, teacher))
    return pairs
