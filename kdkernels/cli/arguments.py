"""Helpers for the argument parsers of the commands: errors in one line, and the output folder."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import NoReturn

from .user_errors import close_match


class UsageError(ValueError):
    """Raised for invalid arguments. The command line prints the message and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` that raises :class:`UsageError` and does not print the usage."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"kdkernels {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(explain(self, message))


def parse_typed(parser: argparse.ArgumentParser, arguments: list[str]):
    """Parse with an ``ArgumentParser(exit_on_error=False)``; raise :class:`UsageError`."""
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(explain(parser, str(error))) from error


def explain(parser: argparse.ArgumentParser, message: str) -> str:
    """Rewrite a message of the parser; for an unknown option, suggest a similar one."""
    required = re.fullmatch(r"the following arguments are required: ([\w., -]+)", message)
    if required is not None:
        return f"missing required options: {', '.join('--' + name.lstrip('-') for name in required.group(1).split(', '))}"
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if unknown is None:
        return message
    name = unknown.group(1).partition("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {name!r}: it is neither an option nor the value of the option before it"
    return f"there is no option {name}{close_match(name, list(parser._option_string_actions))}"


def make_folder(parser: Parser, folder: Path) -> None:
    """Create the folder given as ``--out``; raise :class:`UsageError` if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot create the folder {folder}: {error.strerror}")
    if not os.access(folder, os.W_OK):
        parser.error(f"--out: the folder {folder} is not writable; give another folder")
