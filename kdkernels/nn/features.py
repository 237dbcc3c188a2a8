"""Checks of lists of features, one tensor for each layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..ops import checks


def features_of_layers(name: str, features: object) -> list[Tensor]:
    """Return a list of feature maps as a list. Raise TypeError for any other value."""
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"{name} must be a list of features, one tensor for each layer, got {checks.kind(features)}")
    for i, x in enumerate(features):
        checks.tensor(f"{name}[{i}]", x, "features")
    return list(features)
