"""Batches as dicts, whatever a loader gives."""

from __future__ import annotations

import torch
from torch import Tensor


def as_batch(batch: object) -> dict:
    """The batch as a dict with ``image`` and, if it has labels, ``label``.

    Args:
        batch: such a dict; images alone; or a tuple or list of images, or of images and labels. Labels [B, 1] become [B], and integers
            become int64.

    Raises:
        TypeError: anything else, or images that are not floating point.
    """
    if isinstance(batch, Tensor):
        batch = {"image": batch}
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        batch = dict(zip(("image", "label"), batch, strict=False))
    if not isinstance(batch, dict) or "image" not in batch:
        raise TypeError(f'a batch must be images, (image, label) or a dict with "image" and perhaps "label", got {type(batch).__name__}')
    if batch.get("label", batch) is None:
        batch = {name: value for name, value in batch.items() if name != "label"}
    for name in ("image", "label"):
        if name in batch and not isinstance(batch[name], Tensor):
            raise TypeError(f"{name} of a batch must be a tensor, got {type(batch[name]).__name__}")
    image, label = batch["image"], batch.get("label")
    if not image.is_floating_point():
        raise TypeError(f"images must be floating point, got {image.dtype}: scale them in the dataset, or give it to kdkernels.data.FromDatasets")
    if label is None:
        return batch
    if label.dim() == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if not label.is_floating_point() and label.dtype != torch.int64:
        label = label.long()
    return batch if label is batch["label"] else {**batch, "label": label}
