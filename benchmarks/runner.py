"""Run comparisons: one call of each case in turn, again and again, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Claim, Comparison
from benchmarks.memory import Memory, measure_memory
from benchmarks.paths import PATHS, Path
from benchmarks.subjects import build, result_key

# Largest difference of two results that must be one, over the largest value: what separates an error from rounding.
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Spread:
    """The median of some values and the bounds of their middle half (first and third quartile)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise one or more values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Result:
    """What was measured of a case: the seconds of its calls, in the order of the rounds, and its memory."""

    case: Case
    seconds: tuple[float, ...]
    memory: Memory | None = None

    @property
    def time(self) -> Spread:
        """Seconds per call."""
        return Spread.of(self.seconds)

    def ratio(self, other: Result) -> Spread:
        """Time over that of `other`, round by round: what slows a whole round down does not count."""
        return Spread.of([mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)])


@dataclass(frozen=True)
class Outcome:
    """A comparison as it was run (threads and rounds included) and its results, one per case."""

    name: str
    comparison: Comparison
    results: tuple[Result, ...]

    def result(self, case: Case) -> Result:
        """What was measured of one of the cases."""
        return next(result for result in self.results if result.case == case)

    def over_base(self, result: Result) -> Spread:
        """The ratio of a result's time to that of the base."""
        return result.ratio(self.result(self.comparison.base))

    def measured(self, claim: Claim) -> Spread | None:
        """The value that a claim bounds; None if the memory was not measured."""
        of = self.result(claim.of)
        over = None if claim.over is None else self.result(claim.over)
        if claim.quantity == "seconds":
            return of.time if over is None else of.ratio(over)
        if of.memory is None or (over is not None and over.memory is None):
            return None
        divisor = 1 if over is None or over.memory is None else over.memory.peak
        return Spread.of([of.memory.peak / divisor])


class Entry(NamedTuple):
    """A call and the context that it runs in; the context is entered outside the timing."""

    path: Path
    call: Callable[[], object]


def interleave(
    entries: Sequence[Entry], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[float, ...]]:
    """Time one call of each entry in turn, `rounds` times; the seconds of each entry, in order."""
    seconds: list[list[float]] = [[] for _ in entries]
    for _ in range(rounds):
        for entry, times in zip(entries, seconds, strict=True):
            with entry.path():
                start = clock()
                entry.call()
                times.append(clock() - start)
    return [tuple(times) for times in seconds]


def check_agreement(results: Iterable[tuple[Case, Tensor]]) -> None:
    """Refuse to time what computes something else: cases of one subject and input must agree.

    Raises:
        RuntimeError: two cases disagree; names them.
    """
    first: dict[tuple[str, int, int], tuple[Case, Tensor]] = {}
    for case, result in results:
        known, expected = first.setdefault(result_key(case), (case, result))
        error, scale = (result - expected).abs().max().item(), expected.abs().max().item()
        if not error <= AGREEMENT * scale:  # NaN fails too
            raise RuntimeError(
                f"{case} and {known} must compute the same and differ by {error:.1e} where the largest value is "
                f"{scale:.1e}: nothing was timed"
            )


def run_comparison(name: str, comparison: Comparison, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Measure the memory of each case if asked, warm all of them up, compare their results, time them interleaved.

    `say` is told what is being done. torch's number of threads is put back at the end.

    Raises:
        RuntimeError: cases that must compute the same do not, a path cannot run here, or memory ran out.
    """
    memory: dict[Case, Memory | None] = dict.fromkeys(comparison.cases)
    if comparison.memory:
        for case in comparison.cases:
            say(f"{name}: memory of {case}")
            memory[case] = measure_memory(case, comparison.threads)
    before = torch.get_num_threads()
    torch.set_num_threads(comparison.threads)
    try:
        with torch.inference_mode():
            say(f"{name}: warm-up")
            entries = [Entry(PATHS[case.path], build(case)) for case in comparison.cases]
            check_agreement(zip(comparison.cases, map(_warm_up, entries), strict=True))
            say(f"{name}: {comparison.rounds} rounds, threads: {comparison.threads}")
            seconds = interleave(entries, comparison.rounds)
    finally:
        torch.set_num_threads(before)
    results = tuple(Result(case, times, memory[case]) for case, times in zip(comparison.cases, seconds, strict=True))
    return Outcome(name, comparison, results)


def _warm_up(entry: Entry) -> Tensor:
    with entry.path():
        entry.call()
        result = entry.call()
    assert isinstance(result, Tensor)
    return result
