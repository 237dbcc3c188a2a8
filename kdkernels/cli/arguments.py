"""What the parsers of the commands share: errors that become one line, and the folder given as ``--out``."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import NoReturn

from .user_errors import close_match


class UsageError(ValueError):
    """Arguments that a command cannot use. The command line prints the message and exits with status 2."""


class Parser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` whose errors are :class:`UsageError`, without the usage of the whole command."""

    def __init__(self, command: str, description: str):
        super().__init__(prog=f"kdkernels {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(explain(self, message))


def parse_typed(parser: argparse.ArgumentParser, arguments: list[str]):
    """Parses with an ``ArgumentParser(exit_on_error=False)`` of jsonargparse; its errors become :class:`UsageError`."""
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(explain(parser, str(error))) from error


def explain(parser: argparse.ArgumentParser, message: str) -> str:
    """The parser's message, in the words of the command line: for an unknown option with the one that was probably meant."""
    required = re.fullmatch(r"the following arguments are required: ([\w., -]+)", message)
    if required is not None:
        return f"needs {', '.join('--' + name.lstrip('-') for name in required.group(1).split(', '))}"
    unknown = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if unknown is None:
        return message
    name = unknown.group(1).partition("=")[0]
    if not name.startswith("-"):
        return f"{name!r} is not an option, and no option before it takes it as a value"
    return f"there is no option {name}{close_match(name, list(parser._option_string_actions))}"


def make_folder(parser: Parser, folder: Path) -> None:
    """Makes the folder given as ``--out``, or fails with a :class:`UsageError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: cannot make the folder {folder}: {error.strerror}")
    if not os.access(folder, os.W_OK):
        parser.error(f"--out: the folder {folder} cannot be written to")
