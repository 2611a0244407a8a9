"""Averages for progress lines, and what several processes need: upstream's names for both."""

from __future__ import annotations

import argparse
import builtins
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint import resize_pos_embed, save_checkpoint
from flags import UsageError
from progress import format_seconds

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_PRINT = builtins.print


class SmoothedValue:
    """A series of numbers: statistics of the last `window_size` of them, and the mean of all.

    `fmt` may name median, avg, max and value (the last), which are of the window, and global_avg.
    """

    def __init__(self, window_size: int = 20, fmt: str | None = None) -> None:
        self.deque: deque[float] = deque(maxlen=window_size)
        self.fmt = fmt or "{median:.4f} ({global_avg:.4f})"
        self.total = 0.0
        self.count = 0

    def update(self, value: float, n: int = 1) -> None:
        """Append `value`, which counts `n` times in the mean of all."""
        self.deque.append(value)
        self.count += n
        self.total += value * n

    def synchronize_between_processes(self) -> None:
        """Make the mean of all that of every process together; the window stays this process's own."""
        if not is_dist_avail_and_initialized():
            return
        where = "cuda" if dist.get_backend() == "nccl" else "cpu"
        sums = torch.tensor([self.count, self.total], dtype=torch.float64, device=where)
        dist.all_reduce(sums)
        count, self.total = sums.tolist()
        self.count = int(count)

    @property
    def median(self) -> float:
        """The (lower) median of the window."""
        return torch.tensor(list(self.deque), dtype=torch.float64).median().item()

    @property
    def avg(self) -> float:
        """The mean of the window."""
        return sum(self.deque) / len(self.deque)

    @property
    def global_avg(self) -> float:
        """The mean of all values."""
        return self.total / self.count

    @property
    def max(self) -> float:
        """The largest value of the window."""
        return max(self.deque)

    @property
    def value(self) -> float:
        """The last value."""
        return self.deque[-1]

    def __str__(self) -> str:
        if not self.deque:  # nothing yet, or what a saved epoch left
            return f"{self.global_avg:.4f}" if self.count else "-"
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value
        )


class MetricLogger:
    """Named `SmoothedValue`s (also as attributes), printed every few steps of a loop."""

    def __init__(self, delimiter: str = "\t") -> None:
        self.meters: dict[str, SmoothedValue] = {}
        self.delimiter = delimiter

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Use `meter` for `name`, to give it another window or format than usual."""
        self.meters[name] = meter

    def update(self, **values: float | Tensor) -> None:
        """Append one value to each named meter, made at its first value."""
        for name, value in values.items():
            number = value.item() if isinstance(value, Tensor) else float(value)
            self.meters.setdefault(name, SmoothedValue()).update(number)

    def __getattr__(self, name: str) -> SmoothedValue:
        meters = self.__dict__.get("meters", {})
        if name not in meters:
            raise AttributeError(f"there is no meter {name!r}; known are {sorted(meters)}")
        return meters[name]

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Make every mean of all values that of all processes together."""
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable: Iterable[Any], print_freq: int, header: str = "", first: int = 0) -> Iterator[Any]:
        """Yield the items, and now and then print the meters, the time left and the memory in use.

        It prints after the first item, every `print_freq`-th from there and the last. "time" is seconds per
        item, "data" the part of them spent waiting for it, "rate" pictures per second of all processes, for items
        that begin with a batch of them. `first` items were done before.
        """
        steps = first + len(iterable) if isinstance(iterable, Sized) else None
        start = step_start = time.monotonic()
        whole, waiting, pictures = (SmoothedValue(fmt="{avg:.4f}") for _ in range(3))
        done = first
        for item in iterable:
            waiting.update(time.monotonic() - step_start)
            pictures.update(len(item[0]) if isinstance(item, list | tuple) and isinstance(item[0], Tensor) else 0)
            yield item
            done += 1
            now = time.monotonic()
            whole.update(now - step_start)
            step_start = now
            if (done - first - 1) % print_freq == 0 or done == steps:
                print(self._progress_line(header, done, steps, whole, waiting, pictures))
        if done > first:
            spent = time.monotonic() - start
            print(f"{header} Total time: {format_seconds(spent)} ({spent / (done - first):.4f} s / it)")

    def _progress_line(
        self,
        header: str,
        done: int,
        steps: int | None,
        whole: SmoothedValue,
        waiting: SmoothedValue,
        pictures: SmoothedValue,
    ) -> str:
        parts = [f"{header} [{done}]" if steps is None else f"{header} [{done}/{steps}]"]
        if steps is not None:
            parts.append(f"eta: {format_seconds(whole.global_avg * (steps - done))}")
        parts += [str(self)] if self.meters else []
        parts += [f"time: {whole}", f"data: {waiting}"]
        if pictures.avg and whole.avg:
            parts.append(f"rate: {pictures.avg * get_world_size() / whole.avg:.1f} img/s")
        if torch.cuda.is_available():
            parts.append(f"max mem: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")
        elif resource is not None:
            unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
            parts.append(f"max mem: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.0f} MiB")
        return self.delimiter.join(parts)


def is_dist_avail_and_initialized() -> bool:
    """Whether this process is one of a group of processes."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    """Number of this process, 0 without a group."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that prints and saves."""
    return get_rank() == 0


def save_on_master(contents: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint (see `checkpoint.save_checkpoint`) in the main process; nothing in the others."""
    if is_main_process():
        save_checkpoint(path, contents)


def _load_checkpoint_for_ema(model_ema: Any, state: dict[str, Tensor]) -> None:
    """Load weights into the average that timm's ModelEma (`ema`), ModelEmaV2 or V3 (`module`) keeps."""
    network = model_ema.ema if hasattr(model_ema, "ema") else model_ema.module
    network.load_state_dict(state)


def setup_for_distributed(is_master: bool) -> None:
    """Silence `print` in all processes but the main one; print(..., force=True) speaks in each."""

    def print_if_master(*values: Any, force: bool = False, **options: Any) -> None:
        if is_master or force:
            _PRINT(*values, **options)

    builtins.print = print_if_master


def init_distributed_mode(args: argparse.Namespace) -> None:
    """Join the group of processes that the environment describes, if any.

    torchrun: RANK, WORLD_SIZE, LOCAL_RANK. SLURM: SLURM_PROCID, if there is more than one task by
    --world_size or SLURM_STEP_NUM_TASKS: a login shell that merely has the variable is left alone.
    Sets args.distributed, rank, world_size, gpu (number on this machine, None without a group). NCCL for
    CUDA devices, gloo for all others.

    Raises:
        UsageError: the variables are no numbers, or the processes cannot meet.
    """
    args.distributed, args.rank, args.gpu = False, 0, None
    place = _place_in_group(args.world_size)
    if place is None:
        args.world_size = 1
        return
    args.rank, args.world_size, args.gpu = place
    uses_cuda = torch.device(args.device).type == "cuda" and torch.cuda.is_available()
    if uses_cuda:
        args.gpu %= torch.cuda.device_count()
        torch.cuda.set_device(args.gpu)
    args.dist_backend = "nccl" if uses_cuda and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(
            args.dist_backend, init_method=args.dist_url, world_size=args.world_size, rank=args.rank
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"Process {args.rank} of {args.world_size} cannot join the others at {args.dist_url}: {error}"
        ) from error
    args.distributed = True
    dist.barrier()
    setup_for_distributed(args.rank == 0)


def _place_in_group(world_size: int) -> tuple[int, int, int] | None:
    """Return (rank, number of processes, number on this machine) by the environment, None without a group."""
    environment = os.environ
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            return rank, size, int(environment.get("LOCAL_RANK", "0"))
        if "SLURM_PROCID" in environment:
            rank = int(environment["SLURM_PROCID"])
            size = world_size if world_size > 1 else int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
            return (rank, size, int(environment.get("SLURM_LOCALID", rank))) if size > 1 else None
    except ValueError as error:
        raise UsageError(
            f"RANK, WORLD_SIZE, LOCAL_RANK and SLURM's variables must be whole numbers: {error}."
        ) from error
    return None


def leave_distributed_mode() -> None:
    """Take this process out of its group, if it is in one, and give it its voice back."""
    if is_dist_avail_and_initialized():
        dist.destroy_process_group()
    builtins.print = _PRINT


def interpolate_pos_embed(model: Any, state_dict: dict[str, Tensor]) -> None:
    """Resize `pos_embed` in `state_dict`, in place, to the patch grid of `model`, if it has another size.

    The class token's row stays where `model` has it (before the patches, for a model that does not say);
    weights without `pos_embed` are left as they are.

    Raises:
        ValueError: the patches of the position embedding are no square grid.
    """
    if "pos_embed" in state_dict:
        placement = getattr(model, "class_token_placement", "first")
        state_dict["pos_embed"] = resize_pos_embed(
            state_dict["pos_embed"], model.patch_embed.grid_size, placement=placement
        )


def usable_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def useful_workers(asked: int) -> int:
    """Return `asked`, but no more than there are CPUs, and say so."""
    usable = usable_cpus()
    if asked > usable:
        print(f"note: {usable} CPUs, so {usable} of the {asked} processes of --num_workers read pictures")
    return min(asked, usable)
