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
        ValueError: a file is not a YAML mapping or contains a key twice, ``base`` is not a file
            name, or the bases form a cycle.
    """
    return _load(Path(path), ())


def _load(path: Path, extended_by: tuple[Path, ...]) -> dict:
    if path.resolve() in extended_by:
        raise ValueError(f"config: {os.fspath(path)!r} extends itself: {' -> '.join(p.name for p in (*extended_by, path))}")
    origin = f" (base of {os.fspath(extended_by[-1])!r})" if extended_by else ""
    if path.is_dir():
        raise ValueError(f"config: {os.fspath(path)!r}{origin} is a folder, expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"config: there is no file {os.fspath(path)!r}{origin}")
    config = _read(path)
    if "base" not in config:
        return config
    base = config.pop("base")
    if not isinstance(base, str) or not base:
        raise ValueError(f"config: base of {os.fspath(path)!r} must be the name of a file, got {base!r}")
    try:
        return merged(_load(path.parent / base, (*extended_by, path.resolve())), config)
    except _NotMergeable as error:
        raise ValueError(f"config: {os.fspath(path)!r} changes {error} by a mapping, but its base has a list there: give the whole list") from error


class _NotMergeable(Exception):
    """The message is the path of keys to a list that would be replaced by a mapping."""


class _Loader(yaml.SafeLoader):
    """A safe loader that rejects duplicate keys, of which YAML's parser would use the last one."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value!r} occurs twice in a mapping", key.start_mark)
            seen |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        return node


def _read(path: Path) -> dict:
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"config: {os.fspath(path)!r} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config: {os.fspath(path)!r} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config: {os.fspath(path)!r} must be a mapping with sections such as model, data and trainer, got {type(config).__name__}")
    return config


def merged(base: dict, changes: dict) -> dict:
    """Return ``base`` with the values of ``changes``, which replace values of the same keys.

    Mappings are merged key by key unless their ``class_path`` differs. Lists are replaced.
    """
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, list) and isinstance(value, dict) and "class_path" not in value:
            raise _NotMergeable(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _other_class(old, value):
            try:
                result[key] = merged(old, value)
            except _NotMergeable as error:
                raise _NotMergeable(f"{key}.{error}") from None
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

    Other arguments, and config files without a base, are not changed: the parser reads them. The
    files must have passed :func:`~kdkernels.cli.config_checks.check_configs`.
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
    return os.path.isfile(path) and "base" in _read(Path(path))
