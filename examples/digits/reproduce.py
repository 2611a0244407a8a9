#!/usr/bin/env python3
"""Make the digits, train the small Vim on them and test it, end to end: python reproduce.py RUN

RUN/data gets the pictures, RUN the checkpoint and the curves; see README.md for what the numbers should be.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
VIM = HERE.parents[1] / "vim"
MODEL = "vim_pico_patch4_32"


def commands(run_folder: Path, training: Sequence[str] = ()) -> list[list[str]]:
    """Return the command lines of the recipe, in order: make, train, test, and name the samples.

    Args:
        training: further arguments of train.py.
    """
    data, samples, checkpoint = run_folder / "data", run_folder / "samples", run_folder / "vim_pico_digits.safetensors"
    evaluation = ("--eval", "--resume", checkpoint, "--model", MODEL, "--device", "cpu")
    steps: list[list[str | Path]] = [
        [HERE / "make_dataset.py", data, "--samples", samples],
        [HERE / "train.py", "--data-path", data, "--output-dir", run_folder, *training],
        [VIM / "main.py", *evaluation, "--data-path", data / "held_out"],
        [VIM / "infer_rpi.py", "--image", samples, "--checkpoint", checkpoint, "--topk", "1"],
    ]
    return [[sys.executable, *map(str, step)] for step in steps]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; return 0, or the exit code of the step that failed, which has said why."""
    parser = argparse.ArgumentParser(
        description="Make the digits, train the small Vim on them and test it.",
        epilog="Everything else (--epochs N, --threads N ...) goes to train.py.",
    )
    parser.add_argument("run_folder", type=Path, help="new folder for the pictures and the results")
    args, training = parser.parse_known_args(arguments)
    for command in commands(args.run_folder, training):
        print("$ " + shlex.join(["python", *command[1:]]), flush=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run())
