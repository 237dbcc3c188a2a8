"""Convert the batches of any data loader to dicts."""

from __future__ import annotations

import torch
from torch import Tensor


def as_batch(batch: object) -> dict:
    """Return the batch as a dict with ``image`` and, if it has labels, ``label``.

    Args:
        batch: a dict with these keys; images alone; or a tuple or list (images,) or (images,
            labels). Labels [B, 1] become [B], and integer labels become int64.

    Raises:
        TypeError: the batch has another type, or images are not floating point.
    """
    if isinstance(batch, Tensor):
        batch = {"image": batch}
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        batch = dict(zip(("image", "label"), batch, strict=False))
    if not isinstance(batch, dict) or "image" not in batch:
        raise TypeError(f'a batch must be images, (image, label), or a dict with "image" and optionally "label"; got {type(batch).__name__}')
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
    if label.dim() == 2 and label.shape[1] == 1:
        label = label[:, 0]
    if not label.is_floating_point() and label.dtype != torch.int64:
        label = label.long()
    return batch if label is batch["label"] else {**batch, "label": label}
