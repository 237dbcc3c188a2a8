"""``kdkernels plot``: pictures of trained students and of their data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ..distill.exit_curve import THRESHOLDS
from ..plots.attention import plot_attention
from ..plots.confusion import most_frequent, plot_confusion
from ..plots.curves import plot_curves
from ..plots.curves import table as table_of_curves
from ..plots.dfnd import plot_dfnd
from ..plots.dfv import plot_dfv
from ..plots.exits import plot_exits
from ..plots.exits import table as table_of_exits
from ..plots.lanes import plot_lanes
from ..plots.robustness import NOISE, plot_robustness
from ..plots.robustness import table as table_of_robustness
from .arguments import UsageError, parse_typed

_USAGE = (
    "usage: kdkernels plot {attention,confusion,curves,dfnd,dfv,exits,lanes,robustness} --ckpt FILE [options] (curves: --runs FOLDER); "
    "kdkernels plot attention --help lists the options"
)


def main(arguments: list[str]) -> int:
    kinds = {
        "attention": _attention,
        "confusion": _confusion,
        "curves": _curves,
        "dfnd": _dfnd,
        "dfv": _dfv,
        "exits": _exits,
        "lanes": _lanes,
        "robustness": _robustness,
    }
    kind = arguments[0] if arguments else None
    if kind in ("-h", "--help"):
        print(_USAGE)
        return 0
    if kind not in kinds:
        raise UsageError(f"the first argument must be one of {{{','.join(kinds)}}}, got {kind!r}")
    parser = ArgumentParser(prog=f"kdkernels plot {kind}", exit_on_error=False, allow_abbrev=False)
    draw = kinds[kind](parser)
    parser.add_argument("--out", type=str, default=f"{kind}.png", help="file to write: .png, .svg or .pdf")
    print(draw(parse_typed(parser, arguments[1:])))
    return 0


def _add_layers(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--layers",
        type=list[str],
        default=[],
        help="layers of the student; by default the taps of the method or of its family",
    )
    parser.add_argument("--teacher_layers", type=list[str], default=[], help="layers of the teacher, one for each layer of the student")


def _attention(parser: ArgumentParser) -> Callable[[Namespace], Path | str]:
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of kdkernels fit")
    parser.add_argument("--images", type=int, default=6, help="number of images of the validation split")
    parser.add_argument("--p", type=float, default=2.0, help="exponent of the attention maps")
    _add_layers(parser)
    return lambda o: plot_attention(o.ckpt, o.out, o.layers, o.teacher_layers, o.images, o.p)


def _confusion(parser: ArgumentParser) -> Callable[[Namespace], str]:
    parser.add_argument(
        "--ckpt", type=str, nargs="+", required=True, help="checkpoints of kdkernels fit, each a matrix; two are also subtracted from each other"
    )
    parser.add_argument("--split", choices=("val", "test"), default="val", help="images of the validation split or of the test split")

    def draw(options: Namespace) -> str:
        out, results = plot_confusion(options.ckpt, options.out, options.split)
        return "\n".join([*map(most_frequent, results), str(out)])

    return draw


def _curves(parser: ArgumentParser) -> Callable[[Namespace], str]:
    parser.add_argument("--runs", type=str, nargs="+", required=True, help="folders of runs of kdkernels fit, each a line")
    parser.add_argument("--metric", type=str, help="column of the CSV logs; by default the main metric, such as val/accuracy")

    def draw(options: Namespace) -> str:
        out, metric, curves = plot_curves(options.runs, options.out, options.metric)
        return f"{table_of_curves(curves, metric)}\n{out}"

    return draw


def _dfnd(parser: ArgumentParser) -> Callable[[Namespace], str]:
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of DFND on SelectedImages")
    parser.add_argument("--images", type=int, default=40, help="number of images with the smallest and with the largest noise values, at most 100")

    def draw(options: Namespace) -> str:
        out, shares = plot_dfnd(options.ckpt, options.out, options.images)
        return f"{shares}\n{out}"

    return draw


def _dfv(parser: ArgumentParser) -> Callable[[Namespace], Path | str]:
    parser.add_argument(
        "--ckpt",
        type=str,
        nargs="+",
        required=True,
        help="checkpoints of kdkernels fit, each two rows of the picture",
    )
    parser.add_argument("--image", type=int, default=0, help="index of the image in the validation split")
    parser.add_argument("--vector", type=int, default=1, help="number of the teacher's singular vector, from 1")
    _add_layers(parser)
    return lambda o: plot_dfv(o.ckpt, o.out, o.layers, o.teacher_layers, o.image, o.vector)


def _exits(parser: ArgumentParser) -> Callable[[Namespace], str]:
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of BYOT or DeepSupervision")
    parser.add_argument("--thresholds", type=list[float], default=list(THRESHOLDS), help="confidences at which adaptive depth stops, in [0, 1]")

    def draw(options: Namespace) -> str:
        out, points = plot_exits(options.ckpt, options.out, options.thresholds)
        return f"{table_of_exits(points)}\n{out}"

    return draw


def _lanes(parser: ArgumentParser) -> Callable[[Namespace], Path | str]:
    parser.add_argument("--ckpt", type=str, nargs="+", required=True, help="checkpoints of kdkernels fit with the task Lanes, each a row per image")
    parser.add_argument("--images", type=int, default=4, help="number of images of the validation split")
    parser.add_argument("--layers", type=list[str], default=[], help="layers; by default the taps of the method or of its family")
    return lambda o: plot_lanes(o.ckpt, o.out, o.layers, o.images)


def _robustness(parser: ArgumentParser) -> Callable[[Namespace], str]:
    parser.add_argument("--ckpt", type=str, nargs="+", required=True, help="checkpoints of kdkernels fit, each a curve")
    parser.add_argument("--noise", type=list[float], default=list(NOISE), help="standard deviations of the noise, relative to those of the weights")
    parser.add_argument("--repeats", type=int, default=5, help="number of random draws for each level of noise")

    def draw(options: Namespace) -> str:
        out, results = plot_robustness(options.ckpt, options.out, options.noise, options.repeats)
        return f"{table_of_robustness(results, options.noise)}\n{out}"

    return draw
