"""Distillation methods. A method is a pure loss function and a small LightningModule. The modules need the extra ``train``."""

from .base import Distiller, Supervised
from .kd import KD, kd_loss
from .teacher_cache import TeacherCache

__all__ = ["KD", "Distiller", "Supervised", "TeacherCache", "kd_loss"]
