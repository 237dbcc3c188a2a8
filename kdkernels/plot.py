"""``kdkernels plot``: pictures of what a trained student and its teacher do. ``attention``: images beside their attention maps."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from .distill import Distiller
from .models import TAPS
from .models.taps import FeatureTaps
from .models.weights import describe, load_weights
from .ops.attention_pool import attention_pool


def main(arguments: list[str] | None = None) -> int:
    from jsonargparse import ArgumentParser

    pictures = {"attention": _attention_options, "dfv": _dfv_options}
    arguments = sys.argv[2:] if arguments is None else arguments
    what = arguments[0] if arguments else "--help"
    if what not in pictures:
        print("usage: kdkernels plot {attention,dfv} --ckpt FILE ...; kdkernels plot attention --help has the options", file=sys.stderr)
        return 0 if what in ("-h", "--help") else 2
    parser = ArgumentParser(prog=f"kdkernels plot {what}")
    parser.add_argument("--layers", type=list[str], default=[], help="layers of the student; by default the method's taps, or its family's")
    parser.add_argument("--teacher_layers", type=list[str], default=[], help="layers of the teacher, pair by pair; by default likewise")
    parser.add_argument("--out", type=str, default=f"{what}.png", help="file of the picture: .png, .svg or .pdf")
    plot = pictures[what](parser)
    options = parser.parse_args(arguments[1:])
    try:
        path = plot(options)
    except (OSError, ValueError) as error:
        print(f"kdkernels plot: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def _attention_options(parser):
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of kdkernels fit")
    parser.add_argument("--images", type=int, default=6, help="how many images of the validation split")
    parser.add_argument("--p", type=float, default=2.0, help="exponent of the maps")
    return lambda o: plot_attention(o.ckpt, o.out, o.layers, o.teacher_layers, o.images, o.p)


def _dfv_options(parser):
    from .plot_dfv import plot_dfv

    parser.add_argument("--ckpt", type=str, nargs="+", required=True, help="checkpoints of kdkernels fit, over training: a row for each")
    parser.add_argument("--image", type=int, default=0, help="which image of the validation split")
    parser.add_argument("--vector", type=int, default=1, help="which of the teacher's singular vectors")
    return lambda o: plot_dfv(o.ckpt, o.out, o.layers, o.teacher_layers, o.image, o.vector)


def plot_attention(
    ckpt: str | os.PathLike,
    out: str | os.PathLike,
    layers: list[str] | None = None,
    teacher_layers: list[str] | None = None,
    images: int = 6,
    p: float = 2.0,
) -> Path:
    """Writes a picture: a row for each image, and in it the image and for each layer the map of the student and of the teacher.

    Args:
        ckpt: checkpoint of ``kdkernels fit``.
        out: file of the picture.
        layers, teacher_layers: names of layers, pair by pair; by default the method's taps, else those of the networks' families.
        images: how many images of the validation split.
        p: exponent of the maps, means over the channels of |x|^p.

    Raises:
        FileNotFoundError, ValueError: no such checkpoint, or it does not say how method and data are made; layers that are not there; a file
            name whose format is unknown.
    """
    out = picture_path(out)
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    method, data = restore(ckpt)
    taps = taps_of(method, layers, teacher_layers)
    count = len(data.splits["val"])
    raw, batch = batch_of(data, list(range(0, count, max(1, count // images)))[:images])
    with torch.no_grad():
        found = {name: tap(batch["image"]) for name, tap in taps.items()}
    figure = _draw(raw, batch, found, p, data)
    return write_picture(figure, out)


def picture_path(out: str | os.PathLike) -> Path:
    out = Path(out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out must end in .png, .svg or .pdf, got {out.name!r}")
    return out


def write_picture(figure, out: Path) -> Path:
    """A file that is whole or not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        temporary = Path(folder) / out.name
        figure.savefig(temporary, dpi=110)
        os.replace(temporary, out)
    return out


def taps_of(method: Distiller, layers: list[str] | None, teacher_layers: list[str] | None) -> dict[str, FeatureTaps]:
    """Of the student and, if there is one, the teacher: as named, else the method's, else those of the networks' families."""
    nets = {"student": method.student.eval()} | ({"teacher": method.teacher} if method.teacher is not None else {})
    taps = {}
    for name, net in nets.items():
        given = layers if name == "student" else teacher_layers
        names = given or getattr(method, f"{name}_taps").names or TAPS.get(type(net)) or (layers if name == "teacher" else None)
        if not names:
            raise ValueError(f"layers: {type(net).__name__} is of no family whose layers are known; name them, for example --layers '[features.3]'")
        taps[name] = FeatureTaps(net, names)
    if len({len(t.names) for t in taps.values()}) > 1:
        raise ValueError(f"layers and teacher_layers must pair up, got {[t.names for t in taps.values()]}")
    return taps


def restore(ckpt: str | os.PathLike) -> tuple[Distiller, L.LightningDataModule]:
    """The method with its trained student, and its data, set up, from a checkpoint of ``kdkernels fit``."""
    config = describe(ckpt).get("config")
    if config is None:
        raise ValueError(f"{os.fspath(ckpt)!r} does not say how its method and data are made: it was not trained by `kdkernels fit`")
    from .train import instantiate

    method, data = instantiate(config)
    load_weights(method.student, ckpt)
    data.setup("validate")
    return method, data


def batch_of(data: L.LightningDataModule, images: list[int]) -> tuple[Tensor, dict]:
    """Images of the validation split to look at [N, C, H, W] in [0, 1], and the batch as the networks see it."""
    batch = data.splits["val"][images]
    raw = batch["image"]
    raw = raw / 255 if raw.dtype == torch.uint8 else (raw - raw.amin()) / (raw.amax() - raw.amin()).clamp(min=1e-12)
    return raw, data.finish(batch)


def _draw(raw: Tensor, batch: dict, found: dict, p: float, data: L.LightningDataModule):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    classes = getattr(data, "classes", None) or [str(k) for k in range(data.num_classes or int(batch["label"].max()) + 1)]
    columns = [(name, i) for i in range(len(next(iter(found.values()))[1])) for name in found]
    rows = len(raw)
    figure, axes = plt.subplots(rows, 1 + len(columns), figsize=(1.5 * (1 + len(columns)), 1.55 * rows + 0.8), squeeze=False, layout="constrained")
    for row in range(rows):
        axes[row, 0].imshow(raw[row].permute(1, 2, 0).expand(-1, -1, 3).numpy())
        axes[row, 0].set_ylabel(classes[int(batch["label"][row])], fontsize=10)
    axes[0, 0].set_title("image", fontsize=10)
    for column, (name, i) in enumerate(columns, start=1):
        logits, features = found[name]
        layer = list(features)[i]
        if features[layer].dim() != 4:
            raise ValueError(f"layers: {layer!r} of the {name} gives {tuple(features[layer].shape)}; a picture needs maps [B, C, H, W]")
        maps = attention_pool(features[layer], p)
        maps = F.interpolate(maps[:, None], raw.shape[2:], mode="nearest")[:, 0]
        axes[0, column].set_title(f"{name}\n{layer}, {features[layer].shape[1]} x {features[layer].shape[2]}²", fontsize=9)
        for row in range(rows):
            axes[row, column].imshow(raw[row].mean(0), cmap="gray", vmin=0, vmax=1)
            shown = axes[row, column].imshow(maps[row] / maps[row].amax().clamp(min=1e-30), cmap="inferno", vmin=0, vmax=1, alpha=0.75)
            if i == len(features) - 1:
                axes[row, column].set_xlabel(f"says {classes[int(logits[row].argmax())]}", fontsize=8)
    for ax in axes.flat:
        ax.set_xticks([])
        ax.set_yticks([])
    bar = figure.colorbar(shown, ax=axes, orientation="horizontal", fraction=0.02, pad=0.02, aspect=60)
    bar.set_label(f"mean over channels of |x|^{p:g}, each map relative to its largest", fontsize=9)
    return figure
