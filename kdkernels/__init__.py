"""Fused, differentiable ops for knowledge distillation."""

from importlib.metadata import PackageNotFoundError, version

import torch  # noqa: F401  before _C: the extension links against torch's libraries

from . import _C, reference  # noqa: F401  the import of _C registers the ops
from .config import load_cpu_kernels, load_cuda_kernels, release_memory, show_config

try:
    __version__ = version("kdkernels")
except PackageNotFoundError:  # a source tree on the path that was built in place but not installed
    __version__ = "0+unknown"

CPU_ISA = load_cpu_kernels()
load_cuda_kernels()

from . import nn  # noqa: E402  needs the registered ops
from .ops.attention_pool import attention_pool, attention_transfer_loss  # noqa: E402
from .ops.rbf_correlation import rbf_correlation, rbf_correlation_loss  # noqa: E402
from .ops.temperature_kl import temperature_kl  # noqa: E402
from .ops.truncated_svd import align_singular_vectors, feature_svd, truncated_svd, truncated_svds  # noqa: E402

__all__ = [
    "align_singular_vectors",
    "attention_pool",
    "attention_transfer_loss",
    "feature_svd",
    "nn",
    "rbf_correlation",
    "rbf_correlation_loss",
    "reference",
    "release_memory",
    "show_config",
    "temperature_kl",
    "truncated_svd",
    "truncated_svds",
]
