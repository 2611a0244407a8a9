"""Which process sees which pictures, in which order, and under which random numbers."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Sized
from itertools import chain, islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from datasets import Replaced, Unreadable
from utils import get_rank, get_world_size

ROUND = 256  # pictures: repeated augmentation counts an epoch in whole multiples of it, as upstream does
REPLACEMENTS = 8  # pictures that are tried in place of one that cannot be read


def _check_rank(rank: int, num_replicas: int) -> None:
    if not 0 <= rank < num_replicas:
        raise ValueError(f"`rank` must lie in 0 .. num_replicas - 1 = {num_replicas - 1}, got {rank}")


def _mix(purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed in which every bit of every number counts; one family of seeds per `purpose`."""
    text = " ".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class ShardSampler(Sampler[int]):
    """Every `num_replicas`-th index from `rank` on: over all ranks, each index exactly once, in order.

    Unlike torch's DistributedSampler it never repeats an index to give all ranks the same number, so figures
    summed over the ranks are those of the data set.

    Raises:
        ValueError: `rank` is not in 0 .. num_replicas - 1.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        _check_rank(rank, num_replicas)
        self._indices = range(rank, len(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


class RASampler(Sampler[int]):
    """Repeated augmentation: each index `num_repeats` times in a row, dealt out to the ranks in turn.

    So different processes see the same picture under different augmentations. An epoch is cut to as many
    indices as the data set has, and there to a multiple of 256 over all ranks; of fewer than 256 pictures to
    floor(pictures / num_replicas), but at least 1, per rank (upstream: none at all).

    Args:
        dataset: its length is what counts.
        num_replicas, rank: by default those of torch.distributed; 1 and 0 where it is not initialized.
        shuffle: in an order that depends on the epoch, else in that of the data set.
        num_repeats: times that a picture is repeated.
    Raises:
        ValueError: `rank` is not in 0 .. num_replicas - 1, `num_repeats` is below 1, or `dataset` is empty.
    Source: arXiv 1901.09335; the count is that of upstream Vim.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        num_repeats: int = 3,
    ) -> None:
        self.num_replicas = get_world_size() if num_replicas is None else num_replicas
        self.rank = get_rank() if rank is None else rank
        _check_rank(self.rank, self.num_replicas)
        if num_repeats < 1:
            raise ValueError(f"`num_repeats` must be at least 1, got {num_repeats}")
        if not len(dataset):
            raise ValueError("`dataset` must hold at least one picture, got none")
        self.shuffle, self.num_repeats, self.epoch = shuffle, num_repeats, 0
        self._pictures = len(dataset)
        counted = self._pictures // ROUND * ROUND or self._pictures
        self._length = max(1, counted // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._pictures))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.epoch)
            order = torch.randperm(self._pictures, generator=generator).tolist()
        places = (self.rank + step * self.num_replicas for step in range(self._length))
        return iter([order[place // self.num_repeats % self._pictures] for place in places])

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch `epoch`."""
        self.epoch = epoch


class ShuffledSampler(Sampler[int]):
    """A permutation by seed and epoch alone, of which each rank takes every `num_replicas`-th index.

    The indices at position i of all ranks are those that a single process sees at the positions
    i * num_replicas and following, so the number of processes does not change what a step is trained on. Every
    rank gets floor(pictures / num_replicas) indices; the others, fewer than `num_replicas`, are left out.

    Raises:
        ValueError: `rank` is not in 0 .. num_replicas - 1.
    """

    def __init__(self, dataset: Sized, num_replicas: int = 1, rank: int = 0, *, seed: int = 0) -> None:
        _check_rank(rank, num_replicas)
        self.num_replicas, self.rank, self.seed, self.epoch = num_replicas, rank, seed, 0
        self._pictures = len(dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(_mix("order", self.seed, self.epoch))
        order = torch.randperm(self._pictures, generator=generator)
        return iter(order[self.rank :: self.num_replicas][: len(self)].tolist())

    def __len__(self) -> int:
        return self._pictures // self.num_replicas

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation of epoch `epoch`."""
        self.epoch = epoch


class Draw(NamedTuple):
    """A picture to fetch, and the seed of its augmentation (63 bits)."""

    index: int  # type: ignore[assignment]  # a name that tuples have for a method
    seed: int


class EpochSampler(Protocol):
    """What `DrawBatches` takes: indices whose order may depend on the epoch."""

    def __iter__(self) -> Iterator[int]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of epoch `epoch`."""


class DrawBatches(Sampler[list[Draw]]):
    """Whole batches of draws, for the `batch_sampler` of a DataLoader over `SeededPictures`.

    The seed of a draw depends on `seed`, the epoch and the draw's place among those of all processes, i *
    num_replicas + rank for the i-th of this one. So neither the number of workers nor that of processes (with a
    `ShuffledSampler`), nor where a run was resumed, changes a picture's augmentation. What is left after the
    last whole batch is dropped.

    Args:
        sampler: the indices of this process; it gets every epoch that is set here.
        batch_size: pictures per batch and process.
        seed: seed of the run, the same in all processes.
        num_replicas, rank: number of processes, and of this one among them.
    Attributes:
        steps_per_epoch: batches of a whole epoch. `len()` is what is left of them from `first_step` on.
    Raises:
        ValueError: `batch_size` is below 1, or `rank` is not in 0 .. num_replicas - 1.
    """

    def __init__(
        self, sampler: EpochSampler, batch_size: int, *, seed: int, num_replicas: int = 1, rank: int = 0
    ) -> None:
        _check_rank(rank, num_replicas)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
        self.sampler, self.batch_size, self.seed = sampler, batch_size, seed
        self.num_replicas, self.rank = num_replicas, rank
        self.steps_per_epoch = len(sampler) // batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch, and the batch to begin with: as many are skipped as were done before.

        Raises:
            ValueError: `first_step` is not in 0 .. steps_per_epoch.
        """
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(
                f"`first_step` must lie in 0 .. steps_per_epoch = {self.steps_per_epoch}, got {first_step}; "
                "a run goes on with the data and the batch size that it began with"
            )
        self.epoch, self.first_step = epoch, first_step
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        places = range(self.first_step * self.batch_size, self.steps_per_epoch * self.batch_size)
        indices = islice(self.sampler, places.start, places.stop)
        for start in places[:: self.batch_size]:
            batch = islice(indices, self.batch_size)
            yield [Draw(index, self._seed_at(epoch, place)) for place, index in enumerate(batch, start)]

    def _seed_at(self, epoch: int, place: int) -> int:
        return _mix("draw", self.seed, epoch, place * self.num_replicas + self.rank)

    def __len__(self) -> int:
        return self.steps_per_epoch - self.first_step


class SeededPictures(Dataset[Any]):
    """A data set asked by `Draw`: what it gives for an index depends on the draw's seed alone.

    Python's, numpy's and torch's (CPU) generators are seeded for the call and put back as they were, so that
    in a process that also trains nothing else is disturbed. In place of a picture that cannot be read it gives
    another one, as `datasets.Replaced`, drawn by the same seed; after 8 others `datasets.Unreadable`, the last.

    Args:
        dataset: gives (image, class number), or `datasets.Unreadable`, for an index 0 .. len(dataset) - 1.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        reasons: list[str] = []
        item: Any = None
        for index in chain([draw.index], _others(draw, len(self.dataset))):
            with _generators_seeded(draw.seed):
                item = self.dataset[index]
            if not isinstance(item, Unreadable):
                return Replaced(item, tuple(reasons)) if reasons else item
            reasons.append(item.reason)
        return item


def _others(draw: Draw, pictures: int) -> Iterator[int]:
    """Yield up to 8 different indices other than the draw's, chosen by its seed."""
    others = pictures - 1
    chosen = random.Random(_mix("replacement", draw.seed)).sample(range(others), min(REPLACEMENTS, others))
    yield from (index + (index >= draw.index) for index in chosen)


@contextlib.contextmanager
def _generators_seeded(seed: int) -> Iterator[None]:
    """Seed the generators that augmentations draw from, and put their states back in the end.

    Not torch.manual_seed, which would also seed those of the GPUs.
    """
    python, arrays, tensors = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)
        torch.default_generator.set_state(tensors)
