"""Configs that extend other configs.

A YAML file with the key ``base`` contains only the differences from the file that ``base`` names.
The training commands receive the merged config.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import yaml

_CONFIG_OPTIONS = ("-c", "--config")


def load_config(path: str | os.PathLike) -> dict:
    """Load a config file and merge it with its bases.

    ``base: other.yaml`` is relative to the file that contains it. A base may have a base itself.
    Mappings are merged key by key; other values replace those of the base. A mapping with a
    different ``class_path`` also replaces that of the base, because the arguments belong to another
    class.

    Raises:
        FileNotFoundError: the file or a base does not exist.
        ValueError: a file is not a YAML mapping, ``base`` is not a file name, or the bases form a
            cycle.
    """
    return _load(Path(path), ())


def _load(path: Path, extended_by: tuple[Path, ...]) -> dict:
    if path.resolve() in extended_by:
        raise ValueError(f"config: {os.fspath(path)!r} extends itself: {' -> '.join(p.name for p in (*extended_by, path))}")
    if not path.is_file():
        origin = f" (base of {os.fspath(extended_by[-1])!r})" if extended_by else ""
        raise FileNotFoundError(f"config: there is no file {os.fspath(path)!r}{origin}")
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
        raise ValueError(f"config: {os.fspath(path)!r} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config: {os.fspath(path)!r} must be a mapping with sections such as model, data and trainer, got {type(config).__name__}")
    return config


def merged(base: dict, changes: dict) -> dict:
    """Return ``base`` with the values of ``changes``, which replace values of the same keys.

    Mappings are merged key by key unless their ``class_path`` differs.
    """
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _other_class(old, value):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def _other_class(base: dict, changes: dict) -> bool:
    """Whether the two mappings name different classes."""
    return "class_path" in base and "class_path" in changes and base["class_path"] != changes["class_path"]


def options_in(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Yield name and value of each option, given as ``--name value`` or ``--name=value``."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if equals:
            yield name, value
        elif i + 1 < len(arguments):
            yield name, arguments[i + 1]


def config_files(arguments: list[str]) -> list[str]:
    """Return the files given by ``--config``."""
    return [value for name, value in options_in(arguments) if name in _CONFIG_OPTIONS]


def with_bases(arguments: list[str]) -> list[str]:
    """Replace each config file that has a base by the text of the merged config.

    Other arguments, and config files without a base, are not changed: the parser reads them.
    """
    result = list(arguments)
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in _CONFIG_OPTIONS and not equals and i + 1 < len(arguments) and _has_base(arguments[i + 1]):
            result[i + 1] = yaml.safe_dump(load_config(arguments[i + 1]), sort_keys=False)
        elif name in _CONFIG_OPTIONS and equals and _has_base(value):
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
