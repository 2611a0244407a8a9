"""Small pictures to train on, and training runs of `main.py` as a person starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import main
from flags import get_args_parser

MAIN = Path(main.__file__).resolve()
MODEL = "vim_pico_patch4_32"
CLASSES = {"blue": (40, 40, 220), "green": (30, 200, 30), "red": (220, 40, 40)}
# A run of nothing but the network and its optimizer; three steps an epoch of the 24 pictures below.
PLAIN = (
    *("--model", MODEL, "--device", "cpu", "--batch-size", "8", "--num_workers", "0", "--warmup-epochs", "0"),
    *("--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--drop-path", "0", "--lr", "0.05", "--sched", "step"),
)


def write_pictures(folder: Path, train: int = 8, val: int = 4, classes=CLASSES, side=(36, 40)) -> Path:
    """Write `train` and `val` pictures of a disc in each class's colour; no val/ folder for val=0."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in classes.items():
            for number in range(count):
                pixels = random.integers(0, 90, (*side, 3))
                rows, columns = np.indices(side)
                disc = (rows - random.integers(10, 26)) ** 2 + (columns - random.integers(10, 26)) ** 2 < 90
                pixels[disc] = np.clip(np.array(colour) + random.integers(-30, 30, 3), 0, 255)
                path = folder / split / name / f"{number:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def settings(*words):
    """The settings of a command line, as `main` gets them, checked."""
    from flags import check

    args = get_args_parser().parse_args([str(word) for word in words])
    check(args)
    args.distributed, args.rank, args.world_size, args.gpu = False, 0, 1, None
    return args


def command(*words, launcher=()) -> list[str]:
    """The command line of a training run in a process of its own."""
    return [sys.executable, *launcher, str(MAIN), *map(str, words)]


def start(*words, launcher=(), **environment) -> subprocess.Popen[str]:
    """Start `main.py` with these words; its two outputs come as one text."""
    return subprocess.Popen(
        command(*words, launcher=launcher),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        start_new_session=True,  # a group of processes that a test can signal
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a run; return its exit code and what it printed."""
    text, _ = process.communicate(timeout=300)
    return process.returncode, text


def load(path: Path) -> dict:
    """A checkpoint's entries, read without our own reader."""
    import argparse

    torch.serialization.add_safe_globals([argparse.Namespace])
    return torch.load(path, weights_only=True)


def differences(one, two, where="") -> list[str]:
    """The places in which two trees of tensors and plain data differ by a single bit."""
    if isinstance(one, torch.Tensor):
        same = isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
        return [] if same else [where]
    if isinstance(one, dict):
        keys = set(one) ^ set(two)
        return [f"{where}.{key}" for key in keys] + [
            place for key in set(one) & set(two) for place in differences(one[key], two[key], f"{where}.{key}")
        ]
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return [where]
        return [
            place for i, (a, b) in enumerate(zip(one, two, strict=True)) for place in differences(a, b, f"{where}[{i}]")
        ]
    return [] if one == two else [where]
