"""Any two torch Datasets."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset, IterableDataset

from .augment import Augment
from .base import ImageData, ItemImages, require_positive


class FromDatasets(ImageData):
    """Data from map-style datasets whose items are ``(image, label)``, dicts with ``image`` and perhaps ``label``, or images alone.

    Images are tensors [C, H, W] (uint8, or float on any scale; float64 stays that), arrays [H, W, C] or PIL images, all of one size. 16 bits
    become floats in [0, 1]. A label is a class's number, probabilities of the classes [K], or a label map of integers [H, W] (a PIL image
    too). More fields of a dict are stacked into the batch. Random transforms of the datasets draw from generators that are seeded by
    (``seed``, epoch, sample), so that a resumed run, other processes and other batches see the same images.

    Args:
        train, val, test: the datasets; by import path in a config.
        num_classes: classes; by default the length of ``train.classes``, if it has that, else unknown.
        mean, std: per channel, on a scale where white is 1; the default leaves float images as they are, and divides uint8 by 255.
        views: how many different images the datasets' own transforms give per sample: epoch e shows view ``e % views``. ``None``: as
            many as ``augment`` says, else a new one each epoch.
        fingerprint: a string that changes when the training images do: what a cache of a teacher's outputs is keyed with. By default a
            hash of 16 samples.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
        seed: of the datasets' own transforms.
    """

    def __init__(
        self,
        train: Dataset,
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
            raise ValueError("mean and std go together: give both or neither")
        require_positive("std", std)
        self.datasets = {name: dataset for name, dataset in {"train": train, "val": val, "test": test}.items() if dataset is not None}
        for name, dataset in self.datasets.items():
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise TypeError(f"{name} must be a map-style dataset, with __len__ and __getitem__, got {type(dataset).__name__}")
            if not len(dataset):
                raise ValueError(f"{name} is empty")
        if num_classes is None and hasattr(train, "classes"):
            num_classes = len(train.classes)
        self.num_classes, self.mean, self.std = num_classes, mean, std
        self.classes = list(map(str, train.classes)) if hasattr(train, "classes") and len(train.classes) == num_classes else None
        self._views, self._fingerprint, self.seed = views, fingerprint, seed

    @property
    def views(self) -> int | None:
        return self._views if self._views is not None or self.augment is None else self.augment.views

    def make_splits(self) -> dict[str, ItemImages]:
        numbers = {"train": 0, "val": 1, "test": 2}
        splits = {name: ItemImages(d, self.seed, self._fingerprint, self.num_classes, numbers[name]) for name, d in self.datasets.items()}
        first = splits["train"][0]
        self.image_shape = tuple(first["image"].shape)
        self.label_maps = "label" in first and first["label"].dim() == 2
        return splits
