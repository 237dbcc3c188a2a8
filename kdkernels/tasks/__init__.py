"""Tasks define labels, their loss and metrics, independently of the distillation method.

Metrics need the optional dependencies of ``kdkernels[train]``.
"""

from ..nn.outputs import describe_output, find_logits
from .base import Task
from .classification import Classification
from .lanes import Lanes
from .segmentation import Segmentation

__all__ = ["Classification", "Lanes", "Segmentation", "Task", "describe_output", "find_logits"]
