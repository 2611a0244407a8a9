"""Run comparisons: one call of each case in turn, again and again, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases import Case, Claim, Comparison, Quantity
from benchmarks.memory import Memory, measure_memory
from benchmarks.paths import Path, surroundings
from benchmarks.subjects import SUBJECTS, build, result_key
from benchmarks.work import DTYPES, Work

# Largest difference of two results that must be one, over the largest value: what separates an error from rounding.
AGREEMENT = {"fp64": 1e-4, "fp32": 1e-4, "bf16": 5e-2}


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
    """What was measured of a case.

    Attributes:
        seconds: of its calls, in the order of the rounds.
        memory: of a process of its own, if that was measured.
        error: how far its result is from that of the widest dtype among the cases that compute the same, over the
            largest value there; None if it has nothing to be compared with.
    """

    case: Case
    seconds: tuple[float, ...]
    memory: Memory | None = None
    error: float | None = None

    @property
    def time(self) -> Spread:
        """Seconds per call."""
        return Spread.of(self.seconds)

    def ratio(self, other: Result) -> Spread:
        """Time over that of `other`, round by round: what slows a whole round down does not count."""
        return Spread.of([mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)])

    def values(self, quantity: Quantity) -> tuple[float, ...] | None:
        """What a claim bounds, once per round or just once; None if it was not measured."""
        if quantity == "seconds":
            return self.seconds
        if quantity == "seconds_per_element":
            elements = SUBJECTS[self.case.subject].elements(self.case)
            return tuple(seconds / elements for seconds in self.seconds)
        size = None if self.memory is None else getattr(self.memory, quantity.removesuffix("_bytes"))
        return None if size is None else (float(size),)


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
        """The value that a claim bounds; None if it was not measured."""
        of = self.result(claim.of).values(claim.quantity)
        over = (1.0,) * len(of or ()) if claim.over is None else self.result(claim.over).values(claim.quantity)
        if of is None or over is None:
            return None
        return Spread.of([mine / its for mine, its in zip(of, over, strict=True)])


SHORT = 0.1  # seconds: shorter calls depend on what the caches hold when they start


class Entry(NamedTuple):
    """A call and the context that it runs in; the context is entered outside the timing."""

    path: Path
    call: Callable[[], object]


def interleave(
    entries: Sequence[Entry], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[tuple[float, ...]]:
    """Time one call of each entry in turn, `rounds` times; the seconds of each entry, in order.

    Before a short call comes another one that is not timed: it brings back to the caches what the others drove out, as
    in a program that calls one thing again and again.
    """
    seconds: list[list[float]] = [[] for _ in entries]
    for _ in range(rounds):
        for entry, times in zip(entries, seconds, strict=True):
            with entry.path():
                if not times or times[-1] < SHORT:
                    entry.call()
                start = clock()
                entry.call()
                times.append(clock() - start)
    return [tuple(times) for times in seconds]


def check_agreement(results: Iterable[tuple[Case, list[Tensor]]]) -> dict[Case, float]:
    """Refuse to time what computes something else: cases of one subject and input must agree.

    Returns:
        {case: the largest difference from the case of the widest dtype, over the largest value}, of those that have
        one to be compared with. The results are an output and its gradients, each judged for itself.
    Raises:
        RuntimeError: two cases disagree; names them.
    """
    widest_first = sorted(results, key=lambda pair: -DTYPES[pair[0].dtype].itemsize)  # stable: else in their order
    first: dict[tuple[object, ...], tuple[Case, list[Tensor]]] = {}
    errors: dict[Case, float] = {}
    for case, result in widest_first:
        known, expected = first.setdefault(result_key(case), (case, result))
        if known == case:
            continue
        for index, (mine, its) in enumerate(zip(result, expected, strict=True)):
            error, scale = (mine.double() - its).abs().max().item(), its.abs().max().item()
            if not error <= AGREEMENT[case.dtype] * scale:  # NaN fails too
                what = f"gradient {index}" if index else "output"
                raise RuntimeError(
                    f"{case} and {known} must compute the same and their {what} differs by {error:.1e} where the "
                    f"largest value is {scale:.1e}: nothing was timed"
                )
            errors[case] = max(errors.get(case, 0.0), error / scale if scale else 0.0)
    return errors


def run_comparison(name: str, comparison: Comparison, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Measure the memory of each case if asked, warm all of them up, compare their results, time them interleaved.

    `say` is told what is being done. torch's number of threads is put back at the end.

    Raises:
        RuntimeError: cases that must compute the same do not, one cannot run or compile here, or memory ran out.
    """
    memory: dict[Case, Memory | None] = dict.fromkeys(comparison.cases)
    if comparison.memory:
        for case in comparison.cases:
            say(f"{name}: memory of {case}")
            memory[case] = measure_memory(case, comparison.threads)
    before = torch.get_num_threads()
    torch.set_num_threads(comparison.threads)
    try:
        say(f"{name}: warm-up")
        works = [(case, build(case)) for case in comparison.cases]
        errors = check_agreement([(case, _warm_up(case, work)) for case, work in works])
        say(f"{name}: {comparison.rounds} rounds, threads: {comparison.threads}")
        entries = [Entry(partial(surroundings, case), work.call) for case, work in works]
        seconds = interleave(entries, comparison.rounds)
    finally:
        torch.set_num_threads(before)
    results = tuple(
        Result(case, times, memory[case], errors.get(case))
        for case, times in zip(comparison.cases, seconds, strict=True)
    )
    return Outcome(name, comparison, results)


def _warm_up(case: Case, work: Work) -> list[Tensor]:
    """Call twice; what the second call computed, not shared with the calls to come."""
    with surroundings(case):
        work.call()
        return [value.clone() for value in work.result()]
