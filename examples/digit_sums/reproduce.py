#!/usr/bin/env python3
"""Fine-tune the digits' Vim to add two digits, with an interruption, and test it: python reproduce.py RUN

RUN/data gets the pictures, RUN/training the checkpoints and the curves, RUN the weights; see README.md for what the
numbers should be.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
VIM, DIGITS = HERE.parents[1] / "vim", HERE.parent / "digits"
sys.path.insert(0, str(DIGITS))

from steps import run_and_say  # noqa: E402

RECIPE = (
    *("--device", "cpu", "--num_workers", "1", "--input-size", "32", "64", "--epochs", "10", "--batch-size", "32"),
    *("--lr", "1.5e-3", "--unscale-lr", "--warmup-epochs", "1", "--warmup-lr", "5e-4", "--cooldown-epochs", "0"),
    *("--affine", "--aa", "none", "--hflip", "0", "--color-jitter", "0", "--reprob", "0"),
    *("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--clip-grad", "1"),
    *("--model-ema-decay", "0.99", "--mend", "ema-best", "lr-lag"),
)


def prepare_command(run_folder: Path, pictures: Sequence[str] = ()) -> list[str]:
    """Return the command that makes the pictures; `pictures` are further arguments of it."""
    return _python(HERE / "make_sums.py", run_folder / "data", *pictures)


def training_command(run_folder: Path, training: Sequence[str] = ()) -> list[str]:
    """Return the command that fine-tunes, or goes on with it; `training` are further arguments."""
    places = ("--data-path", run_folder / "data", "--output_dir", run_folder / "training", "--auto-resume")
    weights = DIGITS / "vim_pico_digits.safetensors"
    return _python(VIM / "main.py", "--finetune", weights, *places, *RECIPE, *training)


def test_commands(run_folder: Path) -> list[list[str]]:
    """Return the commands that write the weights, test them on the held-out pictures, and name the samples."""
    weights = run_folder / "vim_pico_digit_sums.safetensors"
    return [
        _python(DIGITS / "save_weights.py", run_folder / "training" / "best_checkpoint.pth", weights),
        _python(
            *(VIM / "main.py", "--eval", "--resume", weights, "--device", "cpu"),
            *("--data-path", run_folder / "data" / "held_out"),
        ),
        _python(VIM / "infer_rpi.py", "--image", HERE / "samples", "--checkpoint", weights, "--topk", "1"),
    ]


def _python(*words: str | Path) -> list[str]:
    return [sys.executable, *map(str, words)]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe; return 0, or the exit code of the step that failed, which has said why."""
    parser = argparse.ArgumentParser(
        description="Fine-tune the digits' Vim to add two digits, and test it.",
        epilog="Everything else (--epochs N, --log-interval N ...) goes to the training, after the recipe.",
    )
    parser.add_argument("run_folder", type=Path, help="new folder for the pictures and the results")
    parser.add_argument("--pictures", default="", metavar="ARGUMENTS", help="of make_sums.py, in one string")
    args, training = parser.parse_known_args(arguments)
    train = training_command(args.run_folder, training)
    code = run_and_say(prepare_command(args.run_folder, shlex.split(args.pictures)))
    if code:
        return code
    # The first epoch is over when log.txt has a line; the run then stops somewhere in the second.
    code = run_and_say(train, interrupt_after=args.run_folder / "training" / "log.txt")
    if code not in (0, 128 + signal.SIGTERM):
        return code
    for command in (train, *test_commands(args.run_folder)):
        code = run_and_say(command)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(run())
