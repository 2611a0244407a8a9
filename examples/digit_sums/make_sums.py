#!/usr/bin/env python3
"""Write pictures of two handwritten digits, whose class is their sum: python make_sums.py FOLDER

FOLDER/train/SUM/*.png, FOLDER/val/SUM/*.png and FOLDER/held_out/val/SUM/*.png are made of the scans that
examples/digits deals to training, to validation and to the test at the end: no scan is in two of them.
The same seed gives the same pictures. Needs scikit-learn, numpy and Pillow.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "digits"))

from make_dataset import FOLDERS, LEVELS, DatasetError, load_scans, split_indices

SUMS = tuple(range(19))  # of two digits
CLASS_NAMES = tuple(f"sum_{total:02d}" for total in SUMS)
COUNTS = {"train": 9500, "val": 380, "held_out": 950}  # pictures of all classes together
SEEDS = {"train": 0, "val": 1, "held_out": 2}
# Evaluation at 32 x 64 pixels resizes a picture to this, and then cuts out the middle.
HEIGHT, WIDTH = 36, 73
MARGIN_X, MARGIN_Y = 7, 4  # pixels that are left to clutter on each side
SIDES = 22, 26  # pixels of a digit, least and most
TURN = 10  # degrees to either side, at most
STROKES = 2, 5  # lines across a picture, fewest and most


def draw_sum(scans: Sequence[Any], random: Any) -> Any:
    """Return a grey Pillow picture of the scans, side by side, each sized, turned and placed at random, on clutter.

    Args:
        scans: two scans, (8, 8) from 0 (paper) to 16 (ink).
        random: numpy.random.RandomState.
    """
    import numpy as np
    from PIL import Image

    picture = _draw_clutter(random)
    ink = Image.new("L", picture.size)
    room = (WIDTH - 2 * MARGIN_X) // len(scans)
    for place, scan in enumerate(scans):
        side = random.randint(SIDES[0], SIDES[1] + 1)
        digit = Image.fromarray(np.rint(255 * scan / LEVELS).astype(np.uint8))
        digit = digit.resize((side, side), Image.Resampling.BICUBIC)
        digit = digit.rotate(random.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=False)
        left = MARGIN_X + place * room + random.randint(0, room - side + 1)
        ink.paste(digit, (left, random.randint(MARGIN_Y, HEIGHT - MARGIN_Y - side + 1)))
    shade = 1 - np.asarray(ink) / 255
    grey = np.asarray(picture) * shade + random.normal(0, 8, (HEIGHT, WIDTH))
    return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))


def _draw_clutter(random: Any) -> Any:
    """Return paper of an uneven brightness with pale lines across it."""
    from PIL import Image, ImageDraw

    paper = Image.new("L", (WIDTH, HEIGHT), int(random.randint(215, 256)))
    pen = ImageDraw.Draw(paper)
    for _ in range(random.randint(STROKES[0], STROKES[1] + 1)):
        ends = [(int(random.randint(0, WIDTH)), int(random.randint(0, HEIGHT))) for _ in range(2)]
        pen.line(ends, fill=int(random.randint(130, 200)), width=int(random.randint(1, 3)))
    return paper


def deal_pairs(digits: Any, indices: Sequence[int], count: int, random: Any) -> list[tuple[int, int]]:
    """Return `count` pairs of scans, the sums in turn, so that each is as frequent as the others.

    Args:
        digits: (n,) the digit of each scan.
        indices: of the scans that may be used, at least one of each digit.
    """
    of_digit = [[index for index in indices if digits[index] == digit] for digit in range(10)]
    pairs = []
    for number in range(count):
        total = SUMS[number % len(SUMS)]
        left = random.randint(max(0, total - 9), min(9, total) + 1)
        first, second = (of_digit[digit][random.randint(len(of_digit[digit]))] for digit in (left, total - left))
        pairs.append((first, second))
    return pairs


def write_sums(folder: Path, counts: dict[str, int]) -> None:
    """Write the pictures of each split, whole or not at all, called NUMBER_SCAN_SCAN.png.

    Args:
        folder: a new or an empty folder.
        counts: pictures of each split.
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
            for split, count in counts.items():
                _write_split(unfinished / FOLDERS[split], scans, digits, parts[split], count, SEEDS[split])
            unfinished.chmod(0o755)  # mkdtemp's is the owner's alone
            if folder.exists():
                folder.rmdir()
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise DatasetError(f"Cannot write to {str(folder)!r}: {error.strerror or error}.") from error


def _write_split(folder: Path, scans: Any, digits: Any, indices: Sequence[int], count: int, seed: int) -> None:
    import numpy as np

    random = np.random.RandomState(seed)  # the one generator whose numbers numpy promises never to change
    for number, pair in enumerate(deal_pairs(digits, indices, count, random)):
        path = folder / CLASS_NAMES[sum(digits[list(pair)])] / f"{number:04d}_{pair[0]:04d}_{pair[1]:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_sum(scans[list(pair)], random).save(path)


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code: 2, after one sentence, if it cannot be done."""
    parser = argparse.ArgumentParser(description="Write pictures of two handwritten digits, whose class is their sum.")
    parser.add_argument("folder", type=Path, help="new or empty folder for train/, val/ and held_out/val/")
    for split, count in COUNTS.items():
        flag = f"--{split.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=count, metavar="N", help="pictures there (default: %(default)s)")
    args = parser.parse_args(arguments)
    counts = {split: getattr(args, split) for split in COUNTS}
    if min(counts.values()) < len(SUMS):
        parser.error(f"each part needs at least {len(SUMS)} pictures, one of each sum")
    try:
        write_sums(args.folder, counts)
    except DatasetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: " + ", ".join(f"{count} pictures in {FOLDERS[split]}" for split, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(run())
