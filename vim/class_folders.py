"""Folders with one folder of pictures per class: where they lie, and which pictures are kept for validation."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from class_match import DataError
from pictures import PICTURE_SUFFIXES


def class_folders(root: Path) -> list[str]:
    """Return the names of the class folders in `root`, sorted; those that begin with a dot are not looked at.

    Raises:
        DataError: there is no such folder, it or a class folder cannot be read, or it holds no folder.
    """
    if os.path.isfile(root.parent):
        raise DataError(
            f"{str(root.parent)!r} is a file; --data-path names a folder, the one that holds {root.name}/ with one "
            "folder of pictures per class."
        )
    if not os.path.isdir(root.parent):
        raise DataError(
            f"The data folder {str(root.parent)!r} does not exist; --data-path names the folder that holds "
            f"{root.name}/ with one folder of pictures per class."
        )
    if not _is_open(root.parent):
        raise DataError(f"The folder {str(root.parent)!r} cannot be read: permission denied.")
    if not os.path.isdir(root):
        raise DataError(
            f"{str(root.parent)!r} has no folder {root.name!r}; --data-path names the folder that holds "
            f"{root.name}/ with one folder of pictures per class, or that holds these folders itself."
        )
    try:
        folders = _folders_in(root)
    except OSError as error:
        raise DataError(f"The folder {str(root)!r} cannot be read: {error.strerror}.") from error
    for folder in folders:
        if not _is_open(root / folder):  # torchvision would take it for an empty one
            raise DataError(f"The class folder {str(root / folder)!r} cannot be read: permission denied.")
    if not folders:
        raise DataError(f"{str(root)!r} holds no class folders; it needs one folder of pictures per class.")
    return folders


def _is_open(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)


def _folders_in(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def is_picture(path: str) -> bool:
    """Tell whether a file is a picture, by its name alone."""
    name = os.path.basename(path)
    return os.path.splitext(name)[1].lower() in PICTURE_SUFFIXES and not name.startswith(".")


def folder_to_split(data: Path) -> Path | None:
    """Return the class folders' parent where `data` has no val/: DATA/train, else DATA itself; None if it has.

    Folders in DATA are classes if a picture lies right in one of them. So a path one level too high, or folders
    training/CLASS and validation/CLASS, do not pass for classes; there, too, the result is None.
    """
    if os.path.isdir(data / "val"):
        return None
    if os.path.isdir(data / "train"):
        return data / "train"
    try:
        holds_classes = any(_holds_picture(data / name) for name in _folders_in(data))
    except OSError:  # `class_folders` says why
        return None
    return data if holds_classes else None


def _holds_picture(folder: Path) -> bool:
    if not _is_open(folder):
        return False
    with os.scandir(folder) as entries:
        return any(is_picture(entry.name) and entry.is_file() for entry in entries)


def held_out(paths: Sequence[str], part: float, seed: int) -> list[int]:
    """Choose the pictures that are kept for validation; return their indices, ascending.

    Of each class the nearest number to `part` of it: at least 1 if it has 2 pictures or more, and never all. They
    are those whose paths come first in the order of a hash of seed and path, so the choice depends on nothing else:
    not on the order of `paths`, the place of the data, other classes, or the version of a random number generator.
    A picture that is added to a class moves at most one other from one part to the other.

    Args:
        paths: CLASS/picture of each picture, with "/", each path once.
        part: of each class, between 0 and 1.
        seed: of the draw.
    Raises:
        DataError: `part` is 0 or less, 1 or more, or no class has two pictures.
    """
    if not 0 < part < 1:
        raise DataError(f"--val-split must lie between 0 and 1, got {part}; 0.1 keeps a tenth for validation.")
    members: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        members.setdefault(path.split("/", 1)[0], []).append(index)
    chosen: list[int] = []
    for indices in members.values():
        count = min(max(round(part * len(indices)), 1), len(indices) - 1)
        chosen += sorted(indices, key=lambda index: _draw(paths[index], seed))[:count]
    if not chosen:
        raise DataError(
            "There is no val/, and no class has two pictures of which one could be kept for validation; "
            "add pictures, or a val/ with the same class folders."
        )
    return sorted(chosen)


def _draw(path: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{path}".encode("utf-8", "surrogateescape")).digest()


def paths_within(root: str, paths: Iterable[str]) -> list[str]:
    """Return the paths relative to `root`, which they all begin with, with "/" on every system."""
    start = len(os.path.join(root, ""))
    return [path[start:].replace(os.sep, "/") for path in paths]
