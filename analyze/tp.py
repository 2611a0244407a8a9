#!/usr/bin/env python3
"""Measure throughput: pictures per second and peak memory, forward, and forward with backward.

python analyze/tp.py --model vmamba_tiny_s1l8 --batch-size 32 --size 224
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "vim"), str(ROOT)]

from analyze.commands import (  # noqa: E402
    CHECKPOINT_HELP,
    MODEL_HELP,
    add_run_flags,
    load_network,
    pictures_under,
    read_size,
    running,
    set_threads,
)
from command_line import note, positive, run_script  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from classify import Classifier
    from timing import Timing

NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Measure pictures per second and peak memory of a network.",
        epilog="The batch is halved until it fits into the memory. Compare figures of one machine that does nothing "
        "else; on a CPU smaller --batch-size, --warmup and --runs say the same sooner.",
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help=MODEL_HELP)
    add("--checkpoint", metavar="WEIGHTS", help=CHECKPOINT_HELP)
    add("--data-path", metavar="DIR",
        help="take the pictures of the batch from this folder, or its val/ (default: random numbers)")  # fmt: skip
    add("--batch-size", type=positive, default=128, metavar="N", help="default: 128")
    add("--warmup", type=positive, default=50, metavar="N", help="passes that are not timed (default: 50)")
    add("--runs", type=positive, default=30, metavar="N", help="passes that are timed (default: 30)")
    add("--forward-only", action="store_true", help="leave out forward with backward")
    add("--amp", action="store_true", help="also time forward with backward in bfloat16 where autocast uses it")
    add_run_flags(parser, size="--size")
    return parser


def measure(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        UsageError, CheckpointError, PictureError: it cannot be done; one sentence says why.
    """
    from analyze.costs import count_cost
    from model_setup import backend_that_runs

    set_threads(args.threads)
    network = load_network(args.model, args.checkpoint, read_size(args.img_size), args.device, weights_matter=False)
    with running(network):
        cost = count_cost(network.model, network.shape[1:])
    batch = _batch(network, args.data_path, args.batch_size)
    print(f"{network.model_name}, {cost.parameters:,} parameters, {cost.total / 1e9:.3f} GFLOPs per picture")
    backend = backend_that_runs("auto", network.device)
    print(f"{' x '.join(str(side) for side in network.shape)} pixels, {network.device}, backend {backend}", flush=True)
    passes: dict[str, Callable[[Tensor], None]] = {"forward": _forward(network.model)}
    if not args.forward_only:
        passes["forward+backward"] = _training_step(network, amp=False)
        if args.amp:
            passes["forward+backward, amp"] = _training_step(network, amp=True)
    for name, step in passes.items():
        network.model.train("backward" in name)
        size, timing, peak = _measured(name, step, batch, args)
        rate = size * len(timing.seconds) / sum(timing.seconds)
        print(f"{name}: batch_size {size} throughput {rate:.2f} images/s, {_memory(peak, network.device)}")
        print(f"{'':{len(name)}}  {timing.summary()}", flush=True)
    return 0


def _batch(network: Classifier, folder: str | None, count: int) -> Tensor:
    """Return `count` pictures (count, channels, h, w): of a folder, each as often as needed, or random numbers."""
    import torch

    from model_setup import blank_batch
    from pictures import open_picture

    if folder is None:
        random_generator = torch.Generator().manual_seed(0)
        batch = blank_batch(count, network.shape, network.device)
        return batch.copy_(torch.randn(batch.shape, generator=random_generator))
    below = Path(folder) / "val"
    found = pictures_under(str(below if below.is_dir() else folder))
    chosen = random.Random(0).sample(found, min(count, len(found)))
    opened = torch.stack([network.transform(open_picture(source)) for source in chosen])
    return opened[torch.arange(count) % len(opened)].to(network.device)


def _forward(model: nn.Module) -> Callable[[Tensor], None]:
    import torch

    @torch.inference_mode()
    def step(batch: Tensor) -> None:
        model(batch)

    return step


def _training_step(network: Classifier, *, amp: bool) -> Callable[[Tensor], None]:
    """Forward, cross-entropy and backward; the weights stay as they are."""
    import torch

    def step(batch: Tensor) -> None:
        labels = torch.arange(len(batch), device=batch.device) % len(network.names)
        context: Any = torch.autocast(batch.device.type, dtype=torch.bfloat16) if amp else nullcontext()
        with context:
            loss = torch.nn.functional.cross_entropy(network.model(batch), labels)
        loss.backward()
        network.model.zero_grad(set_to_none=True)

    return step


def _measured(
    name: str, step: Callable[[Tensor], None], batch: Tensor, args: argparse.Namespace
) -> tuple[int, Timing, int | None]:
    """Time a step on the largest batch that fits: `batch`, or a half, a quarter ... of it.

    Returns:
        the size of that batch, the times, and the peak memory in bytes where the system tells.
    Raises:
        UsageError: not even one picture fits.
    """
    from model_setup import refuse_failures
    from timing import time_repeatedly

    while True:
        try:
            _forget_peak(batch.device)
            timing = _with_progress(name, step, batch, args, time_repeatedly)
            return len(batch), timing, _peak(batch.device)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error) or len(batch) == 1:
                with refuse_failures(batch):
                    raise RuntimeError(str(error) or "out of memory") from error
        half = len(batch) // 2
        note(f"note: {name} of {len(batch)} pictures does not fit into the memory; trying {half}")
        batch = batch[:half]


def _with_progress(
    name: str, step: Callable[[Tensor], None], batch: Tensor, args: argparse.Namespace, time_it: Callable[..., Timing]
) -> Timing:
    from progress import Progress

    progress = Progress(name, (args.warmup + args.runs) * len(batch))

    def run() -> None:
        step(batch)
        progress.advance(len(batch))

    timing = time_it(run, args.runs, warm_up=args.warmup)
    progress.close()
    return timing


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY)


def _forget_peak(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int | None:
    from timing import peak_memory

    return peak_memory(device)


def _memory(peak: int | None, device: torch.device) -> str:
    if peak is None:
        return "peak memory unknown on this system"
    return f"peak memory {peak / 2**20:.0f} MiB {'of the GPU' if device.type == 'cuda' else 'of the whole process'}"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), measure, arguments)


if __name__ == "__main__":
    sys.exit(run())
