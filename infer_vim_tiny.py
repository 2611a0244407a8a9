#!/usr/bin/env python3
"""The shortest way to see Vim-Tiny run: python infer_vim_tiny.py [PICTURE ...]

With weights (a file given with --checkpoint, or the published ones from the Hugging Face hub) it names what is
in the pictures. Without, it says so, shows that the network runs and how long it takes, and then lets the small
model that is shipped in examples/ read a handwritten digit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "vim"))

from command_line import DEFAULT_MODEL, run_script, thread_count  # noqa: E402

PUBLISHED = "hustvl/Vim-tiny-midclstok"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Name what is in pictures with Vim-Tiny, or show that it runs.")
    parser.add_argument("picture", nargs="*", help="what vim/infer_rpi.py takes for --image")
    parser.add_argument("--checkpoint", metavar="WEIGHTS", help=f"file or repository (default: {PUBLISHED})")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads (default: torch's choice)")
    return parser


def demonstrate(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        CheckpointError, UsageError: the weights that were asked for cannot be used.
    """
    import torch

    from checkpoint import CheckpointError
    from classify import load_classifier

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        classifier = load_classifier(DEFAULT_MODEL, args.checkpoint or PUBLISHED)
    except CheckpointError as error:
        if args.checkpoint:
            raise
        print(f"No weights for Vim-Tiny could be loaded: {str(error).rstrip('.')}.")
        print("With random weights it names nothing, but here is how it runs:")
        show_running()
        code = read_digit()
        if not args.picture:
            return code
        print(f"Not named, for want of weights: {', '.join(args.picture)}.", file=sys.stderr)
        return 2
    if args.picture:
        return classify_with_script(args.picture, args.checkpoint or PUBLISHED)
    print(f"Weights: {classifier.source}. Give it a picture: python infer_vim_tiny.py cat.jpg")
    show_running()
    return 0


def show_running() -> None:
    """Print the shapes and the time of a forward pass of Vim-Tiny."""
    from classify import load_classifier
    from timing import time_repeatedly

    classifier = load_classifier(DEFAULT_MODEL, None)
    picture = classifier.blank_batch(1)
    result = classifier.run(picture)
    timing = time_repeatedly(lambda: classifier.run(picture), 5)
    print(f"Vim-Tiny: a picture {tuple(picture.shape)} gives probabilities {tuple(result.shape)}")
    print(f"Forward pass: {timing.summary()}")


def read_digit() -> int:
    """Let the small model in examples/ name a shipped picture; return the exit code."""
    weights = sorted((ROOT / "examples").rglob("*.safetensors")) + sorted((ROOT / "examples").rglob("*.pth"))
    pictures = [picture for file in weights[:1] for picture in sorted(file.parent.rglob("*.png"))]
    if not pictures:
        return 0
    print(f"\nThe small model that is shipped, {weights[0].relative_to(ROOT)}, names {pictures[0].relative_to(ROOT)}:")
    return classify_with_script([str(pictures[0])], str(weights[0]))


def classify_with_script(pictures: Sequence[str], weights: str) -> int:
    """Call vim/infer_rpi.py; return its exit code."""
    import infer_rpi

    sys.stdout.flush()
    return infer_rpi.run(["--image", *pictures, "--checkpoint", weights])


if __name__ == "__main__":
    sys.exit(run_script(build_parser(), demonstrate, None))
