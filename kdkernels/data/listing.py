"""Listing of the image files of a folder with their classes, and of the files that are left out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_SYSTEM_FILES = {"__macosx", "thumbs.db", "desktop.ini"}  # written by operating systems and archivers; ignored like hidden files


def split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split, or ``{"train": root}`` if ``root`` has the class folders.

    Raises:
        FileNotFoundError: ``root`` is not a folder.
        ValueError: it is not clear which folders are splits and which are classes.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"root: there is no folder {str(root)!r}")
    names = _visible_folders(root)
    found = {split: [name for name in names if name.lower() in aliases] for split, aliases in SPLITS.items()}
    # A class may be called "train". Its folder contains images and no folders.
    if not any(_visible_folders(root / name) for name in found["train"]):
        if names and sum(map(len, found.values())) == len(names):
            raise ValueError(f"root: {str(root)!r} must contain a folder 'train' with a folder per class, found {names}")
        return {"train": root}
    others = [name for name in names if not any(name in folders for folders in found.values())]
    if others:
        raise ValueError(
            f"root: {str(root)!r} has the split {found['train'][0]!r} and the folders {others}, which are not splits (train, val and test): "
            "remove them, or give the folder that contains the class folders"
        )
    for split, folders in found.items():
        if len(folders) > 1:
            raise ValueError(f"root: {str(root)!r} must have one folder per split, has {len(folders)} folders for {split}: {folders}")
    return {split: root / folders[0] for split, folders in found.items() if folders}


class Listing:
    """A folder that contains a folder per class."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.classes = _visible_folders(folder)
        if len(self.classes) < 2:
            raise ValueError(f"root: {str(folder)!r} must contain a folder for each of at least 2 classes, found {self.classes}")

    def files(self, classes: Sequence[str], left_out: LeftOut, require_all: bool) -> list[tuple[Path, int]]:
        """Return the image files, each with the index of its class in ``classes``.

        Raises:
            ValueError: a class folder is not among ``classes``; there is no image at all; or
                ``require_all`` is true and a class has no image.
        """
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise ValueError(f"{self.folder} has classes that the training images do not have: {unknown}; the training images have {classes}")
        for entry in sorted(self.folder.iterdir()):
            if not entry.is_dir() and not _is_hidden(entry.name):
                left_out.add("are not in a class folder", entry)
        files = []
        for label, name in enumerate(classes):
            class_files = []
            for path in _walk(self.folder / name, left_out):
                if path.suffix.lower() in SUFFIXES:
                    class_files.append((path, label))
                else:
                    left_out.add("do not have the suffix of an image", path)
            if not class_files and require_all:
                raise ValueError(f"{self.folder / name} contains no image (files that end in {', '.join(sorted(SUFFIXES))})")
            files += class_files
        if not files:
            raise ValueError(f"{self.folder} contains no image (files that end in {', '.join(sorted(SUFFIXES))})")
        return files


def image_files(folder: Path, left_out: LeftOut) -> list[Path]:
    """Return the image files in a folder, at any depth, in the order of their names.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: the folder contains no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}")
    files = []
    for path in _walk(folder, left_out):
        if path.suffix.lower() in SUFFIXES:
            files.append(path)
        else:
            left_out.add("do not have the suffix of an image", path)
    if not files:
        raise ValueError(f"{folder} contains no image (files that end in {', '.join(sorted(SUFFIXES))})")
    return files


class LeftOut:
    """The files that were left out, grouped by reason."""

    def __init__(self, root: Path):
        self.root = root
        self.paths: dict[str, list[str]] = {}

    def add(self, reason: str, path: Path, detail: str = "") -> None:
        self.paths.setdefault(reason, []).append(f"{path}: {detail}" if detail else str(path))

    def __len__(self) -> int:
        return sum(map(len, self.paths.values()))

    def __str__(self) -> str:
        lines = [f"{len(self)} file{'s' * (len(self) > 1)} under {self.root} {'are' if len(self) > 1 else 'is'} left out"]
        for reason, paths in self.paths.items():
            more = [f"... and {len(paths) - 10} more"] * (len(paths) > 10)
            lines += [f"  {len(paths)} {reason}:", *(f"    {path}" for path in paths[:10] + more)]
        return "\n".join(lines)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def _visible_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _walk(folder: Path, left_out: LeftOut, parents: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files of a folder at any depth, in the order of their names.

    Links to folders are followed, except links to a folder that contains the link (``parents`` are
    the resolved folders around ``folder``).
    """
    if not folder.is_dir():
        return
    real = os.path.realpath(folder)
    if real in parents:
        left_out.add("are links to a folder that contains them", folder)
        return
    for entry in sorted(folder.iterdir()):
        if _is_hidden(entry.name):
            left_out.add("are hidden", entry)
        elif entry.is_dir():
            yield from _walk(entry, left_out, (*parents, real))
        else:  # includes broken links: reading them raises an error that names the link
            yield entry
