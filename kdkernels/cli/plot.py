"""``kdkernels plot attention|dfv``: plots of the features of a trained student and its teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ..plots.attention import plot_attention
from ..plots.dfv import plot_dfv
from .arguments import UsageError, parse_typed

_USAGE = "usage: kdkernels plot {attention,dfv} --ckpt FILE [options]; kdkernels plot attention --help lists the options"


def main(arguments: list[str]) -> int:
    kinds = {"attention": _attention, "dfv": _dfv}
    kind = arguments[0] if arguments else None
    if kind in ("-h", "--help"):
        print(_USAGE)
        return 0
    if kind not in kinds:
        raise UsageError(f"the first argument must be one of {{attention,dfv}}, got {kind!r}")
    parser = ArgumentParser(prog=f"kdkernels plot {kind}", exit_on_error=False, allow_abbrev=False)
    draw = kinds[kind](parser)
    parser.add_argument("--out", type=str, default=f"{kind}.png", help="file to write: .png, .svg or .pdf")
    parser.add_argument(
        "--layers",
        type=list[str],
        default=[],
        help="layers of the student; by default the taps of the method or of its family",
    )
    parser.add_argument("--teacher_layers", type=list[str], default=[], help="layers of the teacher, one for each layer of the student")
    print(draw(parse_typed(parser, arguments[1:])))
    return 0


def _attention(parser: ArgumentParser) -> Callable[[Namespace], Path]:
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of kdkernels fit")
    parser.add_argument("--images", type=int, default=6, help="number of images of the validation split")
    parser.add_argument("--p", type=float, default=2.0, help="exponent of the attention maps")
    return lambda o: plot_attention(o.ckpt, o.out, o.layers, o.teacher_layers, o.images, o.p)


def _dfv(parser: ArgumentParser) -> Callable[[Namespace], Path]:
    parser.add_argument(
        "--ckpt",
        type=str,
        nargs="+",
        required=True,
        help="checkpoints of kdkernels fit, each a row of the picture",
    )
    parser.add_argument("--image", type=int, default=0, help="index of the image in the validation split")
    parser.add_argument("--vector", type=int, default=1, help="number of the teacher's singular vector, from 1")
    return lambda o: plot_dfv(o.ckpt, o.out, o.layers, o.teacher_layers, o.image, o.vector)
