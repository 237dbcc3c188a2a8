"""Lookup of classes by import path, and of the arguments of their constructors."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar, Union, get_args, get_origin

PACKAGES = ("kdkernels.distill", "kdkernels.data")  # classes of these packages can be named without a path


def import_class(path: str) -> Any:
    """Return the class or function of an import path, or of a bare name in :data:`PACKAGES`.

    Raises:
        ValueError: there is no such class.
    """
    module, _, name = path.rpartition(".")
    for package in [module] if module else PACKAGES:
        cls = getattr(importlib.import_module(package), name, None)
        if cls is not None:
            return cls
    raise ValueError(f"there is no class {path!r}")


def options_of(cls: Callable) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class, with those of its bases that it takes as ``**kwargs``; or
    those of a function.

    Annotations that are strings are replaced by types, where the types can be found.
    """
    if not isinstance(cls, type):
        return {name: _with_type(p, cls) for name, p in inspect.signature(cls).parameters.items()}
    options: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        function = vars(base)["__init__"]
        parameters = list(inspect.signature(function).parameters.values())[1:]
        options |= {p.name: _with_type(p, function) for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in options}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return options


def _with_type(parameter: inspect.Parameter, function: Callable) -> inspect.Parameter:
    if not isinstance(parameter.annotation, str):
        return parameter
    try:
        return parameter.replace(annotation=eval(parameter.annotation, vars(inspect.getmodule(function))))
    except Exception:  # the type is imported for type checkers only
        return parameter


def accepts_null(parameter: inspect.Parameter) -> bool:
    """Whether an argument can be ``None``. If its type is unknown, it can."""
    return parameter.default is None or isinstance(parameter.annotation, str) or _contains_none(parameter.annotation)


def _contains_none(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_contains_none(member) for member in get_args(annotation))
    return annotation in (None, type(None), Any, object, inspect.Parameter.empty) or isinstance(annotation, TypeVar)
