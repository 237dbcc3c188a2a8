"""Lookup of classes by import path, and of the arguments of their constructors."""

from __future__ import annotations

import importlib
import inspect

PACKAGES = ("kdkernels.distill", "kdkernels.data")  # classes of these packages can be named without a path


def import_class(path: str) -> type:
    """Return the class of an import path, or of a bare name in :data:`PACKAGES`.

    Raises:
        ValueError: there is no such class.
    """
    module, _, name = path.rpartition(".")
    for package in [module] if module else PACKAGES:
        cls = getattr(importlib.import_module(package), name, None)
        if cls is not None:
            return cls
    raise ValueError(f"there is no class {path!r}")


def options_of(cls: type) -> dict[str, inspect.Parameter]:
    """Return the arguments of a class, with those of its bases that it takes as ``**kwargs``."""
    options: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        options |= {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in options}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return options
