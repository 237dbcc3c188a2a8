"""Selection of the images of an unlabelled pool that resemble a teacher's training data (DFND)."""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..files import replaced_atomically
from ..nn.dfnd import noise_value
from ..nn.hashing import hash_of
from ..nn.outputs import find_logits
from .image_pool import images_of

__all__ = ["SampleIndex", "select_samples"]

VERSION = 2  # of the format of the files
NOISIEST = 100  # number of noisiest images whose positions are stored


@dataclass(frozen=True)
class SampleIndex:
    """The selected samples of a pool, and from what they were selected.

    Args:
        indices: [n] int64, positions in the pool, the least noisy image first.
        values: [n] float32, their noise values.
        labels: [n] int64, the teacher's most probable classes.
        provenance: plain values: ``teacher`` and ``pool`` (hashes), ``pool_size``, ``count``,
            ``size``, ``mean``, ``std``, ``batch_size``, and ``chunks``, a hash for each batch of
            the pool.
        noisiest: [min(100, pool_size)] int64, positions of the noisiest images, the noisiest first.
        noisiest_values: float32, their noise values.
        class_counts: [K] int64, the number of images of the pool by the teacher's most probable
            class.
    """

    indices: Tensor
    values: Tensor
    labels: Tensor
    provenance: dict[str, Any]
    noisiest: Tensor
    noisiest_values: Tensor
    class_counts: Tensor

    @staticmethod
    def load(path: str | os.PathLike) -> SampleIndex:
        """Read an index file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a complete index file.
        """
        stored = _read(path)
        try:
            (indices, values, labels), (noisiest, noisiest_values) = stored["selected"], stored["noisiest"]
            return SampleIndex(indices, values, labels, stored["provenance"], noisiest, noisiest_values, stored["class_counts"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a complete index file of select_samples") from error

    def check(
        self,
        *,
        teacher: nn.Module | str | None = None,
        pool: Any = None,
        count: int | None = None,
        name: str = "the index",
    ) -> None:
        """Check that the index belongs to a teacher and a pool.

        Of the pool, the number of images is compared, and the content of its first, middle and last
        batch.

        Args:
            teacher: the network, or its hash.
            pool: the dataset.
            count: number of selected images.
            name: name of the index in the message.

        Raises:
            ValueError: the index was made from another teacher or pool, or with another count.
        """
        given: dict[str, Any] = {}
        if teacher is not None:
            given["teacher"] = teacher if isinstance(teacher, str) else hash_of(teacher)
        if count is not None:
            given["count"] = count
        if pool is not None:
            given["pool_size"] = len(pool)
        _check_same(name, self.provenance, given)
        if pool is not None:
            chunks = self.provenance["chunks"]
            size, batch_size = self.provenance["size"], self.provenance["batch_size"]
            for chunk in sorted({0, len(chunks) // 2, len(chunks) - 1}):
                images = _images(pool, chunk, batch_size, None if size is None else tuple(size))
                if _hash(images) != chunks[chunk]:
                    first = chunk * batch_size
                    raise ValueError(f"{name} was made from another pool: the images {first} to {first + len(images) - 1} differ")


def select_samples(
    teacher: nn.Module,
    pool: Dataset | Sequence,
    count: int,
    path: str | os.PathLike,
    *,
    size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    save_every: int = 50,
    on_progress: Callable[[int, int], None] | None = None,
    teacher_hash: str | None = None,
) -> SampleIndex:
    """Select the images of an unlabelled pool with the smallest noise values, and store them.

    The teacher, in eval mode, computes the noise value (:func:`kdkernels.nn.noise_value`) of each
    image in one pass over the pool. The ``count`` smallest over the whole pool are selected exactly
    (Chen et al., CVPR 2021); of equal values, the one that comes first in the pool. The memory
    depends on ``count`` and ``batch_size``, and grows by a hash for each batch of the pool. While
    the teacher computes, a thread reads the next batch.

    In several processes (``torch.distributed``), each process scores a part of the pool, and the
    result is that of one process. A run that was killed is continued: each process stores its state
    beside ``path`` after every ``save_every`` batches. If ``path`` exists, it is not computed
    again.

    Args:
        teacher: maps images [B, C, H, W] to logits [B, K].
        pool: a map-style dataset of images, of (image, label) or of dicts with ``image``; labels
            are not used. Images are tensors, arrays or PIL images (:class:`FromDatasets`), and the
            same whenever they are read. If the dataset has the method ``__getitems__`` (a list of
            positions; as for torch's DataLoader), it is used. For a folder of files:
            :class:`ImagePool`.
        count: number of images to select.
        path: the index file.
        size: height and width to which the images are resized (bilinear, antialiased). ``None``:
            the images must have one size.
        mean, std: per channel, on a scale on which white is 1; those with which the teacher was
            trained. Float images must then lie in [0, 1]. The released code uses those of ImageNet
            for the pool and of CIFAR for the teacher's training.
        batch_size: images that the teacher gets at once. The last bits of a noise value may depend
            on it.
        device: device of the computation; by default that of the teacher's parameters.
        save_every: number of batches after which the state is stored.
        on_progress: called after each batch with the number of images that this process has scored,
            and the number of images of the pool.
        teacher_hash: the hash that is stored, by default that of the teacher's weights.

    Returns:
        The selected samples, the least noisy one first, the positions of the noisiest images, and
        the number of images of each class. The file contains them too, with the hashes of the
        teacher and of the pool.

    Raises:
        TypeError: an argument has the wrong type, or an item of the pool is no image.
        ValueError: the pool has fewer than ``count`` images; the images differ in size or dtype; an
            option is out of range; the file or a stored state is from another teacher, pool or
            option; or the teacher returns no logits [B, K], or none that are finite.
        OSError: no file can be written to the folder of ``path``.
    """
    count, batch_size, save_every = _integer("count", count), _integer("batch_size", batch_size), _integer("save_every", save_every)
    size, normalization = _checked_size(size), _checked_normalization(mean, std)
    if not hasattr(pool, "__len__") or not hasattr(pool, "__getitem__"):
        raise TypeError(f"pool must be a map-style dataset, with __len__ and __getitem__, got {type(pool).__name__}")
    total = len(cast(Sequence, pool))
    if total < count:
        raise ValueError(f"count must be at most the number of images of the pool, {total}, got {count}")
    target = Path(path)
    parameter = next(teacher.parameters(), torch.empty(0))
    home = parameter.device
    where = home if device is None else torch.device(device)
    provenance = {
        "version": VERSION,
        "teacher": hash_of(teacher) if teacher_hash is None else teacher_hash,
        "pool_size": total,
        "count": count,
        "size": None if size is None else list(size),
        **normalization,
        "batch_size": batch_size,
    }
    advice = "remove it, or give another path"
    if target.is_dir():
        raise ValueError(f"path must be a file, but {os.fspath(path)!r} is a folder")
    if target.exists():
        index = SampleIndex.load(target)
        _check_same(f"{os.fspath(path)!r}", index.provenance, provenance, advice)
        index.check(pool=pool, name=f"{os.fspath(path)!r}")
        return index
    rank, world = _process()
    state = _Part(target.with_name(f"{target.name}.part-{rank}-of-{world}"), provenance, rank, world)
    state.resume(pool, size)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent):  # raises before any work if nothing can be written there
        pass
    modes = {module: module.training for module in teacher.modules()}
    teacher.to(where).eval()
    try:
        for chunk, images, digest, damaged in _prefetched(state.remaining(), pool, batch_size, size):
            state.check_format(images)
            logits = _logits(teacher, images, normalization["mean"], normalization["std"], where, parameter.dtype)
            values = noise_value(logits).float().cpu()
            if not state.chunks and bool(values.isnan().all()):
                raise ValueError(
                    f"the teacher ({type(teacher).__name__}) returned logits that are not finite for all of the first {len(values)} images"
                )
            values[damaged] = torch.nan
            state.add(chunk, digest, values, logits.argmax(1).cpu(), logits.shape[1])
            if on_progress is not None:
                on_progress(state.scored, total)
            if (chunk // world + 1) % save_every == 0:
                state.save()
    except BaseException:  # also Ctrl-C
        if state.chunks:
            state.save()
        raise
    finally:
        teacher.to(home)
        for module, mode in modes.items():
            module.training = mode
    state.save()
    _barrier()
    if rank == 0:
        parts = [_Part(target.with_name(f"{target.name}.part-{r}-of-{world}"), provenance, r, world) for r in range(world)]
        for part in parts:
            part.load()
        _write_index(target, provenance, parts)
        for left in target.parent.glob(f"{glob.escape(target.name)}.part-*-of-*"):  # also of runs with other numbers of processes
            left.unlink()
    _barrier()
    return SampleIndex.load(target)


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    return int(value)


def _checked_size(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    sides: Sequence[Any] = size if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    if len(sides) != 2 or any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1 for n in sides):
        raise ValueError(f"size must be an integer >= 1, two of them (height and width), or None, got {size!r}")
    return int(sides[0]), int(sides[1])


def _checked_normalization(mean: object, std: object) -> dict[str, list[float] | None]:
    if (mean is None) != (std is None):
        raise ValueError(f"mean and std must be given together or not at all, got mean={mean} and std={std}")
    found: dict[str, list[float] | None] = {}
    for name, values in (("mean", mean), ("std", std)):
        try:
            found[name] = None if values is None else [float(x) for x in cast(Sequence, values)]
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a list of numbers, one for each channel, got {values!r}") from error
    first, second = found["mean"], found["std"]
    if first is not None and second is not None and (not first or len(first) != len(second)):
        raise ValueError(f"mean and std must have one number for each channel, got {first} and {second}")
    if second is not None and not all(x > 0 for x in second):
        raise ValueError(f"std must be positive, got {second}")
    return found


class _Part:
    """What one process has scored: its smallest values, and the hashes of its batches."""

    def __init__(self, path: Path, provenance: dict, rank: int, world: int):
        self.path, self.provenance, self.rank, self.world = path, provenance, rank, world
        self.count, self.batch_size, self.total = provenance["count"], provenance["batch_size"], provenance["pool_size"]
        self.chunks: list[str] = []  # hashes of the batches rank, rank + world, ...
        self.kept: list[Scores] = []
        self.noisiest: list[Scores] = []
        self.class_counts = torch.zeros(0, dtype=torch.int64)
        self.format: list | None = None  # dtype and shape of the images
        self.buffered = 0

    @property
    def num_chunks(self) -> int:
        return -(-self.total // self.batch_size)

    @property
    def scored(self) -> int:
        count = len(self.chunks) * self.batch_size
        ends = bool(self.chunks) and self._all_chunks()[len(self.chunks) - 1] == self.num_chunks - 1
        return count - (self.num_chunks * self.batch_size - self.total if ends else 0)  # the last batch may be smaller

    def _all_chunks(self) -> range:
        return range(self.rank, self.num_chunks, self.world)

    def remaining(self) -> Iterator[int]:
        yield from self._all_chunks()[len(self.chunks) :]

    def check_format(self, images: Tensor) -> None:
        """Check that all batches have the same dtype and shape of images."""
        found = [str(images.dtype), list(images.shape[1:])]
        if self.format is None:
            self.format = found
        elif self.format != found:
            raise ValueError(f"the images of the pool must have one dtype and one shape, or size must be given, got {self.format} and {found}")
        mean = self.provenance["mean"]
        if mean is not None and len(mean) != images.shape[1]:
            raise ValueError(f"mean and std must have one number for each of the {images.shape[1]} channels of the pool, got {mean}")
        if mean is not None and images.is_floating_point() and not bool((images.amin() >= 0) & (images.amax() <= 1)):
            raise ValueError(f"float images must lie in [0, 1] if mean is given, got {images.amin():.4g} to {images.amax():.4g}")

    def add(self, chunk: int, digest: str, values: Tensor, labels: Tensor, classes: int) -> None:
        self.chunks.append(digest)
        indices = torch.arange(chunk * self.batch_size, chunk * self.batch_size + len(values))
        # NaN is larger than all numbers, so that it is selected last.
        scores = (values.nan_to_num(nan=torch.inf), indices, labels)
        self.kept.append(scores)
        self.buffered += len(values)
        self.noisiest = [largest([*self.noisiest, scores], NOISIEST)]
        counts = labels.bincount(minlength=classes)
        self.class_counts = counts if not len(self.class_counts) else self.class_counts + counts
        if self.buffered >= 2 * self.count + self.batch_size:
            self._cut()

    def _cut(self) -> None:
        self.kept = [smallest(self.kept, self.count)]
        self.buffered = len(self.kept[0][0])

    def save(self) -> None:
        if self.kept:
            self._cut()
        state = {"provenance": self.provenance, "chunks": self.chunks, "class_counts": self.class_counts, "format": self.format}
        state |= {"kept": [list(x) for x in self.kept], "noisiest": [list(x) for x in self.noisiest]}
        with replaced_atomically(self.path) as temporary:
            torch.save(state, temporary)

    def load(self) -> None:
        name = f"the stored state {os.fspath(self.path)!r}"
        try:
            stored = _read(self.path)
            _check_same(name, stored["provenance"], self.provenance, "remove it, or give another path")
            self.chunks, self.class_counts, self.format = list(stored["chunks"]), stored["class_counts"], stored["format"]
            self.kept = [(values, indices, labels) for values, indices, labels in stored["kept"]]
            self.noisiest = [(values, indices, labels) for values, indices, labels in stored["noisiest"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{name} is not complete: remove it") from error
        self.buffered = sum(len(values) for values, _, _ in self.kept)

    def resume(self, pool: Any, size: tuple[int, int] | None) -> None:
        """Continue from a stored state, if there is one, after a check of two of its batches."""
        if not self.path.exists():
            return
        self.load()
        if self.chunks:
            for number in sorted({0, len(self.chunks) - 1}):
                if _hash(_images(pool, self._all_chunks()[number], self.batch_size, size)) != self.chunks[number]:
                    raise ValueError(f"the stored state {os.fspath(self.path)!r} is from another pool: remove it, or give another path")


Scores = tuple[Tensor, Tensor, Tensor]  # values, indices and labels


def smallest(parts: Sequence[Scores], count: int, sign: int = 1) -> Scores:
    """Return the ``count`` entries with the smallest values; of equal values those of the smallest
    index. They are sorted.
    """
    values, indices, labels = (torch.cat(columns) for columns in zip(*parts, strict=True))
    order = torch.from_numpy(np.lexsort((indices.numpy(), sign * values.numpy()))[:count])
    return values[order], indices[order], labels[order]


def largest(parts: Sequence[Scores], count: int) -> Scores:
    """Return the ``count`` entries with the largest values, as :func:`smallest`."""
    return smallest(parts, count, -1)


def _write_index(path: Path, provenance: dict, parts: list[_Part]) -> None:
    formats = [part.format for part in parts if part.format is not None]
    different = next((found for found in formats if found != formats[0]), None)
    if different is not None:
        raise ValueError(f"the images of the pool must have one dtype and one shape, or size must be given, got {formats[0]} and {different}")
    values, indices, labels = smallest([entry for part in parts for entry in part.kept], provenance["count"])
    if not bool(values.isfinite().all()):
        worst = indices[~values.isfinite()]
        raise ValueError(
            f"the teacher's logits are not finite for {len(worst)} of the images that would be selected, such as image {int(worst[0])}, or the files "
            "are damaged: select fewer images, or let the teacher compute in float32"
        )
    chunks = [parts[c % len(parts)].chunks[c // len(parts)] for c in range(parts[0].num_chunks)]
    pool = hashlib.sha256("".join(chunks).encode()).hexdigest()
    noisiest, positions, _ = largest([entry for part in parts for entry in part.noisiest], NOISIEST)
    index = {
        "provenance": provenance | {"pool": pool, "chunks": chunks},
        "selected": [indices, values, labels],
        "noisiest": [positions, noisiest],
        "class_counts": cast(Tensor, sum(part.class_counts for part in parts if len(part.class_counts))),
    }
    with replaced_atomically(path) as temporary:
        torch.save(index, temporary)


def _prefetched(chunks: Iterator[int], pool: Any, batch_size: int, size: tuple[int, int] | None) -> Iterator[tuple[int, Tensor, str, list[int]]]:
    """Yield the number, the images and the hash of each batch, and which of its images are damaged.

    A thread reads one batch ahead.
    """

    def read(chunk: int) -> tuple[int, Tensor, str, list[int]]:
        images = _images(pool, chunk, batch_size, size)
        known = getattr(pool, "damaged", ())  # of an ImagePool
        return chunk, images, _hash(images), [i for i in range(len(images)) if chunk * batch_size + i in known]

    with ThreadPoolExecutor(1) as thread:
        following = None
        for chunk in chunks:
            current, following = following, thread.submit(read, chunk)
            if current is not None:
                yield current.result()
        if following is not None:
            yield following.result()


def _images(pool: Any, chunk: int, batch_size: int, size: tuple[int, int] | None) -> Tensor:
    """Return a batch of the pool, [B, C, H, W], uint8 or float32."""
    first = chunk * batch_size
    return images_of(pool, list(range(first, min(first + batch_size, len(pool)))), size)


@torch.no_grad()
def _logits(
    teacher: nn.Module, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    values = images.to(device)
    values = values.to(dtype) / 255 if values.dtype == torch.uint8 else values.to(dtype)
    if mean is not None and std is not None:
        shift, scale = (torch.tensor(v, device=device, dtype=dtype).view(-1, 1, 1) for v in (mean, std))
        values = (values - shift) / scale
    logits = find_logits(teacher(values))
    if logits.dim() != 2 or len(logits) != len(images):
        raise ValueError(f"the teacher ({type(teacher).__name__}) must return logits [B, K], got {list(logits.shape)} for {len(images)} images")
    return logits


def _hash(images: Tensor) -> str:
    return hashlib.sha256(str((images.dtype, tuple(images.shape))).encode() + images.numpy().tobytes()).hexdigest()[:32]


def _read(path: str | os.PathLike) -> dict:
    wrong = f"{os.fspath(path)!r} is not a complete file of select_samples: remove it, or give another path"
    try:
        stored = torch.load(path, weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no index file {os.fspath(path)!r}") from error
    except Exception as error:
        raise ValueError(wrong) from error
    provenance = stored.get("provenance") if isinstance(stored, dict) else None
    if not isinstance(provenance, dict) or provenance.get("version") != VERSION:
        raise ValueError(wrong)
    return stored


def _check_same(what: str, stored: dict, given: dict, advice: str = "") -> None:
    for name, value in given.items():
        if stored.get(name) != value:
            words = {"teacher": "another teacher", "pool_size": "another pool"}.get(name, f"another {name}")
            raise ValueError(f"{what} was made with {words} ({name} {stored.get(name)}, now {value})" + (f": {advice}" if advice else ""))


def _process() -> tuple[int, int]:
    """Return the number of this process and the number of processes."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _barrier() -> None:
    if _process()[1] > 1:
        torch.distributed.barrier()
