"""Augmentation of whole batches, on the device where they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .keyed_random import bits, uniform

MIXUP_OF_MAPS = "mixup cannot be used with label maps: it would need two labels for each pixel; cutmix pastes the label map too"
_CROP, _FLIP, _CUTOUT, _MIX, _PARTNER, _BOX, _KIND, _TURN = range(8)  # what a random number is for


class Augment:
    """Crop, flip, rotation, cutout, mixup and cutmix. What happens to a sample is a function of ``seed``, its index and the view (the epoch) alone.

    Args:
        crop: pixels of black border added on each side before a crop of the former size, as in the recipes for CIFAR (4).
        flip: mirror left and right with probability 1/2.
        cutout: side in pixels of a square set to the mean colour, its centre anywhere in the image (DeVries, Taylor 2017).
        mixup: alpha of the Beta distribution of the weights of pairs of images (Zhang et al. 2018); 0 for none.
        cutmix: alpha for pasting a box of one image into another (Yun et al. 2019); 0 for none. With both, each image gets either.
        rotate: degrees, up to which an image is turned to either side around its middle, by nearest pixels, black where there are none.
        views: how many different augmentations a sample has: epoch e shows view ``e % views``. ``None``: a new one each epoch.
        seed: of everything above.
        label_fill: in label maps, the label of pixels that a crop or a rotation brings in from outside of the image. 255 is what
            :class:`kdkernels.tasks.Segmentation` ignores by default.

    mixup and cutmix pair the images of a batch, and add to it ``mixed_label`` [B] and ``mix`` [B], the weight of ``label`` against it.

    Label maps [B, H, W] move with their images, by nearest pixels. cutout leaves them as they are. cutmix pastes the same box into the
    label map, so that nothing is added to the batch. mixup raises a ValueError: it would need two labels for each pixel.
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
        """Whether an image depends on others of its batch."""
        return bool(self.mixup or self.cutmix)

    def __repr__(self) -> str:
        names = ("crop", "flip", "cutout", "mixup", "cutmix", "views", "seed", "rotate")
        return f"Augment({', '.join(f'{n}={getattr(self, n)}' for n in names)})"

    def __call__(self, batch: dict, normalize: Callable[[Tensor], Tensor]) -> dict:
        """The batch augmented and normalised. ``image`` [B, C, H, W] and, if there, ``mask`` and a label map [B, H, W] move together."""
        index, view = batch["index"], batch["view"]
        batch = dict(batch)
        rows, columns = self._source_pixels(index, view, batch["image"].shape[-2:])
        fills = {"image": 0, "mask": 0} | ({"label": self.label_fill} if has_label_maps(batch) else {})
        for name, fill in fills.items():
            if name in batch and (self.crop or self.flip):
                batch[name] = _gather(batch[name], rows[:, :, None], columns[:, None], self.crop, fill)
            if name in batch and self.rotate:
                batch[name] = _gather(batch[name], *self._turned_pixels(index, view, batch[name].shape[-2:]), 1, fill)
        batch["image"] = normalize(batch["image"])
        if self.cutout:
            batch["image"] = self._cut_out(batch["image"], index, view)
        if self.mixes:
            batch = self._mix(batch, index, view)
        return batch

    def _random(self, purpose: int, view: int, index: Tensor, count: int) -> Tensor:  # [B, count]
        return uniform(self.seed, purpose, view, index[:, None], torch.arange(count, device=index.device))

    def _source_pixels(self, index: Tensor, view: int, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Rows [B, H] and columns [B, W] of the bordered image that each pixel comes from."""
        height, width = size
        offset = (self._random(_CROP, view, index, 2) * (2 * self.crop + 1)).long()
        rows = offset[:, :1] + torch.arange(height, device=index.device)
        columns = torch.arange(width, device=index.device).expand(len(index), width)
        if self.flip:
            columns = torch.where(self._random(_FLIP, view, index, 1) < 0.5, columns.flip(1), columns)
        return rows, offset[:, 1:] + columns

    def _turned_pixels(self, index: Tensor, view: int, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Rows and columns [B, H, W], of the image with a border of one pixel, that each pixel of the turned image comes from."""
        height, width = size
        angle = (2 * self._random(_TURN, view, index, 1)[:, :, None] - 1) * (self.rotate * torch.pi / 180)
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
        image, label, maps = batch["image"], batch.get("label"), has_label_maps(batch)
        if maps and self.mixup:
            raise ValueError(MIXUP_OF_MAPS)
        partner = bits(self.seed, _PARTNER, view, index).argsort()
        other, mixed_label = image[partner], None if label is None else label[partner]
        draw = self._random(_MIX, view, index, 2)
        mix = torch.ones_like(draw[:, 0])
        by_box = torch.zeros_like(mix, dtype=torch.bool)
        if self.cutmix:
            by_box = self._random(_KIND, view, index, 1)[:, 0] < (0.5 if self.mixup else 1.0)
            height, width = image.shape[-2:]
            half = (1 - self._weights(self.cutmix, draw[:, 1])).sqrt() / 2  # of the side, as a fraction
            centre = self._random(_BOX, view, index, 2)
            inside = _box(centre[:, 0] * height, centre[:, 1] * width, half * height, half * width, height, width) & by_box[:, None, None]
            image = torch.where(inside[:, None], other, image)
            mix = 1 - inside.float().mean((1, 2))
            if maps:
                return {**batch, "image": image, "label": torch.where(inside, mixed_label, label)}
        if self.mixup:
            weight = torch.where(by_box, 1.0, self._weights(self.mixup, draw[:, 0]))
            image = torch.lerp(other, image, weight[:, None, None, None].to(image.dtype))
            mix = torch.where(by_box, mix, weight)
        return {**batch, "image": image} | ({} if label is None else {"mixed_label": mixed_label, "mix": mix})

    def _weights(self, alpha: float, u: Tensor) -> Tensor:
        """Quantiles at ``u`` of Beta(alpha, alpha), from a table."""
        table = self._beta[alpha].to(u.device)
        position = u * (len(table) - 1)
        low = position.long()
        return torch.lerp(table[low], table[(low + 1).clamp(max=len(table) - 1)], position - low)


def _beta_quantiles(alpha: float) -> Tensor:
    from scipy.special import betaincinv  # scikit-learn brings scipy

    return torch.from_numpy(betaincinv(alpha, alpha, torch.linspace(0, 1, 4097, dtype=torch.float64).numpy())).float()


def has_label_maps(batch: dict) -> bool:
    """Whether the labels are maps [B, H, W]: not class numbers [B] or probabilities [B, K]."""
    return "label" in batch and batch["label"].dim() == 3


def _gather(x: Tensor, rows: Tensor, columns: Tensor, border: int, fill: int = 0) -> Tensor:
    """x [B, (C,) H, W] with a border of the width ``border`` and the value ``fill``, read at rows and columns, which broadcast to [B, H, W]."""
    channels = x if x.dim() == 4 else x[:, None]
    channels = F.pad(channels, [border] * 4, value=fill)
    batch, channel = torch.arange(len(x), device=x.device), torch.arange(channels.shape[1], device=x.device)
    out = channels[batch[:, None, None, None], channel[:, None, None], rows[:, None], columns[:, None]]
    return out if x.dim() == 4 else out[:, 0]


def _box(y: Tensor, x: Tensor, half_height: float | Tensor, half_width: float | Tensor, height: int, width: int) -> Tensor:
    """[B, H, W]: pixels whose centre is less than half a side from (y, x)."""
    half_height, half_width = (torch.as_tensor(h, device=y.device).expand_as(y)[:, None, None] for h in (half_height, half_width))
    rows = torch.arange(height, device=y.device)[:, None] + 0.5
    columns = torch.arange(width, device=y.device)[None, :] + 0.5
    return ((rows - y[:, None, None]).abs() < half_height) & ((columns - x[:, None, None]).abs() < half_width)
