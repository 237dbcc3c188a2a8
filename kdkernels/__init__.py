"""Fused, differentiable ops for knowledge distillation."""

import torch  # noqa: F401  import before _C, which links against torch's libraries

from . import _C, reference  # noqa: F401  importing _C registers the ops
from .config import CPU_ISA, VERSION, load_cuda_kernels, release_memory, show_config

__version__ = VERSION
load_cuda_kernels()

from . import compat, nn  # noqa: E402  they need the registered ops
from .compat import patch  # noqa: E402
from .ops.attention_pool import attention_pool, attention_transfer_loss  # noqa: E402
from .ops.rbf_correlation import rbf_correlation, rbf_correlation_loss  # noqa: E402
from .ops.temperature_kl import temperature_kl  # noqa: E402
from .ops.truncated_svd import align_singular_vectors, feature_svd, truncated_svd, truncated_svds  # noqa: E402

__all__ = [
    "CPU_ISA",
    "align_singular_vectors",
    "attention_pool",
    "attention_transfer_loss",
    "compat",
    "feature_svd",
    "nn",
    "patch",
    "rbf_correlation",
    "rbf_correlation_loss",
    "reference",
    "release_memory",
    "show_config",
    "temperature_kl",
    "truncated_svd",
    "truncated_svds",
]
