"""Everything that a training run needs to go on as if it had never stopped."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from checkpoint_sources import CheckpointError
from utils import get_rank, get_world_size, is_dist_avail_and_initialized


@dataclass
class Position:
    """How far a run is.

    Attributes:
        epoch: the epoch that is running or comes next, counted from 0.
        step: its steps that are done; all of them: it is trained but not evaluated.
        steps_per_epoch: as many as an epoch has.
        best_accuracy: Acc@1 of the best evaluation so far, per cent.
        sums: (count, total) of the meters of the running epoch, of this process.
    """

    epoch: int = 0
    step: int = 0
    steps_per_epoch: int = 0
    best_accuracy: float = 0.0
    sums: dict[str, tuple[int, float]] = field(default_factory=dict)


def random_states() -> dict[str, Any]:
    """Return the states of all random number generators of this process, as plain data."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators of this process back to saved states."""
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def gather_run_state(position: Position) -> dict[str, Any]:
    """Return the entries of a checkpoint that say where the run is; called by all processes at once."""
    own = {"random_states": random_states(), "sums": position.sums}
    of_all: list[Any] = [own]
    if is_dist_avail_and_initialized():
        of_all = [None] * get_world_size()
        dist.all_gather_object(of_all, own)
    # In the middle of an epoch, "epoch" is the last finished one, as readers of upstream's checkpoints expect.
    return {
        "epoch": position.epoch - 1,
        "step": position.step,
        "steps_per_epoch": position.steps_per_epoch,
        "max_accuracy": position.best_accuracy,
        "processes": of_all,
    }


def restore_run_state(entries: dict[str, Any], epoch: int | None, steps_per_epoch: int) -> Position:
    """Return the position that a checkpoint's `entries` describe, and set the random numbers to what they were.

    Args:
        entries: of `Checkpoint.extra`; those of upstream's checkpoints, which say the epoch alone, will do.
        epoch: the last finished epoch.
        steps_per_epoch: of this run.
    Raises:
        CheckpointError: it was saved within an epoch of another length.
    """
    position = Position(0 if epoch is None else epoch + 1, steps_per_epoch=steps_per_epoch)
    position.best_accuracy = float(entries.get("max_accuracy", 0.0))
    step, length = entries.get("step", 0), entries.get("steps_per_epoch", steps_per_epoch)
    if step and length != steps_per_epoch:
        raise CheckpointError(
            f"the checkpoint was saved after {step} of the {length} steps of an epoch, and this run's have "
            f"{steps_per_epoch}: resume with the same pictures, --batch-size and number of processes"
        )
    position.step = step
    processes = entries.get("processes")
    if isinstance(processes, list) and len(processes) == get_world_size():
        own = processes[get_rank()]
        set_random_states(own["random_states"])
        position.sums = {name: (int(count), float(total)) for name, (count, total) in own["sums"].items()}
    elif step:
        raise CheckpointError(
            f"the checkpoint was saved within an epoch by {len(processes or [])} processes, and these are "
            f"{get_world_size()}: resume with as many"
        )
    return position
