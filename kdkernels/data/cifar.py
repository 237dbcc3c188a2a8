"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read from the official archives on disk."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from .augment import Augment
from .base import ImageData, TensorImages, require_at_least

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


class _CIFAR(ImageData):
    """Base class of CIFAR-10 and CIFAR-100."""

    image_shape = (3, 32, 32)
    archive: str  # file name of the archive on the official page
    archive_md5: str  # MD5 of the archive from the official page
    folder: str  # folder in the archive
    files: dict[str, dict[str, str]]  # split: {name: md5 of the file}
    label_key: bytes

    def __init__(
        self,
        root: str | os.PathLike = "data",
        val_size: int = 0,
        batch_size: int = 64,
        augment: Augment | None = None,
        order_seed: int = 0,
        num_workers: int = 0,
    ):
        super().__init__(batch_size, augment, order_seed, num_workers)
        require_at_least("val_size", val_size, 0)
        if val_size >= 50_000:
            raise ValueError(f"val_size must be less than 50,000, the number of training images, got {val_size}")
        self.root, self.val_size = Path(root), val_size

    def make_splits(self) -> dict[str, TensorImages]:
        read = self._reader()
        images = {split: self._parse([read(name, md5) for name, md5 in files.items()]) for split, files in self.files.items()}
        train, test = images["train"], images["test"]
        if not self.val_size:  # validate on the 10,000 official test images after every epoch, as the literature does
            return {"train": TensorImages(**train), "val": TensorImages(**test), "test": TensorImages(**test)}
        order = torch.randperm(len(train["label"]), generator=torch.Generator().manual_seed(0))
        val, rest = order[: self.val_size], order[self.val_size :]
        parts = {"train": rest, "val": val}
        return {**{k: TensorImages(**{f: v[p] for f, v in train.items()}) for k, p in parts.items()}, "test": TensorImages(**test)}

    def _reader(self) -> Callable[[str, str], bytes]:
        """Return a function (name, md5) -> verified bytes of a file, from archive or folder."""
        archive, folder = self.root / self.archive, self.root / self.folder
        if archive.is_file():
            _verify(archive.read_bytes(), self.archive_md5, archive)
            with tarfile.open(archive) as tar:
                members = {name: cast(IO[bytes], tar.extractfile(f"{self.folder}/{name}")).read() for files in self.files.values() for name in files}
            return lambda name, md5: _verify(members[name], md5, archive / name)
        if folder.is_dir():

            def read(name: str, md5: str) -> bytes:
                if not (folder / name).is_file():
                    raise FileNotFoundError(f"there is no file {name!r} in {folder}; unpack {self.archive} from {PAGE} again")
                return _verify((folder / name).read_bytes(), md5, folder / name)

            return read
        raise FileNotFoundError(
            f"root: neither {archive} nor {folder} exists. Download {self.archive} ('{type(self).__name__} python version') "
            f"from {PAGE} into {self.root}"
        )

    def _parse(self, files: list[bytes]) -> dict[str, Tensor]:
        parts = [_Unpickler(io.BytesIO(content), encoding="bytes").load() for content in files]
        image = torch.cat([torch.from_numpy(part[b"data"]).view(-1, 3, 32, 32) for part in parts])
        return {"image": image, "label": torch.tensor([label for part in parts for label in part[self.label_key]])}


class CIFAR10(_CIFAR):
    """CIFAR-10 with 50,000 training and 10,000 test images [3, 32, 32] of ten classes.

    Checksums are verified before any file is parsed. Nothing is downloaded. Only arrays, lists,
    dicts and strings are unpickled.

    Args:
        root: folder that contains ``cifar-10-python.tar.gz`` or the folder unpacked from it.
        val_size: number of training images held out for validation, the same images in each run; 0
            validates on the official test images, as the literature does.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.

    Raises:
        FileNotFoundError: neither the archive nor the unpacked folder exists; the message names the
            official page.
        ValueError: a checksum differs.
    """

    num_classes = 10
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    archive, archive_md5, folder = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", "cifar-10-batches-py"
    files = {  # noqa: RUF012 - never written to
        "train": {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
    }
    label_key = b"labels"


class CIFAR100(_CIFAR):
    """CIFAR-100 with 50,000 training and 10,000 test images [3, 32, 32] of 100 (fine) classes.

    Checksums are verified before any file is parsed. Nothing is downloaded. Only arrays, lists,
    dicts and strings are unpickled.

    Args:
        root: folder that contains ``cifar-100-python.tar.gz`` or the folder unpacked from it.
        val_size: number of training images held out for validation, the same images in each run; 0
            validates on the official test images, as the literature does.
        batch_size, augment, order_seed, num_workers: see :class:`ImageData`.

    Raises:
        FileNotFoundError: neither the archive nor the unpacked folder exists; the message names the
            official page.
        ValueError: a checksum differs.
    """

    num_classes = 100
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    archive, archive_md5, folder = "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", "cifar-100-python"
    files = {  # noqa: RUF012 - never written to
        "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
        "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    }
    label_key = b"fine_labels"


def _verify(content: bytes, md5: str, path: Path) -> bytes:
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != md5:
        raise ValueError(f"{path} is damaged or not the official file: its MD5 is {actual}, expected {md5}. Download it again from {PAGE}")
    return content


class _Unpickler(pickle.Unpickler):
    """Unpickles arrays, lists, dicts and strings. Any other object raises UnpicklingError."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # the module of this function depends on the version of numpy
        if module == "numpy" and name in ("ndarray", "dtype"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a CIFAR file: only arrays, lists, dicts and strings are unpickled")
