#!/usr/bin/env python3
"""Write scikit-learn's handwritten digits as folders of pictures: python make_dataset.py FOLDER

FOLDER/train/CLASS/*.png and FOLDER/val/CLASS/*.png are for training and for choosing the epoch;
FOLDER/held_out/val/CLASS/*.png is for the one test at the end: `main.py --eval --data-path FOLDER/held_out`.
The same digits go to the same files on every machine. Needs scikit-learn, numpy and Pillow.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FOLDERS = {"train": "train", "val": "val", "held_out": "held_out/val"}  # split: its place in the data folder
TRAIN_SHARE, VAL_SHARE = 0.60, 0.15  # of each class; the rest is held out
SEED = 0
SIDE = 32  # pixels
LEVELS = 16  # the scans count ink from 0 to 16


class DatasetError(RuntimeError):
    """The pictures cannot be written; one sentence says why."""


def load_scans() -> tuple[Any, Any]:
    """Return the scans, (1797, 8, 8) fp64 from 0 (paper) to 16 (ink), and their digits, (1797,) int64.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, as bundled by scikit-learn.
    Raises:
        DatasetError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError(
            "The digits come with scikit-learn, which is missing: "
            f"`{sys.executable} -m pip install scikit-learn` installs it."
        ) from error
    bundle = load_digits()
    return bundle.images, bundle.target


def split_indices(digits: Any) -> dict[str, list[int]]:
    """Deal out every class by the same shares, in an order that depends on `SEED` alone.

    Args:
        digits: (n,) class number of each scan.
    Returns:
        For each split the sorted indices of its scans; every index is in exactly one split.
    """
    import numpy as np

    random = np.random.RandomState(SEED)  # the one generator whose numbers numpy promises never to change
    parts: dict[str, list[int]] = {split: [] for split in FOLDERS}
    for digit in range(len(CLASS_NAMES)):
        order = random.permutation(np.flatnonzero(digits == digit)).tolist()
        first = round(TRAIN_SHARE * len(order))
        second = first + round(VAL_SHARE * len(order))
        for split, dealt in zip(parts, (order[:first], order[first:second], order[second:]), strict=True):
            parts[split] += dealt
    return {split: sorted(indices) for split, indices in parts.items()}


def draw(scan: Any) -> Any:
    """Return a scan, (8, 8) from 0 to 16, as a grey Pillow picture of `SIDE` x `SIDE` pixels, dark on white."""
    import numpy as np
    from PIL import Image

    grey = np.rint(255 * (1 - scan / LEVELS)).astype(np.uint8)
    return Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def write_dataset(folder: Path) -> dict[str, int]:
    """Write all pictures, whole or not at all, and return the number of them in each split.

    Args:
        folder: a new or an empty folder. The pictures are called after their index in scikit-learn's bundle.
    Raises:
        DatasetError: the folder holds something already or cannot be written; scikit-learn is missing.
    """
    scans, digits = load_scans()
    parts = split_indices(digits)
    try:
        if folder.exists() and any(folder.iterdir()):
            raise DatasetError(f"{str(folder)!r} is not empty; name a new folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for split, indices in parts.items():
                for index in indices:
                    path = unfinished / FOLDERS[split] / CLASS_NAMES[digits[index]] / f"{index:04d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    draw(scans[index]).save(path, optimize=True)
            unfinished.chmod(0o755)  # mkdtemp's is the owner's alone
            if folder.exists():
                folder.rmdir()
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise DatasetError(f"Cannot write to {str(folder)!r}: {error.strerror or error}.") from error
    return {split: len(indices) for split, indices in parts.items()}


def write_samples(folder: Path) -> None:
    """Write the first held-out scan of each class as folder/CLASS.png."""
    scans, digits = load_scans()
    held_out = split_indices(digits)["held_out"]
    folder.mkdir(parents=True, exist_ok=True)
    for digit, name in enumerate(CLASS_NAMES):
        first = next(index for index in held_out if digits[index] == digit)
        draw(scans[first]).save(folder / f"{name}.png", optimize=True)


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code: 2, after one sentence, if it cannot be done."""
    parser = argparse.ArgumentParser(description="Write scikit-learn's handwritten digits as folders of pictures.")
    parser.add_argument("folder", type=Path, help="new or empty folder for train/, val/ and held_out/val/")
    parser.add_argument("--samples", type=Path, metavar="DIR", help="also write one held-out picture per class here")
    args = parser.parse_args(arguments)
    try:
        counts = write_dataset(args.folder)
        if args.samples is not None:
            write_samples(args.samples)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: " + ", ".join(f"{count} pictures in {FOLDERS[split]}" for split, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(run())
