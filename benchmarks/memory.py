"""The peak memory of one case, in a fresh process that does nothing else.

`python -m benchmarks.memory '{"case": {...}, "threads": 2}'` is that process; it prints what it measured as JSON.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.cases import Case

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """The memory of a process, in bytes.

    Attributes:
        imports: the most it had in use when torch, timm and the packages were imported.
        loaded: the most it had in use when the subject and its input were there.
        peak: the most after the subject was called twice. What the user of a script sees.
        scratch: what a third call takes beyond its result, per thread; None where the system does not tell.
        allocated: the most that PyTorch's allocator gave out for a call and had not yet got back: activations,
            gradients, results. Unlike what is resident it depends neither on how the heap is cut up nor on earlier
            calls. None in files written before it was measured.
    """

    imports: int
    loaded: int
    peak: int
    scratch: int | None = None
    allocated: int | None = None

    @property
    def increase(self) -> int:
        """What the calls need over the loaded subject."""
        return self.peak - self.loaded


def measure_memory(case: Case, threads: int) -> Memory | None:
    """Measure in a fresh process with this one's import path; None where the system does not tell.

    Raises:
        RuntimeError: the process failed; carries its last line.
    """
    order = json.dumps({"case": dataclasses.asdict(case), "threads": threads})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    command = [sys.executable, "-m", "benchmarks.memory", order]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"the process that measures the memory of {case} failed: {reason}")
    found = json.loads(done.stdout)
    return None if found["peak"] is None else Memory(**found)


def _most_so_far() -> int | None:
    """The most bytes that this process had resident; None if unknown.

    Linux counts `ru_maxrss` on across the start of a program, so that a child begins at its parent's peak: the
    program's own high-water mark is in /proc.
    """
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes


def _scratch(call: Callable[[], Tensor]) -> int | None:
    """What a call that is not the first takes beyond its result, at its peak; None where the system does not tell.

    What earlier calls freed goes back to the system first, else it would serve this one unseen; code and threads that
    earlier calls brought in are not counted.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")  # the high-water mark falls to what is in use now
    except (OSError, TypeError, AttributeError):  # not Linux, or not glibc
        return None
    before = _most_so_far()
    result = call()
    peak = _most_so_far()
    return None if before is None or peak is None else max(0, peak - before - result.nbytes)


def _allocated(call: Callable[[], Tensor]) -> int:
    """The most bytes that a call holds of PyTorch's CPU allocator at one time, of those it asks for itself."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = profiler.profiler.kineto_results
    changes = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


def _measure_here(case: Case, threads: int) -> dict[str, int | None]:
    import torch

    from benchmarks.paths import surroundings
    from benchmarks.subjects import build

    torch.set_num_threads(threads)
    found = {"imports": _most_so_far()}
    work = build(case)
    found["loaded"] = _most_so_far()
    with surroundings(case):
        work.call()
        work.call()
        found["peak"] = _most_so_far()
        scratch = _scratch(work.call)
        found["allocated"] = _allocated(work.call)
    found["scratch"] = None if scratch is None else scratch // threads
    return found


if __name__ == "__main__":
    received = json.loads(sys.argv[1])
    print(json.dumps(_measure_here(Case(**received["case"]), received["threads"])))
