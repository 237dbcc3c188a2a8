"""Distillation methods. A method is a pure loss function and a small LightningModule.

The modules need the optional dependencies of ``kdkernels[train]``.
"""

from .at import AttentionTransfer, GradientAttentionTransfer, gradient_attention_loss, input_gradient
from .base import Distiller
from .byot import BYOT
from .deep_supervision import DeepSupervision
from .exit_network import ExitNetwork, exit_network
from .frskd import FRSKD
from .fsp import FSP, fsp_loss, fsp_matrix
from .kd import KD, kd_loss
from .sad import SAD
from .sla import SLA
from .supervised import Supervised
from .svd_kd import SVDKD, clip_transfer, svd_kd_loss
from .teacher_cache import TeacherCache

__all__ = [
    "BYOT",
    "FRSKD",
    "FSP",
    "KD",
    "SAD",
    "SLA",
    "SVDKD",
    "AttentionTransfer",
    "DeepSupervision",
    "Distiller",
    "ExitNetwork",
    "GradientAttentionTransfer",
    "Supervised",
    "TeacherCache",
    "clip_transfer",
    "exit_network",
    "fsp_loss",
    "fsp_matrix",
    "gradient_attention_loss",
    "input_gradient",
    "kd_loss",
    "svd_kd_loss",
]
