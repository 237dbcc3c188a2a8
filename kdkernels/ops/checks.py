"""Checks of the arguments of public functions.

Every function raises a TypeError or ValueError that names the argument. The public functions call
the checks before they compute anything.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from ..dtypes import FLOATING
from ..options import VALUES


def kind(value) -> str:
    """Describe the type of a value for an error message."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def tensor(name: str, value, contents: str) -> None:
    """Check for a dense tensor of a supported floating-point dtype.

    ``contents`` describes the elements in the error message, for example "logits".
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16 {contents}, got {value.dtype}")
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {'nested' if value.is_nested else value.layout}")


def _real(name: str, value, kinds: str = "a number") -> None:
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real, torch.SymFloat, torch.SymInt)):
        hint = ": no derivative with respect to it is computed, so pass a float" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be {kinds}, got {kind(value)}{hint}")
    if isinstance(value, int) and abs(value) > 2**1000:
        raise ValueError(f"{name} must fit the range of float64, got an int of {value.bit_length()} bits")


def positive(name: str, value, kinds: str = "a number") -> None:
    _real(name, value, kinds)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def not_negative(name: str, value) -> None:
    _real(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def fraction(name: str, value) -> None:
    _real(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def positive_values(name: str, value: Tensor | None) -> None:
    """Check that all elements of a CPU tensor are finite and > 0.

    Wrappers of torch.func transforms are removed first. GPU tensors are not checked, because
    reading them back would wait for the GPU.
    """
    functorch = torch._C._functorch
    while isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    if isinstance(value, Tensor) and value.device.type == "cpu":
        value = value.detach()
        bad = ~(value.isfinite() & (value > 0))
        if bad.any():
            raise ValueError(f"{name} must be finite and > 0 everywhere, got {value[bad].flatten()[0].item()}")


def integer(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {kind(value)}")


def flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {kind(value)}")


def choice(name: str, value, known: tuple) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be one of {known}, got {kind(value)}")
    if value not in known:
        raise ValueError(f"{name} must be one of {known}, got {value!r}")


def option(name: str, value, excluded: tuple = ()) -> int:
    """Return the integer value of the string ``value`` of an option.

    Values in ``excluded`` are valid for other ops only, and raise ValueError.
    """
    known = VALUES[name]
    if isinstance(value, str) and value in known and value not in excluded:
        return known[value]
    choice(name, value, tuple(key for key in known if key not in excluded))
    return known[value]
