"""Augmentation of whole batches, on the device that holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .keyed_random import bits, uniform

MIXUP_WITH_LABEL_MAPS = "mixup cannot be used with label maps: it would need two labels for each pixel"
# The purpose of a random number, a part of the key from which it is computed.
_CROP, _FLIP, _CUTOUT, _MIX, _PARTNER, _BOX, _MIX_KIND, _ROTATION = range(8)


class Augment:
    """Crop, flip, rotation, cutout, mixup and cutmix. The augmentation of a sample depends only on
    ``seed``, the index of the sample and the view (the epoch).

    Args:
        crop: width in pixels of a black border added on each side before a random crop to the
            original size; the usual value for CIFAR is 4.
        flip: mirror left and right with probability 1/2.
        cutout: side in pixels of a square that is set to the mean colour and centred anywhere in
            the image (DeVries, Taylor 2017).
        mixup: alpha of the Beta distribution of the weights of pairs of images; 0 disables mixup
            (Zhang et al. 2018).
        cutmix: alpha of the Beta distribution for pasting a box of one image into another; 0
            disables cutmix (Yun et al. 2019). With both mixup and cutmix, each image gets one of
            them.
        rotate: largest angle in degrees by which an image is rotated about its centre, in either
            direction. Pixels are taken from the nearest neighbour; those from outside are black.
        views: number of different augmentations of a sample; epoch e shows view ``e % views``.
            ``None``: a new augmentation each epoch.
        seed: seed of all random numbers of the augmentation.
        label_fill: label, in label maps, of pixels that a crop or a rotation brings in from outside
            the image. The default, 255, is the label that :class:`kdkernels.tasks.Segmentation`
            ignores by default.

    mixup and cutmix pair the images of a batch. They add ``mixed_label`` [B] to the batch, and
    ``mix`` [B], the weight of ``label``; ``mixed_label`` has the weight ``1 - mix``.

    Label maps [B, H, W] are moved together with their images, by nearest neighbour. cutout does not
    change them. cutmix pastes the same box into the label map and then adds nothing to the batch.
    mixup of label maps raises ValueError: it would need two labels for each pixel.
    """

    def __init__(
        self,
        crop: int = 0,
        flip: bool = False,
        cutout: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        views: int | None = None,
        seed: int = 0,
        rotate: float = 0.0,
        label_fill: int = 255,
    ):
        for name, value in {"crop": crop, "cutout": cutout, "mixup": mixup, "cutmix": cutmix, "rotate": rotate}.items():
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if views is not None and views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        self.crop, self.flip, self.cutout, self.mixup, self.cutmix, self.views, self.seed = crop, flip, cutout, mixup, cutmix, views, seed
        self.rotate, self.label_fill = rotate, label_fill
        self._beta = {alpha: _beta_quantiles(alpha) for alpha in (mixup, cutmix) if alpha}

    @property
    def mixes(self) -> bool:
        """Whether an augmented image depends on other images of its batch."""
        return bool(self.mixup or self.cutmix)

    def __repr__(self) -> str:
        names = ("crop", "flip", "cutout", "mixup", "cutmix", "views", "seed", "rotate")
        return f"Augment({', '.join(f'{n}={getattr(self, n)}' for n in names)})"

    def __call__(self, batch: dict, normalize: Callable[[Tensor], Tensor]) -> dict:
        """Return the batch, augmented and normalised.

        ``image`` [B, C, H, W] and, if present, ``mask`` and a label map [B, H, W] are moved
        together.
        """
        index, view = batch["index"], batch["view"]
        batch = dict(batch)
        rows, columns = self._source_pixels(index, view, batch["image"].shape[-2:])
        fills = {"image": 0, "mask": 0}
        if has_label_maps(batch):
            fills["label"] = self.label_fill
            limits = torch.iinfo(batch["label"].dtype)
            if not limits.min <= self.label_fill <= limits.max:
                batch["label"] = batch["label"].long()
        for name, fill in fills.items():
            if name in batch and (self.crop or self.flip):
                batch[name] = _gather(batch[name], rows[:, :, None], columns[:, None], self.crop, fill)
            if name in batch and self.rotate:
                batch[name] = _gather(batch[name], *self._rotated_pixels(index, view, batch[name].shape[-2:]), 1, fill)
        batch["image"] = normalize(batch["image"])
        if self.cutout:
            batch["image"] = self._cut_out(batch["image"], index, view)
        if self.mixes:
            batch = self._mix(batch, index, view)
        return batch

    def _random(self, purpose: int, view: int, index: Tensor, count: int) -> Tensor:  # [B, count]
        return uniform(self.seed, purpose, view, index[:, None], torch.arange(count, device=index.device))

    def _source_pixels(self, index: Tensor, view: int, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the row [B, H] and column [B, W] in the padded image of each cropped pixel."""
        height, width = size
        offset = (self._random(_CROP, view, index, 2) * (2 * self.crop + 1)).long()
        rows = offset[:, :1] + torch.arange(height, device=index.device)
        columns = torch.arange(width, device=index.device).expand(len(index), width)
        if self.flip:
            columns = torch.where(self._random(_FLIP, view, index, 1) < 0.5, columns.flip(1), columns)
        return rows, offset[:, 1:] + columns

    def _rotated_pixels(self, index: Tensor, view: int, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the row and column [B, H, W] of each rotated pixel, in the image padded by 1."""
        height, width = size
        angle = (2 * self._random(_ROTATION, view, index, 1)[:, :, None] - 1) * (self.rotate * torch.pi / 180)
        y = torch.arange(height, device=index.device)[:, None] - (height - 1) / 2
        x = torch.arange(width, device=index.device)[None, :] - (width - 1) / 2
        rows = (y * angle.cos() + x * angle.sin() + (height - 1) / 2).round()
        columns = (x * angle.cos() - y * angle.sin() + (width - 1) / 2).round()
        return rows.clamp(-1, height).long() + 1, columns.clamp(-1, width).long() + 1

    def _cut_out(self, image: Tensor, index: Tensor, view: int) -> Tensor:
        height, width = image.shape[-2:]
        centre = self._random(_CUTOUT, view, index, 2)
        inside = _box(centre[:, 0] * height, centre[:, 1] * width, self.cutout / 2, self.cutout / 2, height, width)
        return image.masked_fill(inside[:, None], 0.0)

    def _mix(self, batch: dict, index: Tensor, view: int) -> dict:
        image, label, with_label_maps = batch["image"], batch.get("label"), has_label_maps(batch)
        if with_label_maps and self.mixup:
            raise ValueError(MIXUP_WITH_LABEL_MAPS)
        partner = bits(self.seed, _PARTNER, view, index).argsort()
        partner_image, mixed_label = image[partner], None if label is None else label[partner]
        random_weights = self._random(_MIX, view, index, 2)
        mix = torch.ones_like(random_weights[:, 0])
        by_box = torch.zeros_like(mix, dtype=torch.bool)
        if self.cutmix:
            by_box = self._random(_MIX_KIND, view, index, 1)[:, 0] < (0.5 if self.mixup else 1.0)
            height, width = image.shape[-2:]
            half = (1 - self._weights(self.cutmix, random_weights[:, 1])).sqrt() / 2  # half the side of the box, as a fraction of the image
            centre = self._random(_BOX, view, index, 2)
            inside = _box(centre[:, 0] * height, centre[:, 1] * width, half * height, half * width, height, width) & by_box[:, None, None]
            image = torch.where(inside[:, None], partner_image, image)
            mix = 1 - inside.float().mean((1, 2))
            if with_label_maps:
                return {**batch, "image": image, "label": torch.where(inside, cast(Tensor, mixed_label), cast(Tensor, label))}
        if self.mixup:
            weight = torch.where(by_box, 1.0, self._weights(self.mixup, random_weights[:, 0]))
            image = torch.lerp(partner_image, image, weight[:, None, None, None].to(image.dtype))
            mix = torch.where(by_box, mix, weight)
        return {**batch, "image": image} | ({} if label is None else {"mixed_label": mixed_label, "mix": mix})

    def _weights(self, alpha: float, u: Tensor) -> Tensor:
        """Interpolate the quantiles of Beta(alpha, alpha) at probabilities ``u`` from a table."""
        table = self._beta[alpha].to(u.device)
        position = u * (len(table) - 1)
        low = position.long()
        return torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], position - low)


def _beta_quantiles(alpha: float) -> Tensor:
    from scipy.special import betaincinv  # scipy is installed as a dependency of scikit-learn

    return torch.from_numpy(betaincinv(alpha, alpha, torch.linspace(0, 1, 4097, dtype=torch.float64).numpy())).float()


def has_label_maps(batch: dict) -> bool:
    """Whether the labels are maps [B, H, W], not class numbers [B] or probabilities [B, K]."""
    return "label" in batch and batch["label"].dim() == 3


def _gather(x: Tensor, rows: Tensor, columns: Tensor, border: int, fill: int = 0) -> Tensor:
    """Pad x [B, (C,) H, W] by ``border`` pixels, and gather the pixels at ``rows`` and ``columns``.

    The padding has the value ``fill``. ``rows`` and ``columns`` broadcast to [B, H, W].
    """
    channels = x if x.dim() == 4 else x[:, None]
    channels = F.pad(channels, [border] * 4, value=fill)
    batch, channel = torch.arange(len(x), device=x.device), torch.arange(channels.shape[1], device=x.device)
    out = channels[batch[:, None, None, None], channel[:, None, None], rows[:, None], columns[:, None]]
    return out if x.dim() == 4 else out[:, 0]


def _box(y: Tensor, x: Tensor, half_height: float | Tensor, half_width: float | Tensor, height: int, width: int) -> Tensor:
    """Boolean mask [B, H, W] of the pixels whose centres lie in the boxes centred at (y, x)."""
    half_height, half_width = (torch.as_tensor(h, device=y.device).expand_as(y)[:, None, None] for h in (half_height, half_width))
    rows = torch.arange(height, device=y.device)[:, None] + 0.5
    columns = torch.arange(width, device=y.device)[None, :] + 0.5
    return ((rows - y[:, None, None]).abs() < half_height) & ((columns - x[:, None, None]).abs() < half_width)
