"""Base classes of the data modules, which return batches as dicts and augment on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence, Sized
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import MIXUP_WITH_LABEL_MAPS, Augment, has_label_maps
from .decode import as_pixels, is_pil
from .keyed_random import seeded
from .loading import Batches, BatchRequest, Loader, OrderedBatches


class ImageData(L.LightningDataModule):
    """Base class of data modules with images and labels.

    A subclass provides the datasets in :meth:`make_splits`.

    A batch, after :meth:`finish` (Lightning calls it once the batch is on the device), is a dict of

    - ``image`` [B, C, H, W] float32 (float64 if the dataset returns float64), normalised;
    - ``label``, if the data have labels: class numbers [B] int64, probabilities [B, K] float32, or
      label maps [B, H, W] int64;
    - ``index`` [B] int64, the positions of the samples in their split;
    - in training also ``view``, the number of the augmentation, and ``share``, see
      :class:`Batches`.

    Without Lightning, iterate with ``for batch in map(data.finish, data.train_dataloader())``.

    Args:
        batch_size: images per batch and process.
        augment: augmentation of the training images.
        order_seed: seed of the order of the training images.
        num_workers: number of processes that load images; 0 is best if the images are in memory.
    """

    num_classes: int | None = None
    classes: Sequence[str] | None = None  # names of the classes
    resize: str | None = None  # name of the rule by which images are resized to ``image_shape``; None: images are not resized
    label_maps = False  # whether labels are maps with a class for each pixel
    image_shape: tuple[int, int, int] | None = None
    mean: Sequence[float] | None = None  # per channel, on a scale on which white is 1
    std: Sequence[float] | None = None

    def __init__(self, batch_size: int = 128, augment: Augment | None = None, order_seed: int = 0, num_workers: int = 0):
        super().__init__()
        require_at_least("batch_size", batch_size, 1)
        require_at_least("num_workers", num_workers, 0)
        self.batch_size, self.augment, self.order_seed, self.num_workers = batch_size, augment, order_seed, num_workers
        self.splits: Mapping[str, Dataset] = {}
        self._scale: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}  # mean and std by device and dtype of the images

    @property
    def views(self) -> int | None:
        """Number of augmented images per training sample; ``None``: a new one each epoch."""
        return self.augment.views if self.augment is not None else 1

    def make_splits(self) -> Mapping[str, Dataset]:
        """Return the datasets "train", "val" and optionally "test".

        A dataset is indexed with a :class:`BatchRequest` and returns a batch that is not
        normalised: images are uint8, or float in [0, 1].
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if not self.splits:
            self.splits = self.make_splits()
        if self.label_maps and self.augment is not None and self.augment.mixup:
            raise ValueError(MIXUP_WITH_LABEL_MAPS)

    def train_dataloader(self) -> Loader:
        order: dict[str, Any] = {"shuffle": True, "seed": self.order_seed, "views": self.views, "min_samples": 2}
        trainer: Any = self.trainer  # Lightning does not declare overfit_batches
        if trainer is not None:
            order |= {"accumulate": lambda: trainer.accumulate_grad_batches, "limit": trainer.overfit_batches or trainer.limit_train_batches}
            order["shuffle"] = not trainer.overfit_batches
        return self._loader("train", **order)

    def val_dataloader(self) -> Loader:
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> Loader:
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> Loader:
        """Return a loader of the test split or, if there is none, of the validation split."""
        return self._loader("test" if "test" in self.splits else "val", shuffle=False)

    def _loader(self, split: str, **order: Any) -> Loader:
        if split not in self.splits:
            raise ValueError(
                f"{type(self).__name__} has no split {split!r}, only {', '.join(self.splits)}"
                if self.splits
                else "call setup() before requesting a dataloader"
            )
        process: dict[str, Any] = {"rank": self.trainer.global_rank, "world": self.trainer.world_size} if self.trainer is not None else {}
        dataset = self.splits[split]
        batches = Batches if order["shuffle"] else OrderedBatches
        return Loader(dataset, sampler=batches(len(cast(Sized, dataset)), self.batch_size, **order, **process), num_workers=self.num_workers)

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        batch = self.finish(batch)
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)  # for float64 and bfloat16 networks

    def finish(self, batch: dict) -> dict:
        """Augment (training batches only) and normalise a batch on its device.

        Label maps become int64.
        """
        if self.augment is not None and batch.get("view") is not None:
            batch = self.augment(batch, self.normalize)
        else:
            batch = {**batch, "image": self.normalize(batch["image"])}
        return {**batch, "label": batch["label"].long()} if has_label_maps(batch) else batch

    def normalize(self, image: Tensor) -> Tensor:  # [..., C, H, W] uint8 or float32 -> float32, float64 -> float64
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        if self.mean is None:
            return image
        key = (image.device, image.dtype)
        if key not in self._scale:
            mean, std = (torch.tensor(v, device=image.device, dtype=image.dtype).view(-1, 1, 1) for v in (self.mean, self.std))
            self._scale[key] = mean, std
        mean, std = self._scale[key]
        return (image - mean) / std

    def preprocessing(self) -> dict:
        """Return the preprocessing that a network trained on these data expects, as plain values.

        The keys are ``classes`` (names, or ``None``), ``image_shape`` [C, H, W], ``resize``, and
        ``mean`` and ``std`` per channel on a scale on which white is 1 (or ``None``).
        """
        values = {name: getattr(self, name) for name in ("classes", "image_shape", "mean", "std")}
        return {name: None if value is None else list(value) for name, value in values.items()} | {"resize": self.resize}

    def fingerprint(self, split: str = "train") -> str:
        """Return a hash, the key of caches, that changes when the images of a split change."""
        description = f"{cast(Any, self.splits[split]).fingerprint()} {self.augment!r} {self.mean} {self.std}"
        return hashlib.sha256(description.encode()).hexdigest()


class TensorImages(Dataset):
    """Images in memory: named tensors [N, ...], ``image`` and, if there are labels, ``label``."""

    def __init__(self, **fields: Tensor):
        self.fields = fields

    def __len__(self) -> int:
        return len(self.fields["image"])

    def __getitem__(self, request: BatchRequest | int | list[int]) -> dict:
        index = request.index if isinstance(request, BatchRequest) else request
        return add_request_fields({name: field[index] for name, field in self.fields.items()}, request)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, field in sorted(self.fields.items()):
            digest.update(f"{name} {field.dtype} {tuple(field.shape)}".encode())
            digest.update(field.contiguous().numpy().data)
        return digest.hexdigest()


class ItemImages(Dataset):
    """Batches from a dataset that returns one sample at a time.

    A sample is (image, label), a dict with "image" and optionally "label", or an image alone.
    Random transforms in the dataset use the global generators of torch, numpy and Python. These are
    seeded here by (seed, view, sample), and also by ``split`` if it is not 0, so that validation
    images do not get the random numbers of training images.
    """

    def __init__(self, samples: Dataset, seed: int = 0, fingerprint: str | None = None, num_classes: int | None = None, split: int = 0):
        self.samples, self.seed, self._fingerprint, self.num_classes, self.split = samples, seed, fingerprint, num_classes, split

    def __len__(self) -> int:
        return len(cast(Sized, self.samples))

    def __getitem__(self, request: BatchRequest | int | list[int]) -> dict:
        if isinstance(request, int):
            return self._sample(request, 0)
        index, view = (request.index, request.view or 0) if isinstance(request, BatchRequest) else (request, 0)
        samples = [self._sample(i, view) for i in index]
        shapes = {tuple(s["image"].shape) for s in samples}
        if len(shapes) > 1:
            different = next(i for i, s in zip(index, samples, strict=True) if s["image"].shape != samples[0]["image"].shape)
            raise ValueError(
                f"the images of a batch must have the same shape, got {sorted(shapes)}: sample {different} differs from sample {index[0]}; "
                "resize or crop the images in the dataset"
            )
        for i, s in zip(index, samples, strict=True):
            if s.keys() != samples[0].keys():
                raise ValueError(f"all samples must have the same fields; sample {i} has {sorted(s)}, sample {index[0]} has {sorted(samples[0])}")
            if s["image"].dtype != samples[0]["image"].dtype:
                raise ValueError(
                    f"all images must have the same dtype, because it determines the value of white; sample {i} has {s['image'].dtype}, "
                    f"sample {index[0]} has {samples[0]['image'].dtype}"
                )
        if "label" in samples[0]:
            self._check_labels(index, [s["label"] for s in samples])
        return add_request_fields({name: torch.stack([s[name] for s in samples]) for name in samples[0]}, request)

    def _check_labels(self, index: list[int], labels: list[Tensor]) -> None:
        if self.num_classes is None and len({label.shape for label in labels}) == 1:
            return
        for i, label in zip(index, labels, strict=True):
            if label.shape != labels[0].shape:
                raise ValueError(
                    f"all labels must have the same shape; sample {i} has {list(label.shape)}, sample {index[0]} has {list(labels[0].shape)}"
                )
            if self.num_classes is None:
                continue
            if label.dim() == 0 and not 0 <= label < self.num_classes:
                raise ValueError(f"labels must lie in [0, {self.num_classes - 1}], the classes of the data; sample {i} has {int(label)}")
            if label.dim() == 1 and len(label) != self.num_classes:
                raise ValueError(f"labels must be probabilities of {self.num_classes} classes; the label of sample {i} has {len(label)}")

    def _sample(self, index: int, view: int) -> dict[str, Tensor]:
        with seeded(self.seed, view, index, *([self.split] if self.split else [])):
            try:
                sample = self.samples[index]
            except StopIteration as error:  # StopIteration would silently end the epoch
                raise RuntimeError(f"the dataset raised StopIteration for sample {index}") from error
        return as_sample(sample, index)

    def fingerprint(self) -> str:
        """Return the user's fingerprint, or a hash of the dataset's size and of 16 samples.

        The hash does not notice changes in other samples. A dataset whose samples may change needs
        a fingerprint given by the user.
        """
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256(f"{type(self.samples).__qualname__} {len(self)}".encode())
        for i in torch.linspace(0, len(self) - 1, min(16, len(self))).long().tolist():
            sample = self._sample(i, 0)
            digest.update(sample["image"].contiguous().numpy().data)
            digest.update(str(sample["label"].tolist() if "label" in sample else None).encode())
        return digest.hexdigest()


def add_request_fields(batch: dict, request: BatchRequest | int | list[int]) -> dict:
    """Add ``index`` to a batch and, if the samples are to be augmented, ``view`` and ``share``."""
    if not isinstance(request, BatchRequest):
        return {**batch, "index": torch.as_tensor(request)}
    batch = {**batch, "index": torch.tensor(request.index)}
    return batch if request.view is None else {**batch, "view": request.view, "share": request.share}


def as_sample(sample: object, index: int) -> dict[str, Tensor]:
    """Convert a sample of a user's dataset to tensors.

    Returns the image [C, H, W], the label [], [K] or [H, W] if there is one, and other fields of a
    dict.
    """
    if isinstance(sample, (Tensor, np.ndarray)) or is_pil(sample):
        sample = {"image": sample}
    elif isinstance(sample, (tuple, list)) and sample:
        sample = dict(zip(("image", "label"), sample, strict=False))
    if not isinstance(sample, dict) or "image" not in sample:
        raise TypeError(
            f'sample {index} must be an image, (image, label), or a dict with "image" and optionally "label", got {type(sample).__name__}'
        )
    image = as_pixels(sample["image"], f"the image of sample {index}")
    has_label = sample.get("label") is not None
    label = {"label": as_label(_as_tensor(sample["label"], "label", index), index, image.shape[1:])} if has_label else {}
    others = {name: _as_tensor(value, name, index) for name, value in sample.items() if name not in ("image", "label")}
    reserved = sorted(_RESERVED_FIELDS.intersection(others))
    if reserved:
        raise ValueError(f"sample {index} has fields {reserved}, names that are reserved in a batch: rename them in the dataset")
    return {"image": image, **label, **others}


_RESERVED_FIELDS = {"index", "view", "share", "mix", "mixed_label"}


def _as_tensor(value: object, name: str, index: int) -> Tensor:
    try:
        if is_pil(value):
            value = np.array(value)  # of an image with a palette the indices, not the colours
        if isinstance(value, np.ndarray):  # torch supports neither negative strides nor other byte orders
            value = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"field {name!r} of sample {index} must be a number, an array or a tensor, got {type(value).__name__}") from error


def as_label(label: Tensor, index: int, size: Sequence[int] = ()) -> Tensor:
    """Convert a label to a class number int64 [], probabilities float32 [K], or a label map [H, W].

    A label map keeps its integer dtype and must have the ``size`` [H, W] of the image.
    """
    if label.dim() == 2 and label.numel() > 1 and not label.is_floating_point():
        if list(label.shape) != list(size):
            raise ValueError(f"the label map of sample {index} must have the image's height and width {list(size)}, got shape {list(label.shape)}")
        return label.to(torch.uint8) if label.dtype == torch.bool else label
    if label.dim() == 0 or label.numel() == 1:
        label = label.reshape(())
        if label.is_complex() or (label.is_floating_point() and label != label.round()) or label.dtype == torch.bool:
            raise TypeError(f"the label of sample {index} must be a class number, or class probabilities [K], got {label.item()!r}")
        return label.long()
    if label.dim() != 1:
        kind = "floating point" if label.is_floating_point() else "integers"
        raise ValueError(
            f"the label of sample {index} must be a class number, class probabilities [K], or a label map of integers [H, W], got {kind} of shape "
            f"{list(label.shape)}"
        )
    label = label.float()
    if not (label.min() >= 0 and (label.sum() - 1).abs() <= 1e-3):
        raise ValueError(
            f"the label of sample {index} must be class probabilities, which are >= 0 and sum to 1, got a minimum of {label.min():.4g} and a sum of "
            f"{label.sum():.4g} (the losses of this package do not support several classes per image)"
        )
    return label


def require_positive(name: str, values: Sequence[float] | None) -> None:
    if values is not None and not all(value > 0 for value in values):
        raise ValueError(f"{name} must be positive, got {list(values)}")


def check_image_size(name: str, size: object, multiple: int = 1) -> None:
    """Raise ValueError unless ``size`` is two integers, multiples of ``multiple``."""
    sides = list(size) if isinstance(size, Sequence) and not isinstance(size, str) else [size]
    if len(sides) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < multiple or n % multiple for n in sides):
        kind = "two integers >= 1" if multiple == 1 else f"two multiples of {multiple}"
        raise ValueError(f"{name} must be the height and the width of the images, {kind}, got {size!r}")


def require_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
