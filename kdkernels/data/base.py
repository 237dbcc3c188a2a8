"""What the data modules share: batches as dicts, order and augmentation from keys, normalisation on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import MIXUP_OF_MAPS, Augment, has_label_maps
from .decode import as_pixels, is_pil
from .keyed_random import seeded
from .loading import Batches, Draw, Loader, OrderedBatches


class ImageData(L.LightningDataModule):
    """Data of images and labels. A subclass says what they are in :meth:`make_splits`.

    A batch, after :meth:`finish` (Lightning calls it once the batch is on the device), is a dict of

    - ``image`` [B, C, H, W] float32 (float64 where a dataset gives that), normalised;
    - ``label``, if the data have labels: class numbers [B] int64, probabilities [B, K] float32, or label maps [B, H, W] int64;
    - ``index`` [B] int64, the samples' places in their split;
    - in training also ``view``, which augmentation this is, and ``share``, see :class:`Batches`.

    Outside Lightning: ``for batch in map(data.finish, data.train_dataloader())``.

    Args:
        batch_size: images per batch and process.
        augment: of the training images.
        order_seed: of the order in which training images are shown.
        num_workers: processes that load images; 0 is best where images are in memory.
    """

    num_classes: int | None = None
    classes: Sequence[str] | None = None  # their names
    resize: str | None = None  # how images of other sizes become images of ``image_shape``; None: they are not resized
    label_maps = False  # whether labels are maps, a class for each pixel
    image_shape: tuple[int, int, int] | None = None
    mean: Sequence[float] | None = None  # per channel, on a scale where white is 1
    std: Sequence[float] | None = None

    def __init__(self, batch_size: int = 128, augment: Augment | None = None, order_seed: int = 0, num_workers: int = 0):
        super().__init__()
        require_at_least("batch_size", batch_size, 1)
        require_at_least("num_workers", num_workers, 0)
        self.batch_size, self.augment, self.order_seed, self.num_workers = batch_size, augment, order_seed, num_workers
        self.splits: dict[str, Dataset] = {}
        self._scale: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}  # mean and std where the images are

    @property
    def views(self) -> int | None:
        """How many different images a training sample has; ``None``: one more each epoch."""
        return self.augment.views if self.augment is not None else 1

    def make_splits(self) -> dict[str, Dataset]:
        """Datasets "train", "val" and perhaps "test" that take a :class:`Draw` and give a raw batch: uint8, or float in [0, 1]."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if not self.splits:
            self.splits = self.make_splits()
        if self.label_maps and self.augment is not None and self.augment.mixup:
            raise ValueError(MIXUP_OF_MAPS)

    def train_dataloader(self) -> Loader:
        order = {"shuffle": True, "seed": self.order_seed, "views": self.views, "least": 2}
        if self.trainer is not None:
            trainer = self.trainer
            order |= {"accumulate": lambda: trainer.accumulate_grad_batches, "limit": trainer.overfit_batches or trainer.limit_train_batches}
            order["shuffle"] = not trainer.overfit_batches
        return self._loader("train", **order)

    def val_dataloader(self) -> Loader:
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> Loader:
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> Loader:
        """Of the test images, or of the validation images where there are no others."""
        return self._loader("test" if "test" in self.splits else "val", shuffle=False)

    def _loader(self, split: str, **order) -> Loader:
        if split not in self.splits:
            raise ValueError(f"{type(self).__name__} has no {split!r} images" if self.splits else "call setup() before asking for batches")
        process = {"rank": self.trainer.global_rank, "world": self.trainer.world_size} if self.trainer is not None else {}
        dataset = self.splits[split]
        batches = Batches if order["shuffle"] else OrderedBatches
        return Loader(dataset, sampler=batches(len(dataset), self.batch_size, **order, **process), num_workers=self.num_workers)

    def on_after_batch_transfer(self, batch: dict, dataloader_idx: int) -> dict:
        batch = self.finish(batch)
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)  # float64, bfloat16 networks

    def finish(self, batch: dict) -> dict:
        """Augments (a training batch) and normalises, on the batch's device. Label maps, which travel as uint8, become int64."""
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
            self._scale[key] = tuple(torch.tensor(v, device=image.device, dtype=image.dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        mean, std = self._scale[key]
        return (image - mean) / std

    def preprocessing(self) -> dict:
        """What a network trained on these data needs to be used, as plain values: ``classes`` (names, or ``None``), ``image_shape`` [C, H, W],
        ``resize``, ``mean`` and ``std`` per channel on a scale where white is 1 (or ``None``)."""
        values = {name: getattr(self, name) for name in ("classes", "image_shape", "mean", "std")}
        return {name: None if value is None else list(value) for name, value in values.items()} | {"resize": self.resize}

    def fingerprint(self, split: str = "train") -> str:
        """Changes when the images that a network sees change: what caches are keyed with."""
        look = f"{self.splits[split].fingerprint()} {self.augment!r} {self.mean} {self.std}"
        return hashlib.sha256(look.encode()).hexdigest()


class TensorImages(Dataset):
    """Images in memory: fields [N, ...], among them ``image`` and, if there are labels, ``label``."""

    def __init__(self, **fields: Tensor):
        self.fields = fields

    def __len__(self) -> int:
        return len(self.fields["image"])

    def __getitem__(self, draw: Draw | int | list[int]) -> dict:
        index = draw.index if isinstance(draw, Draw) else draw
        return with_draw({name: field[index] for name, field in self.fields.items()}, draw)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, field in sorted(self.fields.items()):
            digest.update(f"{name} {field.dtype} {tuple(field.shape)}".encode())
            digest.update(field.contiguous().numpy().data)
        return digest.hexdigest()


class ItemImages(Dataset):
    """Batches from a dataset that gives one sample at a time: (image, label), a dict with "image" and perhaps "label", or an image alone.

    The sample's own random transforms draw from torch's, numpy's and Python's global generators, seeded here by (seed, view, sample), and by
    ``split`` where that is not 0: images to validate on have other random numbers than those to train on.
    """

    def __init__(self, samples: Dataset, seed: int = 0, fingerprint: str | None = None, num_classes: int | None = None, split: int = 0):
        self.samples, self.seed, self._fingerprint, self.num_classes, self.split = samples, seed, fingerprint, num_classes, split

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, draw: Draw | int | list[int]) -> dict:
        if isinstance(draw, int):
            return self._sample(draw, 0)
        index, view = (draw.index, draw.view or 0) if isinstance(draw, Draw) else (draw, 0)
        samples = [self._sample(i, view) for i in index]
        shapes = {tuple(s["image"].shape) for s in samples}
        if len(shapes) > 1:
            odd = next(i for i, s in zip(index, samples, strict=True) if s["image"].shape != samples[0]["image"].shape)
            raise ValueError(f"images of a batch must have one shape; sample {odd} differs from sample {index[0]}: {sorted(shapes)}")
        for i, s in zip(index, samples, strict=True):
            if s.keys() != samples[0].keys():
                raise ValueError(f"samples must have the same fields; sample {i} has {sorted(s)}, sample {index[0]} {sorted(samples[0])}")
            if s["image"].dtype != samples[0]["image"].dtype:
                raise ValueError(
                    f"images must have one dtype, which says what is white; sample {i} has {s['image'].dtype}, sample {index[0]} "
                    f"{samples[0]['image'].dtype}"
                )
        if "label" in samples[0]:
            self._check_labels(index, [s["label"] for s in samples])
        return with_draw({name: torch.stack([s[name] for s in samples]) for name in samples[0]}, draw)

    def _check_labels(self, index: list[int], labels: list[Tensor]) -> None:
        if self.num_classes is None and len({label.shape for label in labels}) == 1:
            return
        for i, label in zip(index, labels, strict=True):
            if label.shape != labels[0].shape:
                raise ValueError(f"labels must be of one kind; sample {i} has shape {list(label.shape)}, sample {index[0]} {list(labels[0].shape)}")
            if label.dim() == 0 and not 0 <= label < self.num_classes:
                raise ValueError(f"labels must lie in [0, {self.num_classes - 1}], the data's classes; sample {i} has {int(label)}")
            if label.dim() == 1 and len(label) != self.num_classes:
                raise ValueError(f"labels must be probabilities of {self.num_classes} classes; sample {i} has {len(label)}")

    def _sample(self, index: int, view: int) -> dict[str, Tensor]:
        with seeded(self.seed, view, index, *([self.split] if self.split else [])):
            try:
                sample = self.samples[index]
            except StopIteration as error:  # which would end the epoch without a word
                raise RuntimeError(f"the dataset raised StopIteration for sample {index}") from error
        return as_sample(sample, index)

    def fingerprint(self) -> str:
        """As given, or from the size and the bytes of 16 samples: a dataset that changes elsewhere needs one that is given."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256(f"{type(self.samples).__qualname__} {len(self)}".encode())
        for i in torch.linspace(0, len(self) - 1, min(16, len(self))).long().tolist():
            sample = self._sample(i, 0)
            digest.update(sample["image"].contiguous().numpy().data)
            digest.update(str(sample["label"].tolist() if "label" in sample else None).encode())
        return digest.hexdigest()


def with_draw(batch: dict, draw: Draw | int | list[int]) -> dict:
    """The batch with the places of its samples and, if they are to be augmented, the view."""
    if not isinstance(draw, Draw):
        return {**batch, "index": torch.as_tensor(draw)}
    batch = {**batch, "index": torch.tensor(draw.index)}
    return batch if draw.view is None else {**batch, "view": draw.view, "share": draw.share}


def as_sample(sample: object, index: int) -> dict[str, Tensor]:
    """A sample of a user's dataset as tensors: image [C, H, W], label [], [K] or [H, W] if it has one, and what else a dict holds."""
    if isinstance(sample, (Tensor, np.ndarray)) or is_pil(sample):
        sample = {"image": sample}
    elif isinstance(sample, (tuple, list)) and sample:
        sample = dict(zip(("image", "label"), sample, strict=False))
    if not isinstance(sample, dict) or "image" not in sample:
        raise TypeError(f'sample {index} must be an image, (image, label) or a dict with "image" and perhaps "label", got {type(sample).__name__}')
    image = as_pixels(sample["image"], f"the image of sample {index}")
    label = {"label": as_label(_as_tensor(sample["label"], "label", index), index, image.shape[1:])} if "label" in sample else {}
    others = {name: _as_tensor(value, name, index) for name, value in sample.items() if name not in ("image", "label")}
    taken = sorted(_OWN_FIELDS.intersection(others))
    if taken:
        raise ValueError(f"sample {index} has fields {taken}, names that a batch has for itself: call them otherwise")
    return {"image": image, **label, **others}


_OWN_FIELDS = {"index", "view", "share", "mix", "mixed_label"}


def _as_tensor(value: object, name: str, index: int) -> Tensor:
    try:
        return torch.as_tensor(np.array(value) if is_pil(value) else value)  # of a PIL image with a palette the numbers, not the colours
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"field {name!r} of sample {index} must be a number, an array or a tensor, got {type(value).__name__}") from error


def as_label(label: Tensor, index: int, size: Sequence[int] = ()) -> Tensor:
    """A class's number as int64 [], probabilities of the classes as float32 [K], or a label map of integers of the image's ``size`` [H, W]."""
    if label.dim() == 2 and label.numel() > 1 and not label.is_floating_point():
        if list(label.shape) != list(size):
            raise ValueError(f"the label map of sample {index} must have the image's height and width {list(size)}, got shape {list(label.shape)}")
        return label.to(torch.uint8) if label.dtype == torch.bool else label
    if label.dim() == 0 or label.numel() == 1:
        label = label.reshape(())
        if label.is_complex() or (label.is_floating_point() and label != label.round()) or label.dtype == torch.bool:
            raise TypeError(f"the label of sample {index} must be a class's number, or probabilities of the classes [K], got {label.item()!r}")
        return label.long()
    if label.dim() != 1:
        raise ValueError(f"the label of sample {index} must be a class's number, or probabilities of the classes [K], got shape {list(label.shape)}")
    label = label.float()
    if not (label.min() >= 0 and (label.sum() - 1).abs() <= 1e-3):
        raise ValueError(
            f"the label of sample {index} must be probabilities, none negative and of sum 1, got {label.min():.4g} as the least and a sum of "
            f"{label.sum():.4g} (several classes at once are no labels of this package's losses)"
        )
    return label


def require_positive(name: str, values: Sequence[float] | None) -> None:
    if values is not None and not all(value > 0 for value in values):
        raise ValueError(f"{name} must be positive, got {list(values)}")


def require_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
