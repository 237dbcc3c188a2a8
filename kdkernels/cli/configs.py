"""Configs that extend another: a YAML file with the key ``base`` holds only what differs from the file that ``base`` names.

The result is one config, with which the training commands go on as if it had been written out in full.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

_NAMES = ("-c", "--config")


def load_config(path: str | os.PathLike) -> dict:
    """The whole config of a file, with what it takes over from its bases.

    ``base: other.yaml`` is relative to the file that holds it, and may have a base itself. Mappings are merged key by key. Everything else in
    the file replaces what the base says, and so does a mapping that names another ``class_path``: the arguments of one class do not fit another.

    Raises:
        FileNotFoundError: the file, or a base, is not there.
        ValueError: a file is no YAML mapping, ``base`` is no file name, or bases form a circle.
    """
    return _load(Path(path), ())


def _load(path: Path, extended_by: tuple[Path, ...]) -> dict:
    if path.resolve() in extended_by:
        raise ValueError(f"config: {os.fspath(path)!r} extends itself: {' -> '.join(p.name for p in (*extended_by, path))}")
    if not path.is_file():
        by = f" (base of {os.fspath(extended_by[-1])!r})" if extended_by else ""
        raise FileNotFoundError(f"config: there is no file {os.fspath(path)!r}{by}")
    config = _read(path)
    base = config.pop("base", None)
    if base is None:
        return config
    if not isinstance(base, str):
        raise ValueError(f"config: base of {os.fspath(path)!r} must be the name of a file, got {base!r}")
    return merged(_load(path.parent / base, (*extended_by, path.resolve())), config)


def _read(path: Path) -> dict:
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"config: {os.fspath(path)!r} is no YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config: {os.fspath(path)!r} must hold sections such as model, data and trainer, got {type(config).__name__}")
    return config


def merged(base: dict, over: dict) -> dict:
    """``base`` with the values of ``over`` in place of its own; mappings are merged key by key unless their ``class_path`` differs."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _other_class(old, value):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def _other_class(base: dict, over: dict) -> bool:
    """Whether both name a class, and not the same one."""
    return "class_path" in base and "class_path" in over and base["class_path"] != over["class_path"]


def options_in(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each option, ``--name value`` and ``--name=value`` alike."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if equals:
            yield name, value
        elif i + 1 < len(arguments):
            yield name, arguments[i + 1]


def config_files(arguments: list[str]) -> list[str]:
    """The files given by ``--config``."""
    return [value for name, value in options_in(arguments) if name in _NAMES]


def with_bases(arguments: list[str]) -> list[str]:
    """The arguments, with the text of the whole config in place of each file that has a base. Other files are left to the parser."""
    result = list(arguments)
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in _NAMES and not equals and i + 1 < len(arguments) and _has_base(arguments[i + 1]):
            result[i + 1] = yaml.safe_dump(load_config(arguments[i + 1]), sort_keys=False)
        elif name in _NAMES and equals and _has_base(value):
            result[i] = f"{name}={yaml.safe_dump(load_config(value), sort_keys=False)}"
    return result


def _has_base(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    try:
        config = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        return False  # the parser's error names the file
    return isinstance(config, dict) and "base" in config
