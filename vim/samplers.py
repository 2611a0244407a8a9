"""Which process sees which pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from torch.utils.data import Sampler


class ShardSampler(Sampler[int]):
    """Every `num_replicas`-th index from `rank` on: over all ranks, each index exactly once, in order.

    Unlike torch's DistributedSampler it never repeats an index to give all ranks the same number, so figures
    summed over the ranks are those of the data set.

    Raises:
        ValueError: `rank` is not in 0 .. num_replicas - 1.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"`rank` must lie in 0 .. num_replicas - 1 = {num_replicas - 1}, got {rank}")
        self._indices = range(rank, len(dataset), num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)
