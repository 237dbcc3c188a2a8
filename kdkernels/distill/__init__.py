"""Distillation methods. A method is a pure loss function and a small LightningModule.

The modules need the optional dependencies of ``kdkernels[train]``.
"""

from .at import AttentionTransfer, GradientAttentionTransfer, gradient_attention_loss, input_gradient
from .base import Distiller
from .byot import BYOT
from .deep_supervision import DeepSupervision
from .dfnd import DFND
from .dml import DML
from .dual_net import DualNet
from .exit_network import ExitNetwork, exit_network
from .feature_distillation import FeatureDistillation
from .ffl import FFL
from .frskd import FRSKD
from .fsp import FSP, fsp_loss, fsp_matrix
from .kd import KD, kd_loss
from .one import ONE
from .online_network import JointNetwork, online_network
from .sad import SAD
from .sla import SLA
from .supervised import Supervised
from .svd_kd import SVDKD, clip_transfer, svd_kd_loss
from .teacher_cache import TeacherCache

__all__ = [
    "BYOT",
    "DFND",
    "DML",
    "FFL",
    "FRSKD",
    "FSP",
    "KD",
    "ONE",
    "SAD",
    "SLA",
    "SVDKD",
    "AttentionTransfer",
    "DeepSupervision",
    "Distiller",
    "DualNet",
    "ExitNetwork",
    "FeatureDistillation",
    "GradientAttentionTransfer",
    "JointNetwork",
    "Supervised",
    "TeacherCache",
    "clip_transfer",
    "exit_network",
    "fsp_loss",
    "fsp_matrix",
    "gradient_attention_loss",
    "input_gradient",
    "kd_loss",
    "online_network",
    "svd_kd_loss",
]
