#!/usr/bin/env python3
"""Write what a training run learnt as weights alone: python save_weights.py CHECKPOINT.pth OUT.safetensors

The weights are those that the run chose its best epoch by: the moving average with --mend ema-best, else the network's
own. The file has what `infer_rpi.py` and `main.py --eval` need: weights, class names,
model name and picture size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "vim"))

from checkpoint import CheckpointError, read_checkpoint, save_checkpoint


def save_weights(source: Path, target: Path) -> str:
    """Write what the run of a checkpoint went by as `target`, a .safetensors file; return what that is.

    Raises:
        CheckpointError: `source` cannot be read or `target` not be written; one sentence says why.
    """
    checkpoint = read_checkpoint(str(source))
    averaged = checkpoint.ema is not None and "ema-best" in (getattr(checkpoint.args, "mend", None) or ())
    contents = {
        "model": checkpoint.ema if averaged else checkpoint.model,
        "model_name": checkpoint.model_name,
        "img_size": checkpoint.img_size,
        "class_names": checkpoint.class_names,
    }
    save_checkpoint(target, contents)
    return "the moving average of the weights" if averaged else "the weights of the network"


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code: 2, after one sentence, if it cannot be done."""
    parser = argparse.ArgumentParser(description="Write what a training run learnt as weights alone.")
    parser.add_argument("checkpoint", type=Path, help="of a training run: best_checkpoint.pth in its --output_dir")
    parser.add_argument("weights", type=Path, help="what to write: a .safetensors file")
    args = parser.parse_args(arguments)
    if args.weights.suffix != ".safetensors":
        parser.error(f"the file to write must end in .safetensors, got {args.weights}")
    try:
        what = save_weights(args.checkpoint, args.weights)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.weights}: {what}, {args.weights.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(run())
