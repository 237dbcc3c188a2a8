"""The dtypes that the ops accept, and the dtype in which they compute."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(*inputs: Tensor) -> torch.dtype:
    """Return float64 if any input is float64, else float32 (half precision computes in float32)."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
