"""The definitions of all ops in plain PyTorch.

They support any device and dtype, are twice differentiable, and depend on torch only. This package
is installed as ``kdkernels.reference``. Each function has the signature of the fused op of the
same name.
"""

from .attention_pool import attention_pool, attention_transfer_loss
from .rbf_correlation import rbf_correlation, rbf_correlation_loss
from .sad_loss import sad_loss
from .svd_kd import svd_kd_loss
from .temperature_kl import temperature_kl
from .truncated_svd import align_singular_vectors, truncated_svd

__all__ = [
    "align_singular_vectors",
    "attention_pool",
    "attention_transfer_loss",
    "rbf_correlation",
    "rbf_correlation_loss",
    "sad_loss",
    "svd_kd_loss",
    "temperature_kl",
    "truncated_svd",
]
