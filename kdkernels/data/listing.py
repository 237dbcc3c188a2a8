"""Which files of a folder are images of which class, and what was left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_LITTER = {"__macosx", "thumbs.db", "desktop.ini"}  # that systems leave in folders, besides hidden files


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split, or ``{"train": root}`` where the classes lie in ``root`` itself.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is not clear which folders are splits and which are classes.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"root: there is no folder {str(root)!r}")
    names = _visible_folders(root)
    found = {split: [name for name in names if name.lower() in own] for split, own in SPLITS.items()}
    if not any(_visible_folders(root / name) for name in found["train"]):  # "train" may be a class: it then holds images and no folders
        if names and sum(map(len, found.values())) == len(names):
            raise ValueError(f"root: {str(root)!r} must hold a folder 'train' with a folder per class, found {names}")
        return {"train": root}
    others = [name for name in names if not any(name in own for own in found.values())]
    if others:
        raise ValueError(f"root: {str(root)!r} has the split {found['train'][0]!r} beside {others}, which are no splits (train, val and test)")
    for split, own in found.items():
        if len(own) > 1:
            raise ValueError(f"root: {str(root)!r} has {len(own)} folders for {split}: {own}")
    return {split: root / own[0] for split, own in found.items() if own}


class Listing:
    """A folder that holds a folder per class."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.classes = _visible_folders(folder)
        if len(self.classes) < 2:
            raise ValueError(f"root: {str(folder)!r} must hold a folder for each of at least 2 classes, found {self.classes}")

    def files(self, classes: list[str], left_out: LeftOut, every: bool) -> list[tuple[Path, int]]:
        """The images, with the number of their class in ``classes``.

        Raises:
            ValueError: a class that is not among ``classes``; no image at all, or none of a class and ``every`` must have one.
        """
        unknown = [name for name in self.classes if name not in classes]
        if unknown:
            raise ValueError(f"{self.folder} has classes that the training images do not have: {unknown}; those are {classes}")
        for entry in sorted(self.folder.iterdir()):
            if not entry.is_dir() and not _is_hidden(entry.name):
                left_out.add("lie in no folder of a class", entry)
        files = []
        for label, name in enumerate(classes):
            own = []
            for path in _walk(self.folder / name, left_out):
                if path.suffix.lower() in SUFFIXES:
                    own.append((path, label))
                else:
                    left_out.add("have no suffix of an image", path)
            if not own and every:
                raise ValueError(f"{self.folder / name} holds no image (files that end in {', '.join(sorted(SUFFIXES))})")
            files += own
        if not files:
            raise ValueError(f"{self.folder} holds no image (files that end in {', '.join(sorted(SUFFIXES))})")
        return files


def image_files(folder: Path, left_out: LeftOut) -> list[Path]:
    """Image files in a folder, at any depth, in the order of their names.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}")
    files = []
    for path in _walk(folder, left_out):
        if path.suffix.lower() in SUFFIXES:
            files.append(path)
        else:
            left_out.add("have no suffix of an image", path)
    if not files:
        raise ValueError(f"{folder} holds no image (files that end in {', '.join(sorted(SUFFIXES))})")
    return files


class LeftOut:
    """Files that were left out, by the reason."""

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
    return name.startswith(".") or name.lower() in _LITTER


def _visible_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _walk(folder: Path, left_out: LeftOut, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files at any depth, in the order of their names; folders through links too, but none within itself."""
    if not folder.is_dir():
        return
    real = os.path.realpath(folder)
    if real in above:
        left_out.add("are links to a folder that they lie in", folder)
        return
    for entry in sorted(folder.iterdir()):
        if _is_hidden(entry.name):
            left_out.add("are hidden", entry)
        elif entry.is_dir():
            yield from _walk(entry, left_out, (*above, real))
        else:  # a link to nothing too: it cannot be read, and is named
            yield entry
