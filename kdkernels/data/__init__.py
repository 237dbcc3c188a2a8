"""Lightning data modules for images and labels. Needs the extra ``train``."""

from .augment import Augment
from .base import ImageData
from .cifar import CIFAR10, CIFAR100
from .clutter_digits import ClutterDigits, SegmentedClutterDigits
from .digits import Digits
from .from_datasets import FromDatasets
from .image_folder import ImageFolder
from .synthetic_lanes import SyntheticLanes

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Augment",
    "ClutterDigits",
    "Digits",
    "FromDatasets",
    "ImageData",
    "ImageFolder",
    "SegmentedClutterDigits",
    "SyntheticLanes",
]
