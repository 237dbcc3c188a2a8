"""``kdkernels info``: print which kernels are built, and which implementation runs each op."""

from __future__ import annotations

from .. import show_config
from .arguments import Parser


def main(arguments: list[str]) -> int:
    Parser("info", "Print which kernels are built, which instruction set is used, and which implementation runs each op.").parse_args(arguments)
    show_config()
    return 0
