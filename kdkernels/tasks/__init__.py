"""Tasks: what labels mean, apart from how one distils. Metrics need the extra ``train``."""

from .base import Task
from .classification import Classification
from .outputs import describe_output, find_logits
from .segmentation import Segmentation

__all__ = ["Classification", "Segmentation", "Task", "describe_output", "find_logits"]
