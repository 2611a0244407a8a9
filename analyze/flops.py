#!/usr/bin/env python3
"""Print what networks cost: parameters, and the FLOPs of one picture by the rule of the published tables.

python analyze/flops.py --model vmamba_tiny_s1l8 vim_small_patch16_224
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "vim"), str(ROOT)]

from analyze.commands import (  # noqa: E402
    CHECKPOINT_HELP,
    MODEL_HELP,
    add_run_flags,
    load_network,
    pair_up,
    read_size,
    running,
    set_threads,
)
from command_line import run_script  # noqa: E402

if TYPE_CHECKING:
    from analyze.costs import Cost


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Print parameters and FLOPs of networks.",
        epilog="Counted are multiply-adds of convolutions, linears and products of matrices, norms and pooling as "
        "fvcore counts them, and the selective scans; vim/test_flops.py counts literal operations and measures time.",
    )
    add = parser.add_argument
    add("--model", nargs="+", metavar="NAME", help=f"{MODEL_HELP}; several are fine")
    add("--checkpoint", nargs="+", metavar="WEIGHTS",
        help=f"{CHECKPOINT_HELP}; says the size of pictures and the classes")  # fmt: skip
    add("--json", action="store_true", help="print one JSON list")
    add_run_flags(parser)
    return parser


def count_all(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        UsageError, CheckpointError: it cannot be done; one sentence says why.
    """
    from analyze.costs import count_cost

    set_threads(args.threads)
    found = []
    for name, checkpoint in pair_up(args.model, args.checkpoint):
        network = load_network(name, checkpoint, read_size(args.img_size), args.device, weights_matter=False)
        _, height, width = network.shape
        with running(network):
            cost = count_cost(network.model, (height, width))
        found.append(describe(network.model_name, network.shape, cost))
        if not args.json:
            print_cost(network.model_name, network.shape, cost)
    if args.json:
        print(json.dumps(found, indent=2))
    return 0


def describe(name: str, shape: Sequence[int], cost: Cost) -> dict[str, Any]:
    """Return a cost under names."""
    return {
        "model": name,
        "input": list(shape),
        "parameters": cost.parameters,
        "flops": cost.total,
        "parts": cost.parts(),
        "flops_as_published": cost.published,
        "differences": cost.differences,
    }


def print_cost(name: str, shape: Sequence[int], cost: Cost) -> None:
    """Print a cost for people."""
    print(f"{name}, {' x '.join(str(side) for side in shape)}")
    print(f"  parameters  {cost.parameters:,}")
    print(f"  FLOPs       {cost.total / 1e9:.9f} G")
    for part, number in cost.parts().items():
        if number:
            print(f"    {number / 1e9:12.6f} G  {part}")
    if cost.differences:
        print(f"  counted as in upstream's tables {cost.published / 1e9:.9f} G: {'; '.join(cost.differences)}")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), count_all, arguments)


if __name__ == "__main__":
    sys.exit(run())
