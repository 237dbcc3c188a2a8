"""Lightning data modules for images and labels. Needs the extra ``train``."""

from .augment import Augment
from .base import ImageData
from .bdd100k import BDD100KLanes
from .cifar import CIFAR10, CIFAR100
from .clutter_digits import ClutterDigits, SegmentedClutterDigits
from .culane import CULane
from .digits import Digits
from .from_datasets import FromDatasets
from .image_folder import ImageFolder
from .image_pool import ImagePool
from .select_samples import SampleIndex, select_samples
from .selected_images import SelectedImages
from .synthetic_lanes import SyntheticLanes
from .tusimple import TuSimple
from .wild_digits import WildDigits

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "Augment",
    "BDD100KLanes",
    "CULane",
    "ClutterDigits",
    "Digits",
    "FromDatasets",
    "ImageData",
    "ImageFolder",
    "ImagePool",
    "SampleIndex",
    "SegmentedClutterDigits",
    "SelectedImages",
    "SyntheticLanes",
    "TuSimple",
    "WildDigits",
    "select_samples",
]
