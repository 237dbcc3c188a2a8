"""Checks of the arguments of public functions. Each raises before any work is done, and names the argument."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from ..dtypes import FLOATING
from ..options import VALUES


def kind(value) -> str:
    """What a value is, for an error message."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def tensor(name: str, value, what: str) -> None:
    """A dense tensor of a floating-point type that the ops compute with."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16 {what}, got {value.dtype}")
    if value.is_nested or value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one of layout {'nested' if value.is_nested else value.layout}")


def _real(name: str, value, kinds: str = "a number") -> None:
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real, torch.SymFloat, torch.SymInt)):
        hint = ": it is a constant to the derivative, pass a float" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be {kinds}, got {kind(value)}{hint}")
    if isinstance(value, int) and abs(value) > 2**1000:
        raise ValueError(f"{name} must be in the range of float64, got an int of {value.bit_length()} bits")


def positive(name: str, value, kinds: str = "a number") -> None:
    _real(name, value, kinds)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value}")


def not_negative(name: str, value) -> None:
    _real(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def share(name: str, value) -> None:
    _real(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def positive_values(name: str, value: Tensor | None) -> None:
    """Finite numbers > 0 in a tensor on the CPU, whatever transforms of torch.func wrap it. One on a GPU is not read back."""
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


def option(name: str, value, without: tuple = ()) -> int:
    """The number that stands for a value of the option ``name``; those in ``without`` are for other ops."""
    known = VALUES[name]
    if isinstance(value, str) and value in known and value not in without:
        return known[value]
    choice(name, value, tuple(k for k in known if k not in without))
    return known[value]
