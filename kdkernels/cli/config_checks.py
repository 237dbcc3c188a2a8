"""Checks of config files before they are parsed.

The parser would accept some wrong sections and values, which would fail later without a name, or
have no effect.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any

from .class_options import accepts_null, import_class, options_of
from .configs import config_files, load_config, options_in
from .user_errors import close_match

_SECTIONS = {"model": "a mapping, or the import path of a class", "data": "a mapping, or the import path of a class", "trainer": "a mapping"}
_OTHERS = ("seed_everything", "ckpt_path", "checkpoint_every", "restart", "verbose", "weights_only")
_TRAINER = "lightning.pytorch.Trainer"


def check_configs(arguments: list[str]) -> None:
    """Check the config files, and that no option changes a list of teachers.

    The parser would apply ``--model.teacher.width`` to the last teacher of a list only.

    Raises:
        ValueError: a section is unknown, or neither a mapping nor, for model and data, the path of
            a class; an argument is null but cannot be; an unknown argument is an empty mapping,
            which the parser would ignore; or an option changes a teacher although the config has a
            list of teachers.
    """
    config: dict = {}
    for path in config_files(arguments):
        if os.path.isfile(path):
            changes = load_config(path)
            _check_sections(changes, path)
            config |= changes
    model = config.get("model")
    teacher = model.get("init_args", {}).get("teacher") if isinstance(model, dict) else None
    for name, _ in options_in(arguments):
        if isinstance(teacher, list) and name.startswith(("--model.teacher.", "--model.init_args.teacher.")):
            raise ValueError(f"{name}: the config has a list of {len(teacher)} teachers, so this option is ambiguous: change the list in the config")


def _check_sections(config: dict, path: str) -> None:
    for section, value in config.items():
        if section not in _SECTIONS:
            if section not in _OTHERS:
                raise ValueError(f"config: {path!r} has an unknown section {section!r}{close_match(str(section), [*_SECTIONS, *_OTHERS])}")
            continue
        if not isinstance(value, dict) and (section == "trainer" or not isinstance(value, str)):
            raise ValueError(f"config: section {section} of {path!r} must be {_SECTIONS[section]}, got {value!r}")
        if isinstance(value, dict) and not isinstance(value.get("init_args", {}), dict):
            raise ValueError(f"config: init_args of section {section} of {path!r} must be a mapping, got {value['init_args']!r}")
        for problem in wrong_arguments(value, section):
            raise ValueError(f"config: {problem} (in {path!r})")


def wrong_arguments(value: Any, name: str) -> Iterator[str]:
    """Yield a message for each null argument that cannot be null, and each unknown empty one.

    Args:
        value: a section of a config, or a part of it.
        name: its option, such as "model.student".
    """
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from wrong_arguments(item, f"{name}[{i}]")
        return
    if not isinstance(value, dict):
        return
    path = _TRAINER if name == "trainer" else value.get("class_path")
    arguments = value if name == "trainer" else value.get("init_args")
    if not isinstance(path, str) or not isinstance(arguments, dict):
        return
    try:
        cls = import_class(path)
        options = options_of(cls)
    except Exception:  # the parser reports it
        return
    for key, argument in arguments.items():
        if key not in options:
            if argument == {}:
                yield f"{name} ({cls.__name__}) has no option {key!r}{close_match(str(key), list(options))}"
        elif argument is None and not accepts_null(options[key]):
            yield f"{name}.{key} must be {inspect.formatannotation(options[key].annotation)}, got null"
        yield from wrong_arguments(argument, f"{name}.{key}")
