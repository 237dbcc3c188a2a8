"""What a teacher says of each training image, kept on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from .engine import reserve

Outputs = tuple[Tensor, dict[str, Tensor]]  # logits, tapped features


class TeacherCache:
    """Logits and tapped features of the teacher, by sample and view (which augmentation of it), in memory-mapped files.

    A run computes what is not there and keeps it; later epochs that show the same views, and later runs, read it. With
    :class:`kdkernels.data.Augment`, ``views`` bounds how many there are; without a bound each epoch is a view, and the next run with the same
    seed finds them all.

    What was kept is used only for the same teacher (a hash of its weights), taps, precision, images and augmentation: each combination has
    a folder of its own under ``folder``, with a ``meta.json`` that says which. An entry counts if its checksum is right, so a run that was
    killed, or a machine that lost power, leaves no wrong one. Processes of one machine share the files.

    Args:
        folder: where the files are.
        dtype: "float32", or "float16" for half the room and three digits.
    """

    def __init__(self, folder: str | os.PathLike, dtype: Literal["float32", "float16"] = "float32"):
        if dtype not in ("float16", "float32"):
            raise ValueError(f'dtype must be "float16" or "float32", got {dtype!r}')
        self.root, self.dtype = Path(folder), np.dtype(dtype)
        self.folder: Path | None = None
        self.hits = self.misses = 0

    def open(self, teacher: nn.Module, taps: list[str], data: object, precision: str = "32-true") -> None:
        """Finds, or makes, the folder for this teacher and these training images (an :class:`ImageData` that is set up).

        Raises:
            ValueError: the data cannot say which images they show, or mix several images into one.
        """
        if not hasattr(data, "fingerprint") or not hasattr(data, "splits"):
            raise ValueError("teacher_cache needs data of kdkernels.data, whose batches say which samples and views they hold; see FromDatasets")
        if data.augment is not None and data.augment.mixes:
            raise ValueError("teacher_cache cannot be used with mixup or cutmix: an image then depends on the others of its batch")
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
        _write_whole(self.folder / "meta.json", json.dumps({**meta, "class": type(teacher).__qualname__, "samples": self.size}, indent=1))
        self._views: dict[int, _View] = {}
        self._shapes: dict[str, tuple[int, ...]] | None = None

    def outputs(self, batch: dict, compute: Callable[[Tensor], Outputs]) -> Outputs:
        """What the teacher says of the batch; ``compute`` is called for the images that are not there."""
        if self.folder is None:
            raise RuntimeError("open() the cache before asking it")
        index, image = batch["index"].cpu().numpy(), batch["image"]
        view = self._view(batch["view"])
        found = view.read(index) if view is not None else None
        known = found.known if found is not None else np.zeros(len(index), bool)
        self.hits, self.misses = self.hits + int(known.sum()), self.misses + int((~known).sum())
        if known.all():
            logits, features = _split({k: torch.from_numpy(v).to(image.device) for k, v in found.values.items()})
            return logits.to(image.dtype), {k: v.to(image.dtype) for k, v in features.items()}
        missing = torch.from_numpy(np.flatnonzero(~known)).to(image.device)
        logits, features = compute(image if not known.any() else image[missing])
        fresh = _join(logits, features)
        self._remember_shapes(fresh)
        self._view(batch["view"]).write(index[~known], {k: v.detach().float().cpu().numpy() for k, v in fresh.items()})
        if not known.any():
            return logits, features
        merged = {}
        for name, value in fresh.items():
            merged[name] = torch.from_numpy(found.values[name]).to(value)
            merged[name][missing] = value
        return _split(merged)

    def _view(self, number: int) -> _View | None:
        """The files of a view, once the shapes of the outputs are known."""
        if number not in self._views:
            shapes = self._shapes or self._stored_shapes()
            if shapes is None:
                return None
            self._views[number] = _View(self.folder, number, self.size, shapes, self.dtype)
        return self._views[number]

    def _stored_shapes(self) -> dict[str, tuple[int, ...]] | None:
        path = self.folder / "shapes.json"
        self._shapes = {k: tuple(v) for k, v in json.loads(path.read_text()).items()} if path.exists() else None
        return self._shapes

    def _remember_shapes(self, fresh: dict[str, Tensor]) -> None:
        shapes = {name: tuple(value.shape[1:]) for name, value in fresh.items()}
        if self._shapes is None:
            _write_whole(self.folder / "shapes.json", json.dumps(shapes))
            self._shapes = shapes
        elif shapes != self._shapes:
            raise ValueError(f"the teacher's outputs changed their shapes: {shapes}, before {self._shapes}")


class _Found:
    def __init__(self, known: np.ndarray, values: dict[str, np.ndarray]):
        self.known, self.values = known, values


class _View:
    """The entries of one view: an array per output, and the checksum of each entry."""

    def __init__(self, folder: Path, number: int, size: int, shapes: dict[str, tuple[int, ...]], dtype: np.dtype):
        self.arrays = {}
        for place, (name, shape) in enumerate(shapes.items()):
            self.arrays[name] = _map(folder / f"view_{number:05d}_{place}.bin", (size, *shape), dtype)
        self.checks = _map(folder / f"view_{number:05d}.crc", (size,), np.dtype(np.uint64))

    def read(self, index: np.ndarray) -> _Found:
        values = {name: array[index].astype(np.float32) for name, array in self.arrays.items()}
        known = np.array([check != 0 and check == self._check(i) for i, check in zip(index, self.checks[index], strict=True)], bool)
        return _Found(known, values)

    def write(self, index: np.ndarray, values: dict[str, np.ndarray]) -> None:
        for name, array in self.arrays.items():
            array[index] = values[name]
        for i in index:
            self.checks[i] = self._check(i)

    def _check(self, i: int) -> int:
        crc = 0
        for array in self.arrays.values():
            crc = zlib.crc32(array[i], crc)
        return crc | 1 << 32  # 0 is: nothing was written


def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The file as an array. Its room is taken at once: where the disk is full, a write to a map is a signal that ends the process."""
    size = int(np.prod(shape)) * dtype.itemsize
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        reserve(handle, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(error.errno, f"teacher_cache needs {size / 2**20:.0f} MiB for {path}, and the disk is full") from error
        raise
    finally:
        os.close(handle)
    return np.memmap(path, dtype, "r+", shape=shape)


def hash_of(network: nn.Module) -> str:
    """Of the class, and of the names, shapes and values of parameters and buffers."""
    digest = hashlib.sha256(f"{type(network).__module__}.{type(network).__qualname__}".encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _join(logits: Tensor, features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"": logits, **features}  # no tap has the empty name


def _split(values: dict[str, Tensor]) -> Outputs:
    return values[""], {name: value for name, value in values.items() if name}


def _write_whole(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)
