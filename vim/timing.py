"""Time something that runs more than once."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of equal runs, in seconds, shortest first."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The time that half of the runs stayed under."""
        return statistics.median(self.seconds)

    @property
    def middle_half(self) -> tuple[float, float]:
        """The spread: the times between which the middle half of the runs lies (first and third quartile)."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third

    def summary(self) -> str:
        """Return the times in milliseconds, as a person reads them."""
        low, high = (f"{1000 * value:.1f}" for value in self.middle_half)
        return (
            f"median {1000 * self.median:.1f} ms, middle half {low} to {high} ms, "
            f"least {1000 * self.seconds[0]:.1f} ms, {len(self.seconds)} runs"
        )

    def as_json(self) -> dict[str, float | int]:
        """Return the times in milliseconds under names."""
        low, high = self.middle_half
        values = {
            "median_ms": self.median,
            "first_quartile_ms": low,
            "third_quartile_ms": high,
            "least_ms": self.seconds[0],
            "most_ms": self.seconds[-1],
        }
        return {**{name: round(1000 * value, 4) for name, value in values.items()}, "runs": len(self.seconds)}


def time_repeatedly(run: Callable[[], object], repeat: int, *, warm_up: int = 2) -> Timing:
    """Call `run` `warm_up` times unmeasured, then `repeat` times measured, waiting for a GPU each time."""
    for _ in range(warm_up):
        run()
    times = []
    for _ in range(repeat):
        _finish()
        start = time.perf_counter()
        run()
        _finish()
        times.append(time.perf_counter() - start)
    return Timing(tuple(sorted(times)))


def _finish() -> None:
    torch = sys.modules.get("torch")  # where it is not even imported, no GPU is at work
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes in use: of the GPU's memory, else of this process; None if unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such count
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
