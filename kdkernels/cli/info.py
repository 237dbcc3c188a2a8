"""``kdkernels info``: what is built, and where each op runs."""

from __future__ import annotations

from .. import show_config
from .arguments import Parser


def main(arguments: list[str]) -> int:
    Parser("info", "Prints what is built, which instruction set is loaded, and where each op runs.").parse_args(arguments)
    show_config()
    return 0
