"""Training images from a pool without labels; validation and test images of other data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..nn.hashing import hash_of
from .augment import Augment
from .base import ImageData, ItemImages, TensorImages, require_at_least
from .image_pool import images_of
from .loading import Loader
from .select_samples import SampleIndex, select_samples

_CHUNK = 256  # images that are read at once


class SelectedImages(ImageData):
    """Images of an unlabelled pool for training, and the validation and test images of ``data``.

    With ``index``, the training images are those that :func:`select_samples` selected. If there is
    no such file and ``count`` is given, the selection is made when training begins, after the
    method's checks of the networks, with its (first) teacher, and stored. Without ``index``, all
    images of the pool are used.

    The training images have no labels. They are resized to the size of ``data``, and normalised
    with its mean and standard deviation.

    Args:
        pool: a map-style dataset as for :func:`select_samples`, such as :class:`ImagePool`; its
            labels are not used.
        data: data module with the classes of the teacher. Its training images are not used:
            ``FromDatasets(None, val)`` needs none.
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
        if count is not None:
            require_at_least("count", count, 1)
            if count > len(cast(Sized, pool)):
                raise ValueError(f"count must be at most the number of images of the pool, {len(cast(Sized, pool))}, got {count}")
        require_at_least("select_batch_size", select_batch_size, 1)
        if isinstance(max_memory, bool) or not isinstance(max_memory, (int, float)) or not max_memory >= 0:
            raise ValueError(f"max_memory must be a number >= 0, in GiB, got {max_memory!r}")
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
        if stage in (None, "fit"):
            teacher = self._teacher()
            if teacher is not None:
                _hash_before_casts(teacher)
            if self.index is not None and self.index.exists():
                self._existing()  # raises if it is another index
            if self.trainer is None:
                self._make_train()

    def make_splits(self) -> Mapping[str, Dataset]:
        self.setup()
        return self.splits

    # The training images are selected after the checks that Lightning's hook on_fit_start makes.

    def train_dataloader(self) -> Loader:
        self._make_train()
        return super().train_dataloader()

    def fingerprint(self, split: str = "train") -> str:
        if split != "train":
            return self.data.fingerprint(split)
        self._make_train()
        return super().fingerprint(split)

    def _make_train(self) -> None:
        if "train" not in self.splits:
            self.splits = {**self.splits, "train": self._training_images()}

    def _teacher(self) -> nn.Module | None:
        trainer: Any = self.trainer
        teacher = None if trainer is None else getattr(trainer.lightning_module, "teacher", None)
        return teacher if isinstance(teacher, nn.Module) else None

    def _existing(self) -> SampleIndex:
        """Return the selection in the file, after checks."""
        index, teacher = cast(Path, self.index), self._teacher()
        selected = SampleIndex.load(index)
        name = f"index: {os.fspath(index)!r}"
        hashed = None if teacher is None else _hash_before_casts(teacher)
        selected.check(teacher=hashed, pool=self.pool, count=self.count, name=name)
        for option, value in (("mean", self.mean), ("std", self.std)):
            used, wanted = selected.provenance[option], None if value is None else [float(x) for x in value]
            if used != wanted:
                raise ValueError(f"{name} was made with another {option} ({used}) than that of data ({wanted})")
        size = selected.provenance["size"] or list(images_of(self.pool, [0], None).shape[2:])
        if self.image_shape is not None and size != list(self.image_shape[1:]):
            raise ValueError(f"{name} was made with images of size {size}, but those of data have {list(self.image_shape[1:])}")
        return selected

    def _training_images(self) -> Dataset:
        size = None if self.image_shape is None else self.image_shape[1:]
        first = images_of(self.pool, [0], size)
        if self.image_shape is not None and first.shape[1] != self.image_shape[0]:
            raise ValueError(f"the images of the pool must have {self.image_shape[0]} channels, as those of data, got {first.shape[1]}")
        indices, pool_name = torch.arange(len(cast(Sized, self.pool))), ""
        if self.index is not None:
            selected = self._selected(size)
            indices, pool_name = selected.indices, selected.provenance["pool"]
        positions = indices.tolist()
        if first.nbytes * len(positions) <= self.max_memory * 2**30:
            parts = [images_of(self.pool, part.tolist(), size) for part in indices.split(_CHUNK)]
            formats = sorted({(str(part.dtype), tuple(part.shape[1:])) for part in parts})
            if len(formats) > 1:
                raise ValueError(f"the images of the pool must have one dtype and one shape, got {formats}")
            return TensorImages(image=torch.cat(parts))
        description = f"{pool_name} {type(self.pool).__qualname__} {size} {hashlib.sha256(indices.numpy().tobytes()).hexdigest()}"
        return ItemImages(PoolImages(self.pool, positions, size), fingerprint=description if pool_name else None)

    def _selected(self, size: tuple[int, int] | None) -> SampleIndex:
        """Return the selection, which is made now if it does not exist."""
        index, teacher = cast(Path, self.index), self._teacher()
        trainer: Any = self.trainer
        if index.exists():
            return self._existing()
        if self.count is None or teacher is None:
            raise FileNotFoundError(
                f"index: there is no file {os.fspath(index)!r}: make it with kdkernels.data.select_samples, or give count, the number of images to "
                "select with the teacher when training begins"
            )
        total = len(cast(Sized, self.pool))
        rank_zero_info(f"selecting {self.count} of {total} images with the teacher")
        return select_samples(
            teacher,
            self.pool,
            self.count,
            index,
            size=size,
            mean=self.mean,
            std=self.std,
            batch_size=self.select_batch_size,
            device=trainer.strategy.root_device,
            on_progress=_every_tenth(),
            teacher_hash=_hash_before_casts(teacher),
        )


class PoolImages(Dataset):
    """Images at given positions of a pool, without labels."""

    def __init__(self, pool: Dataset, positions: list[int], size: tuple[int, int] | None):
        self.pool, self.positions, self.size = pool, positions, size

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> Tensor:
        return images_of(self.pool, [self.positions[i]], self.size)[0]


_HASHES: WeakKeyDictionary[nn.Module, tuple[torch.dtype, str]] = WeakKeyDictionary()


def _hash_before_casts(teacher: nn.Module) -> str:
    """Return the hash of a teacher, before Lightning has cast it to another precision."""
    dtype = next(teacher.parameters(), torch.empty(0)).dtype
    known = _HASHES.get(teacher)
    if known is None or known[0] == dtype:
        _HASHES[teacher] = known = dtype, hash_of(teacher)
    return known[1]


def _every_tenth() -> Callable[[int, int], None]:
    """Return a function that reports the progress of the first process in steps of 10 %."""
    reported = 0

    def report(done: int, total: int) -> None:
        nonlocal reported
        if 10 * done // total > reported:
            reported = 10 * done // total
            rank_zero_info(f"scored {done} of {total} images")

    return report
