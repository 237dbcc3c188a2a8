"""A cache on disk for the teacher's outputs for the training images."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..files import replaced_atomically
from ..nn.hashing import hash_of
from .engine import reserve

Outputs = tuple[Tensor, dict[str, Tensor]]  # logits, tapped features


class TeacherCache:
    """Store the teacher's logits and tapped features in memory-mapped files, by sample and view.

    A view is one random augmentation of a sample. A run computes and stores the outputs that are
    missing; later epochs with the same views, and later runs, read them. ``views`` of
    :class:`kdkernels.data.Augment` limits the number of views. Without a limit, each epoch has new
    views, and only a later run with the same seed uses the entries.

    Entries are used only for the same teacher (a hash of its weights), taps, precision, images and
    augmentation. Each combination has its own folder in ``folder``, whose ``meta.json`` lists these
    properties. An entry is used only if its checksum is right, so entries that are incomplete
    because the run was killed or the machine lost power are computed again. Processes on one
    machine share the files.

    Args:
        folder: folder of the files.
        dtype: "float32", or "float16" for half the disk space and three significant digits.
    """

    def __init__(self, folder: str | os.PathLike, dtype: Literal["float32", "float16"] = "float32"):
        if dtype not in ("float16", "float32"):
            raise ValueError(f'dtype must be "float16" or "float32", got {dtype!r}')
        self.root, self.dtype = Path(folder), np.dtype(dtype)
        self.folder: Path | None = None
        self.hits = self.misses = 0

    def open(self, teacher: nn.Module, taps: list[str], data: Any, precision: str = "32-true") -> None:
        """Find or create the folder for this teacher and these training images.

        Args:
            teacher: the teacher.
            taps: names of the tapped layers.
            data: a :class:`kdkernels.data.ImageData` that is set up.
            precision: precision of the trainer.

        Raises:
            ValueError: the data are not a data module of :mod:`kdkernels.data`, or their
                augmentation uses mixup or cutmix.
        """
        if not hasattr(data, "fingerprint") or not hasattr(data, "splits"):
            raise ValueError(
                "teacher_cache needs a data module of kdkernels.data, whose batches contain the numbers of samples and views; "
                "FromDatasets makes one from your datasets"
            )
        if data.augment is not None and data.augment.mixes:
            raise ValueError("teacher_cache cannot be used with mixup or cutmix, because an image then depends on the other images of its batch")
        meta = {
            "teacher": hash_of(teacher),
            "taps": taps,
            "images": data.fingerprint("train"),
            "precision": precision,
            "dtype": str(self.dtype),
        }
        key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:20]
        self.folder, self.size = self.root / key, len(data.splits["train"])
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.folder / "meta.json", json.dumps({**meta, "class": type(teacher).__qualname__, "samples": self.size}, indent=1))
        self._views: dict[int, _View] = {}
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def outputs(self, batch: dict, compute: Callable[[Tensor], Outputs]) -> Outputs:
        """Return the teacher's outputs for a batch; ``compute`` them for images without entries."""
        if self.folder is None:
            raise RuntimeError("call open() before outputs()")
        index, image = batch["index"].cpu().numpy(), batch["image"]
        view = self._view(batch["view"])
        cached = view.read(index) if view is not None else None
        is_valid = cached.is_valid if cached is not None else np.zeros(len(index), bool)
        self.hits, self.misses = self.hits + int(is_valid.sum()), self.misses + int((~is_valid).sum())
        if cached is not None and is_valid.all():
            logits, features = _split_outputs({k: torch.from_numpy(v).to(image.device) for k, v in cached.values.items()})
            return logits.to(image.dtype), {k: v.to(image.dtype) for k, v in features.items()}
        missing = torch.from_numpy(np.flatnonzero(~is_valid)).to(image.device)
        logits, features = compute(image if not is_valid.any() else image[missing])
        computed = _join_outputs(logits, features)
        self._store_shapes(computed)
        view = cast(_View, self._view(batch["view"]))  # the shapes are known now
        view.write(index[~is_valid], {k: v.detach().float().cpu().numpy() for k, v in computed.items()})
        if cached is None or not is_valid.any():
            return logits, features
        merged = {}
        for name, value in computed.items():
            merged[name] = torch.from_numpy(cached.values[name]).to(value)
            merged[name][missing] = value
        return _split_outputs(merged)

    def _view(self, number: int) -> _View | None:
        """Return the files of a view, or ``None`` if the shapes of outputs are not known yet."""
        if number not in self._views:
            shapes = self._shapes or self._stored_shapes()
            if shapes is None:
                return None
            self._views[number] = _View(cast(Path, self.folder), number, self.size, shapes, self.dtype)
        return self._views[number]

    def _stored_shapes(self) -> dict[str, tuple[int, ...]] | None:
        path = cast(Path, self.folder) / "shapes.json"
        self._shapes = {k: tuple(v) for k, v in json.loads(path.read_text()).items()} if path.exists() else None
        return self._shapes

    def _store_shapes(self, outputs: dict[str, Tensor]) -> None:
        shapes = {name: tuple(value.shape[1:]) for name, value in outputs.items()}
        if self._shapes is None:
            _write_atomically(cast(Path, self.folder) / "shapes.json", json.dumps(shapes))
            self._shapes = shapes
        elif shapes != self._shapes:
            raise ValueError(f"the teacher's outputs have the shapes {shapes}, but the cache has entries of the shapes {self._shapes}")


class _CachedOutputs:
    """Entries that were read from a view; ``is_valid`` tells which samples have one."""

    def __init__(self, is_valid: np.ndarray, values: dict[str, np.ndarray]):
        self.is_valid, self.values = is_valid, values


class _View:
    """The entries of one view: one array per output, and the checksum of each entry."""

    def __init__(self, folder: Path, number: int, size: int, shapes: dict[str, tuple[int, ...]], dtype: np.dtype):
        self.arrays = {}
        for i, (name, shape) in enumerate(shapes.items()):
            self.arrays[name] = _memory_map(folder / f"view_{number:05d}_{i}.bin", (size, *shape), dtype)
        self.checksums = _memory_map(folder / f"view_{number:05d}.crc", (size,), np.dtype(np.uint64))

    def read(self, index: np.ndarray) -> _CachedOutputs:
        values = {name: array[index].astype(np.float32) for name, array in self.arrays.items()}
        checksums = zip(index, self.checksums[index], strict=True)
        is_valid = np.array([checksum != 0 and checksum == self._checksum(i) for i, checksum in checksums], bool)
        return _CachedOutputs(is_valid, values)

    def write(self, index: np.ndarray, values: dict[str, np.ndarray]) -> None:
        for name, array in self.arrays.items():
            array[index] = values[name]
        for i in index:
            self.checksums[i] = self._checksum(i)

    def _checksum(self, i: int) -> int:
        crc = 0
        for array in self.arrays.values():
            crc = zlib.crc32(array[i], crc)
        return crc | 1 << 32  # never 0, which marks an entry that was not written


def _memory_map(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the file as an array, and allocate its disk space.

    Without the allocation, a write to the array on a full disk would end the process with a signal.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        reserve(handle, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(error.errno, f"teacher_cache needs {size / 2**20:.0f} MiB for {path}, but the disk is full") from error
        raise
    finally:
        os.close(handle)
    return np.memmap(path, dtype, "r+", shape=shape)


def _join_outputs(logits: Tensor, features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"": logits, **features}  # no tap has an empty name


def _split_outputs(values: dict[str, Tensor]) -> Outputs:
    return values[""], {name: value for name, value in values.items() if name}


def _write_atomically(path: Path, text: str) -> None:
    with replaced_atomically(path) as temporary:
        temporary.write_text(text)
