"""CULane (Pan, Shi, Luo, Wang, Tang: Spatial As Deep, AAAI 2018), read from a folder on disk."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .augment import Augment
from .lane_files import IMAGENET_MEAN, IMAGENET_STD, Curve, LaneData, LaneSample, require_file, text_lines

_LANES = 4


class CULane(LaneData):
    """CULane, with the folders of the published archives under ``root``::

        root/list/train_gt.txt, val_gt.txt, test.txt
        root/driver_23_30frame/05151640_0419.MP4/00000.jpg
        root/driver_23_30frame/05151640_0419.MP4/00000.lines.txt
        root/laneseg_label_w16/driver_23_30frame/05151640_0419.MP4/00000.png

    For each split, ``list/<split>_gt.txt`` is read or, if it does not exist, ``list/<split>.txt``.
    There are two formats of a line of a list:

    - ``/image.jpg /label.png 1 1 1 0``: image, label map, and which of the four lanes exist. The
      values of the label map are 0 for the background and 1 to 4 for the lanes from left to right.
    - ``/image.jpg``: the lanes are in ``image.lines.txt`` beside the image, a lane per line, as
      ``x1 y1 x2 y2 ...`` in pixels. The label map is drawn, and the lanes are numbered by their
      positions (:func:`kdkernels.data.lane_files.numbered_from_left`). A lane with fewer than two
      points is left out.

    The data have to be downloaded from <https://xingangpan.github.io/projects/CULane.html>.

    Args:
        root: the folder.
        size: height and width to which images and label maps are resized.
        mean, std: mean and standard deviation per channel, on a scale on which white is 1; by
            default those of ImageNet.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.

    Raises:
        FileNotFoundError: there is no such folder, list, image, label map or file of lines.
        ValueError: a line of a list, or of a file of lines, has another format; names file and
            line.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        size: Sequence[int] = (288, 800),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        batch_size: int = 12,
        augment: Augment | None = None,
        order_seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__(root, _LANES, size, mean, std, batch_size, augment, order_seed, num_workers)

    def samples(self) -> dict[str, list[LaneSample]]:
        found = {}
        for split in ("train", "val", "test"):
            lists = [self.root / "list" / name for name in (f"{split}_gt.txt", f"{split}.txt")]
            existing = next((path for path in lists if path.is_file()), None)
            if existing is not None:
                found[split] = read_list(existing, self.root)
            elif split in self.splits_required:
                raise FileNotFoundError(f"root: there is neither a file {str(lists[0])!r} nor {str(lists[1])!r}")
        return found


def read_list(path: Path, root: Path) -> list[LaneSample]:
    """Read a list of images; see :class:`CULane`."""
    samples = []
    for number, line in enumerate(text_lines(path), 1):
        where, fields = f"{path}, line {number}", line.split()
        if not fields:
            continue
        if len(fields) not in (1, 2 + _LANES):
            raise ValueError(f"{where}: expected an image, or an image, a label map and {_LANES} flags, got {len(fields)} fields: {line.strip()!r}")
        image = require_file(root / fields[0].lstrip("/"), where, "image")
        if len(fields) == 1:
            samples.append(LaneSample(image, curves=read_lines(image.with_suffix(".lines.txt"), where)))
            continue
        if not set(fields[2:]) <= {"0", "1"}:
            raise ValueError(f"{where}: the flags of the lanes must be 0 or 1, got {' '.join(fields[2:])!r}")
        label = require_file(root / fields[1].lstrip("/"), where, "label map")
        samples.append(LaneSample(image, label, existence=tuple(flag == "1" for flag in fields[2:])))
    return samples


def read_lines(path: Path, where: str) -> tuple[Curve, ...]:
    """Read the curves of an image, one per line; ``where`` is the line of the list with the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line does not contain pairs of numbers; names file and line.
    """
    curves = []
    for number, line in enumerate(text_lines(require_file(path, where, "file of lanes")), 1):
        try:
            values = [float(field) for field in line.split()]
        except ValueError:
            values = [math.nan]
        if len(values) % 2 or not all(abs(value) < 1e6 for value in values):  # also not nan
            raise ValueError(
                f"{path}, line {number}: expected x and y of each point of a lane, an even number of numbers below 1e6, got {line.strip()!r}"
            )
        if len(values) >= 4:
            curves.append(np.array(values).reshape(-1, 2))
    return tuple(curves)
