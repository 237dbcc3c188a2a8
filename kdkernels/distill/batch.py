"""Convert the batches of any data loader to dicts."""

from __future__ import annotations

import torch
from torch import Tensor

_OTHER_NAMES_OF_LABELS = frozenset({"labels", "target", "targets", "y"})


def as_batch(batch: object) -> dict:
    """Return the batch as a dict with ``image`` and, if it has labels, ``label``.

    Args:
        batch: a dict with these keys; images alone; or a tuple or list (images,) or (images,
            labels). Labels [B, 1] become [B], and integer labels become int64.

    Raises:
        TypeError: the batch has another type, or images are not floating point.
        ValueError: the batch has no "label", but a key such as "labels"; or it has another number
            of labels than of images.
    """
    if isinstance(batch, Tensor):
        batch = {"image": batch}
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        batch = dict(zip(("image", "label"), batch, strict=False))
    if not isinstance(batch, dict) or "image" not in batch:
        raise TypeError(f'a batch must be images, (image, label), or a dict with "image" and optionally "label"; got {type(batch).__name__}')
    other_names = sorted(_OTHER_NAMES_OF_LABELS.intersection(batch))
    if "label" not in batch and other_names:  # else the network would be trained without labels
        raise ValueError(f'the labels of a batch must have the key "label", but the batch has the key {other_names[0]!r}: rename it')
    if batch.get("label", batch) is None:
        batch = {name: value for name, value in batch.items() if name != "label"}
    for name in ("image", "label"):
        if name in batch and not isinstance(batch[name], Tensor):
            raise TypeError(f"the {name} of a batch must be a tensor, got {type(batch[name]).__name__}")
    image, label = batch["image"], batch.get("label")
    if not image.is_floating_point():
        raise TypeError(f"images must be floating point, got {image.dtype}: convert them in the dataset, or use kdkernels.data.FromDatasets")
    if label is None:
        return batch
    if label.dim() == 0 or len(label) != len(image):
        raise ValueError(f"a batch must have one label for each of its {len(image)} images, got labels of shape {list(label.shape)}")
    if label.dim() == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if not label.is_floating_point() and label.dtype != torch.int64:
        label = label.long()
    return batch if label is batch["label"] else {**batch, "label": label}
