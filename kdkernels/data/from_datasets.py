"""Data modules from any map-style torch Datasets."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset, IterableDataset

from .augment import Augment
from .base import ImageData, ItemImages, require_positive


class FromDatasets(ImageData):
    """Data from map-style datasets whose items are ``(image, label)``, dicts with ``image`` and
    optionally ``label``, or images alone.

    Images are tensors [C, H, W] (uint8, or float on any scale), arrays [H, W, C] or PIL images, all
    of the same size. float64 images stay float64; float16 and bfloat16 images become float32.
    16-bit integers become floats in [0, 1]. A label is a class number, class probabilities [K], or
    a label map of integers [H, W], which may be a PIL image. Other fields of a dict are stacked
    into the batch.

    The random generators that transforms of the datasets use are seeded by (``seed``, epoch,
    sample). The images therefore do not depend on the batch or the process, or on whether the run
    was resumed.

    Args:
        train, val, test: the datasets; a config names them by import path. ``train`` may be
            ``None`` if there is no training, or for :class:`SelectedImages`.
        num_classes: number of classes; by default the length of ``train.classes`` (or
            ``val.classes`` without ``train``) if the dataset has this attribute, else unknown.
        mean, std: mean and standard deviation per channel, on a scale on which white is 1; by
            default float images are not changed, and uint8 images are divided by 255.
        views: number of different images that the datasets' transforms produce per sample; epoch e
            shows view ``e % views``. ``None``: the number of views of ``augment`` if it is given,
            else a new view each epoch.
        fingerprint: a string that changes when the training images change, the key of a cache of
            the teacher's outputs; by default a hash of 16 samples.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
        seed: seed of the transforms in the datasets.
    """

    def __init__(
        self,
        train: Dataset | None,
        val: Dataset,
        test: Dataset | None = None,
        num_classes: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        views: int | None = None,
        fingerprint: str | None = None,
        batch_size: int = 128,
        augment: Augment | None = None,
        order_seed: int = 0,
        num_workers: int = 0,
        seed: int = 0,
    ):
        super().__init__(batch_size, augment, order_seed, num_workers)
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std must be given together or not at all, got mean={mean} and std={std}")
        require_positive("std", std)
        self.datasets = {name: dataset for name, dataset in {"train": train, "val": val, "test": test}.items() if dataset is not None}
        for name, dataset in self.datasets.items():
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise TypeError(f"{name} must be a map-style dataset, with __len__ and __getitem__, got {type(dataset).__name__}")
            if not len(dataset):
                raise ValueError(f"{name} must not be empty, got a dataset of length 0")
        named = val if train is None else train
        if num_classes is None and hasattr(named, "classes"):
            num_classes = len(named.classes)
        self.num_classes, self.mean, self.std = num_classes, mean, std
        self.classes = list(map(str, named.classes)) if hasattr(named, "classes") and len(named.classes) == num_classes else None
        self._views, self._fingerprint, self.seed = views, fingerprint, seed

    @property
    def views(self) -> int | None:
        return self._views if self._views is not None or self.augment is None else self.augment.views

    def make_splits(self) -> dict[str, ItemImages]:
        numbers = {"train": 0, "val": 1, "test": 2}
        splits = {name: ItemImages(d, self.seed, self._fingerprint, self.num_classes, numbers[name]) for name, d in self.datasets.items()}
        first = splits["train" if "train" in splits else "val"][0]
        self.image_shape = tuple(first["image"].shape)
        self.label_maps = "label" in first and first["label"].dim() == 2
        return splits
