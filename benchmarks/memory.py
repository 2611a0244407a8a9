"""The peak memory of one case, in a fresh process that does nothing else.

`python -m benchmarks.memory '{"case": {...}, "threads": 2}'` is that process; it prints what it measured as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parent.parent
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """The most memory that the process had in use so far, in bytes, at three points.

    Attributes:
        imports: torch, timm and the packages are imported.
        loaded: the subject and its input are there.
        peak: the subject was called twice. What the user of a script sees.
    """

    imports: int
    loaded: int
    peak: int


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
    return None if None in found.values() else Memory(**found)


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


def _measure_here(case: Case, threads: int) -> dict[str, int | None]:
    import torch

    from benchmarks.paths import PATHS
    from benchmarks.subjects import build

    torch.set_num_threads(threads)
    found = {"imports": _most_so_far()}
    call = build(case)
    found["loaded"] = _most_so_far()
    with torch.inference_mode(), PATHS[case.path]():
        call()
        call()
    found["peak"] = _most_so_far()
    return found


if __name__ == "__main__":
    received = json.loads(sys.argv[1])
    print(json.dumps(_measure_here(Case(**received["case"]), received["threads"])))
