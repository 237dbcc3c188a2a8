"""A hash of a network, which identifies its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def hash_of(network: nn.Module) -> str:
    """Return a hash of the class, and of names, dtypes, shapes and values of the state dict."""
    digest = hashlib.sha256(f"{type(network).__module__}.{type(network).__qualname__}".encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
