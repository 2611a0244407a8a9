#!/usr/bin/env python3
"""Make the digits, train the small Vim on them and test it, end to end: python reproduce.py RUN

RUN/data gets the pictures, RUN/training the checkpoints and the curves, RUN the weights; see README.md for what the
numbers should be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from steps import run_and_say

HERE = Path(__file__).resolve().parent
VIM = HERE.parents[1] / "vim"
MODEL = "vim_pico_patch4_32"
RECIPE = (
    *("--device", "cpu", "--num_workers", "1", "--epochs", "80", "--batch-size", "32"),
    *("--lr", "1.5e-3", "--unscale-lr", "--warmup-epochs", "2", "--warmup-lr", "1.5e-4", "--cooldown-epochs", "0"),
    *("--affine", "--aa", "none", "--hflip", "0", "--color-jitter", "0", "--reprob", "0"),
    *("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--clip-grad", "1"),
    *("--model-ema-decay", "0.99", "--mend", "ema-best", "lr-lag"),
)


def commands(run_folder: Path, training: Sequence[str] = ()) -> list[list[str]]:
    """Return the command lines of the recipe, in order: make, train, write the weights, test, and name the samples.

    Args:
        training: further arguments of the training.
    """
    data, samples, trained = run_folder / "data", run_folder / "samples", run_folder / "training"
    weights = run_folder / "vim_pico_digits.safetensors"
    steps: list[list[str | Path]] = [
        [HERE / "make_dataset.py", data, "--samples", samples],
        [VIM / "main.py", "--model", MODEL, "--data-path", data, "--output_dir", trained, *RECIPE, *training],
        [HERE / "save_weights.py", trained / "best_checkpoint.pth", weights],
        [VIM / "main.py", "--eval", "--resume", weights, "--device", "cpu", "--data-path", data / "held_out"],
        [VIM / "infer_rpi.py", "--image", samples, "--checkpoint", weights, "--topk", "1"],
    ]
    return [[sys.executable, *map(str, step)] for step in steps]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; return 0, or the exit code of the step that failed, which has said why."""
    parser = argparse.ArgumentParser(
        description="Make the digits, train the small Vim on them and test it.",
        epilog="Everything else (--epochs N, --auto-resume ...) goes to the training, after the recipe.",
    )
    parser.add_argument("run_folder", type=Path, help="new folder for the pictures and the results")
    args, training = parser.parse_known_args(arguments)
    for command in commands(args.run_folder, training):
        code = run_and_say(command)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run())
