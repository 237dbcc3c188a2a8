"""The lane data set of TuSimple's benchmark (2017), read from a folder on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .augment import Augment
from .lane_files import IMAGENET_MEAN, IMAGENET_STD, Curve, LaneData, LaneSample, require_file, text_lines

_FOLDERS = ("", "train_set", "test_set")  # under root, in which label files are searched


class TuSimple(LaneData):
    """TuSimple's lanes, with the files of the published archives under ``root``.

    A file of labels has one JSON object per line::

        {"lanes": [[-2, 632, 625, ...], ...], "h_samples": [240, 250, ...],
         "raw_file": "clips/0313-1/6040/20.jpg"}

    ``h_samples`` are rows, and ``lanes`` has the column of each lane at each of them, negative
    where the lane has no point. ``raw_file`` is relative to the folder of the file of labels, or to
    ``root``. Files of labels are searched in ``root``, ``root/train_set`` and ``root/test_set``.

    The label maps are drawn, and the lanes are numbered by their positions, from 1 on the left to
    ``lanes`` on the right (:func:`kdkernels.data.lane_files.numbered_from_left`). A lane with fewer
    than two points is left out.

    The data have to be downloaded from <https://github.com/TuSimple/tusimple-benchmark>.

    Args:
        root: the folder.
        size: height and width to which the images are resized.
        lanes: number of lanes. TuSimple's images have up to five; with six, three are possible on
            each side of the own vehicle. With one, class 1 stands for all lanes.
        train_files, val_files, test_files: names of the files of labels of each split. By default
            the files of May 31 are for validation, as in the code of SCNN. Without ``test_files``
            there is no test split.
        mean, std: mean and standard deviation per channel, on a scale on which white is 1; by
            default those of ImageNet.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.

    Raises:
        FileNotFoundError: there is no such folder, file of labels or image.
        ValueError: a line of a file of labels has another format; names file and line.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        size: Sequence[int] = (368, 640),
        lanes: int = 6,
        train_files: Sequence[str] = ("label_data_0313.json", "label_data_0601.json"),
        val_files: Sequence[str] = ("label_data_0531.json",),
        test_files: Sequence[str] = (),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        batch_size: int = 12,
        augment: Augment | None = None,
        order_seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__(root, lanes, size, mean, std, batch_size, augment, order_seed, num_workers)
        for name, files in {"train_files": train_files, "val_files": val_files, "test_files": test_files}.items():
            if isinstance(files, str) or not all(isinstance(file, str) for file in files):
                raise TypeError(f"{name} must be a list of names of files, got {files!r}")
        self.files = {"train": list(train_files), "val": list(val_files), "test": list(test_files)}
        for split in self.splits_required:
            if not self.files[split]:
                raise ValueError(f"{split}_files must name at least one file of labels, got none")

    def samples(self) -> dict[str, list[LaneSample]]:
        found = {
            split: [sample for name in names for sample in read_labels(self._find(name), self.root)] for split, names in self.files.items() if names
        }
        for split, samples in found.items():
            if samples and not any(sample.curves for sample in samples):
                raise ValueError(
                    f"{split}_files: no image in {', '.join(self.files[split])} has a lane of two points; is this a file of tasks without labels?"
                )
        return found

    def _find(self, name: str) -> Path:
        paths = [self.root / folder / name for folder in _FOLDERS]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            raise FileNotFoundError(f"root: there is no file of labels {name!r} in {', '.join(str(path.parent) for path in paths)}")
        return found


def read_labels(path: Path, root: Path) -> list[LaneSample]:
    """Read a file of labels; see :class:`TuSimple`."""
    samples = []
    for number, line in enumerate(text_lines(path), 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: expected a JSON object, got {line[:60]!r}: {error}") from error
        missing = [key for key in ("lanes", "h_samples", "raw_file") if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise ValueError(f"{where}: expected a JSON object with lanes, h_samples and raw_file; missing: {', '.join(missing)}")
        image = next((p for p in (path.parent / str(entry["raw_file"]), root / str(entry["raw_file"])) if p.is_file()), None)
        if image is None:
            require_file(root / str(entry["raw_file"]), where, "image")
        samples.append(LaneSample(image or Path(), curves=_curves(entry["lanes"], entry["h_samples"], where)))
    return samples


def _curves(lanes: object, rows: object, where: str) -> tuple[Curve, ...]:
    """Return the curves of an image, of the points whose columns are not negative."""
    if not _is_numbers(rows):
        raise ValueError(f"{where}: h_samples must be a list of numbers, got {str(rows)[:60]}")
    if not isinstance(lanes, list):
        raise ValueError(f"{where}: lanes must be a list of lists of numbers, got {str(lanes)[:60]}")
    curves = []
    for i, columns in enumerate(lanes):
        if not _is_numbers(columns):
            raise ValueError(f"{where}: lane {i} must be a list of numbers, got {str(columns)[:60]}")
        if len(columns) != len(rows):  # type: ignore[arg-type]
            raise ValueError(f"{where}: lane {i} must have a column for each of the {len(rows)} h_samples, got {len(columns)}")  # type: ignore[arg-type]
        points = np.array([(x, y) for x, y in zip(columns, rows, strict=True) if x >= 0], dtype=np.float64)  # type: ignore[call-overload]
        if len(points) >= 2:
            curves.append(points)
    return tuple(curves)


def _is_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
