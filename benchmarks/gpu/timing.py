"""Times and memory of calls on a device, CUDA's or, for tests, the CPU.

A call that takes microseconds is recorded in a CUDA graph, over as many sets of inputs as its caches do not hold, and
the replay is timed: that leaves Python's time for a launch, which overlaps in real work, out.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.runner import Spread

Call = Callable[[], Any]
WARM_UP = 3


class Device:
    """Where things are measured.

    Args:
        device: "cuda" or "cpu".
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_gpu = self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, call: Call) -> float:
        """One call, by events of the device."""
        if not self.is_gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        call()
        end_event.record()
        end_event.synchronize()
        return float(start_event.elapsed_time(end_event)) / 1000

    def peak(self, call: Call) -> int | None:
        """The most memory, in bytes, that a call holds beyond what was held before; None on a CPU."""
        if not self.is_gpu:
            call()
            return None
        call()
        self.free()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def cache_bytes(self) -> int:
        """The size of the cache that all of the device shares; where torch does not say, that of a large card."""
        if not self.is_gpu:
            return 0
        return int(getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 64 << 20))

    def recorded(self, call: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> tuple[Call, bool]:
        """What calls once per set of inputs, and whether that is a graph; a GPU that cannot record it calls it.

        Each call of a graph writes its results to memory of its own, as far as no cache reaches.
        """

        def run() -> list[Any]:
            return [call(*each) for each in sets]

        if not self.is_gpu:
            return run, False
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                kept = run()
        except RuntimeError:
            return run, False

        def replay(kept: Any = kept) -> None:  # the results live as long as the graph
            graph.replay()

        return replay, True


def interleave(
    device: Device, calls: Mapping[str, Call], rounds: int, per_call: Mapping[str, int] | None = None
) -> dict[str, tuple[float, ...]]:
    """The seconds of each call, one after the other again and again; divided by how many it is made of."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    device.wait()
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(device.seconds(call) / (per_call or {}).get(name, 1))
    return {name: tuple(values) for name, values in seconds.items()}


def ratio(mine: Sequence[float], its: Sequence[float]) -> Spread:
    """Time over time, round by round."""
    return Spread.of([one / other for one, other in zip(mine, its, strict=True)])


def as_json(seconds: Sequence[float]) -> dict[str, Any]:
    return {"seconds": list(seconds), **asdict(Spread.of(seconds))}


def milliseconds(spread: Spread) -> str:
    """The median and the middle half."""
    digits = 1 if spread.median >= 0.1 else 3 if spread.median >= 0.001 else 4
    median, low, high = (f"{1000 * value:,.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median} ms ({low} to {high})"


def times(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f} MB"
