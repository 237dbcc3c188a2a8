"""Distillation methods. A method is a pure loss function and a small LightningModule.

The modules need the optional dependencies of ``kdkernels[train]``.
"""

from .at import AttentionTransfer, GradientAttentionTransfer, gradient_attention_loss, input_gradient
from .base import Distiller
from .exits import BYOT, DeepSupervision
from .frskd import FRSKD
from .fsp import FSP, fsp_loss, fsp_matrix
from .kd import KD, kd_loss
from .sla import SLA
from .supervised import Supervised
from .svd_kd import SVDKD, clip_transfer, svd_kd_loss
from .teacher_cache import TeacherCache

__all__ = [
    "BYOT",
    "FRSKD",
    "FSP",
    "KD",
    "SLA",
    "SVDKD",
    "AttentionTransfer",
    "DeepSupervision",
    "Distiller",
    "GradientAttentionTransfer",
    "Supervised",
    "TeacherCache",
    "clip_transfer",
    "fsp_loss",
    "fsp_matrix",
    "gradient_attention_loss",
    "input_gradient",
    "kd_loss",
    "svd_kd_loss",
]
