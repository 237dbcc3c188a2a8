"""What the launchers of all kernels share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def device_of(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of x. In the interpreter there is none."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
