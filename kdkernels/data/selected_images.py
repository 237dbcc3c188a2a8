"""Training images from a pool without labels; validation and test images of other data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import Dataset

from .augment import Augment
from .base import ImageData, ItemImages, TensorImages
from .select_samples import SampleIndex, images_of, select_samples

_CHUNK = 256  # images that are read at once


class SelectedImages(ImageData):
    """Images of an unlabelled pool for training, and the validation and test images of ``data``.

    With ``index``, the training images are those that :func:`select_samples` selected. If there is
    no such file and ``count`` is given, the selection is made when training begins, with the
    method's teacher, and stored. Without ``index``, all images of the pool are used.

    The training images have no labels. They are resized to the size of ``data``, and normalised
    with its mean and standard deviation.

    Args:
        pool: a map-style dataset as for :func:`select_samples`, such as :class:`ImagePool`; its
            labels are not used.
        data: data module with the classes of the teacher.
        index: index file of :func:`select_samples`.
        count: number of images to select.
        select_batch_size: images that the teacher gets at once in the selection.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.
        max_memory: memory in GiB for the training images; if they need at most this much, they are
            read once and kept in memory.
    """

    def __init__(
        self,
        pool: Dataset,
        data: ImageData,
        index: str | os.PathLike | None = None,
        count: int | None = None,
        batch_size: int = 128,
        augment: Augment | None = None,
        order_seed: int = 0,
        num_workers: int = 0,
        select_batch_size: int = 256,
        max_memory: float = 2.0,
    ):
        super().__init__(batch_size, augment, order_seed, num_workers)
        if not isinstance(data, ImageData):
            raise TypeError(f"data must be a data module of kdkernels.data, got {type(data).__name__}")
        if not hasattr(pool, "__len__") or not hasattr(pool, "__getitem__"):
            raise TypeError(f"pool must be a map-style dataset, with __len__ and __getitem__, got {type(pool).__name__}")
        if count is not None and index is None:
            raise ValueError("count needs index, the file in which the selection is stored")
        if not len(cast(Sized, pool)):
            raise ValueError("pool must not be empty, got a dataset of length 0")
        self.pool, self.data, self.count, self.select_batch_size, self.max_memory = pool, data, count, select_batch_size, max_memory
        self.index = None if index is None else Path(index)
        self._take_attributes()

    def _take_attributes(self) -> None:
        for name in ("num_classes", "classes", "resize", "image_shape", "mean", "std"):
            setattr(self, name, getattr(self.data, name))

    def setup(self, stage: str | None = None) -> None:
        if "val" not in self.splits:
            self.data.setup(stage)
            if self.data.label_maps:
                raise ValueError(f"data must have one class for each image, but {type(self.data).__name__} has label maps")
            self._take_attributes()
            self.splits = {split: dataset for split, dataset in self.data.splits.items() if split != "train"}
        if "train" not in self.splits and stage in (None, "fit"):
            self.splits = {**self.splits, "train": self._training_images()}

    def make_splits(self) -> Mapping[str, Dataset]:
        self.setup()
        return self.splits

    def fingerprint(self, split: str = "train") -> str:
        return super().fingerprint(split) if split == "train" else self.data.fingerprint(split)

    def _training_images(self) -> Dataset:
        size = None if self.image_shape is None else self.image_shape[1:]
        indices, pool_name = torch.arange(len(cast(Sized, self.pool))), ""
        if self.index is not None:
            selected = self._selected(size)
            indices, pool_name = selected.indices, selected.provenance["pool"]
        positions = indices.tolist()
        first = images_of(self.pool, positions[:1], size)
        if self.image_shape is not None and tuple(first.shape[1:]) != tuple(self.image_shape):
            raise ValueError(f"the images of the pool must have {self.image_shape[0]} channels, as those of data, got {first.shape[1]}")
        if first.nbytes * len(positions) <= self.max_memory * 2**30:
            parts = [images_of(self.pool, part.tolist(), size) for part in indices.split(_CHUNK)]
            return TensorImages(image=torch.cat(parts))
        description = f"{pool_name} {type(self.pool).__qualname__} {size} {hashlib.sha256(indices.numpy().tobytes()).hexdigest()}"
        return ItemImages(PoolImages(self.pool, positions, size), fingerprint=description if pool_name else None)

    def _selected(self, size: tuple[int, int] | None) -> SampleIndex:
        """Return the selection, which is made now if it does not exist."""
        index = cast(Path, self.index)
        trainer: Any = self.trainer
        teacher = None if trainer is None else getattr(trainer.lightning_module, "teacher", None)
        if index.exists():
            selected = SampleIndex.load(index)
            selected.check(teacher=teacher, pool=self.pool, count=self.count)
            return selected
        if self.count is None or teacher is None:
            raise FileNotFoundError(
                f"index: there is no file {os.fspath(index)!r}: make it with kdkernels.data.select_samples, or give count, the number of images to "
                "select with the teacher when training begins"
            )
        total = len(cast(Sized, self.pool))
        rank_zero_info(f"selecting {self.count} of {total} images with the teacher")
        return select_samples(
            cast(nn.Module, teacher),
            self.pool,
            self.count,
            index,
            size=size,
            mean=self.mean,
            std=self.std,
            batch_size=self.select_batch_size,
            device=trainer.strategy.root_device,
            on_progress=_every_tenth(),
        )


class PoolImages(Dataset):
    """Images at given positions of a pool, without labels."""

    def __init__(self, pool: Dataset, positions: list[int], size: tuple[int, int] | None):
        self.pool, self.positions, self.size = pool, positions, size

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> Tensor:
        return images_of(self.pool, [self.positions[i]], self.size)[0]


def _every_tenth() -> Callable[[int, int], None]:
    """Return a function that reports the progress of the first process in steps of 10 %."""
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if 10 * done // total > reported:
            reported = 10 * done // total
            rank_zero_info(f"scored {done} of {total} images")

    return report
