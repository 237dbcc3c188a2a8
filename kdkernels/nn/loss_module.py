"""Base class of losses as modules with fixed options."""

from __future__ import annotations

from typing import Any

from torch import nn


class LossModule(nn.Module):
    """A loss whose keyword options are fixed when it is constructed. A subclass validates them."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
