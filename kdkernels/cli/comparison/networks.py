"""Networks of the comparison, written as ``TinyCNN:width=8`` or with an import path."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from ... import models
from ...models import TAPS
from ..class_options import options_of
from ..user_errors import close_match
from .methods import parse_options


def network_from(text: str, option: str, num_classes: int) -> nn.Module:
    """Return a new network ``name:argument=value``; an argument ``num_classes`` gets the classes.

    Args:
        text: a name in :mod:`kdkernels.models` or an import path, and arguments.
        option: name of the option in errors.
        num_classes: classes of the data.

    Raises:
        ValueError: there is no such network or argument, or it cannot be built.
    """
    name, _, rest = text.strip().partition(":")
    module, _, attribute = name.rpartition(".")
    try:
        make = getattr(importlib.import_module(module) if module else models, attribute, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"--{option}: there is no module {module!r} for {name!r}") from error
    if not callable(make):
        raise ValueError(
            f"--{option}: there is no network {name!r}{close_match(name, models.__all__)}; give a name of kdkernels.models, such as TinyCNN:width=8, "
            "or the import path of your class"
        )
    accepted = list(options_of(make))
    arguments: dict[str, Any] = parse_options(rest, accepted, text, name)
    if "num_classes" in accepted and "num_classes" not in arguments:
        arguments["num_classes"] = num_classes
    try:
        network = make(**arguments)
    except Exception as error:
        raise ValueError(f"--{option}: {name} cannot be built with {arguments}: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"--{option}: {name} must return an nn.Module, got {type(network).__name__}")
    return network


def layers_of(network: nn.Module, given: tuple[str, ...], option: str) -> tuple[str, ...]:
    """Return the layers that methods compare: those given, or the taps of the network's family.

    The first tap of families with four or more, the stem, is left out.

    Raises:
        ValueError: the family has no taps and none are given, or a name is wrong.
    """
    names = given
    if not names:
        taps = TAPS.get(type(network))
        if taps is None:
            raise ValueError(
                f"--{option}: there are no default layers for {type(network).__name__}; give their names, for example --{option} layer1,layer2"
            )
        names = taps[1:] if len(taps) > 3 else taps
    known = dict(network.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(f"--{option}: {type(network).__name__} has no layer {name!r}{close_match(name, list(known))}")
    return tuple(names)
