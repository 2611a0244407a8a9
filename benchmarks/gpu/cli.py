"""The command line of the check.

scripts/gpu_check                   with a GPU: build for it, test, train and measure, and write the report
                                    without: compile for every architecture; run the kernels emulated and interpreted
scripts/gpu_check --arch 9.0        without a GPU: compile for one architecture
scripts/gpu_check --steps ops,step  only these, after the build; the report keeps what it has of the others
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.gpu import report, steps
from benchmarks.gpu.commands import ROOT
from benchmarks.gpu.findings import Findings, join
from benchmarks.gpu.steps import Job, Step

RESULTS = ROOT / "benchmarks" / "results"


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=_step_names, default=steps.NAMES, metavar="NAME,...",
        help=f"only these of {', '.join(steps.NAMES)}")  # fmt: skip
    add("--arch", type=_architecture, metavar="N.N", help="without a GPU: compile for this architecture only")
    add("--without-gpu", action="store_true", help="do what a machine without a GPU does")
    add("--quick", action="store_true", help="fewer rounds, sizes and tests")
    add("--output", type=Path, metavar="FOLDER",
        help="write the report there (default: benchmarks/results with a GPU, nowhere without)")  # fmt: skip
    return parser


def _step_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in steps.NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(steps.NAMES)}")
    return names


def _architecture(text: str) -> str:
    if re.fullmatch(r"\d+\.\d", text) is None:
        raise argparse.ArgumentTypeError(f"must be like 9.0, got {text!r}")
    return text


def describe() -> tuple[dict[str, Any], str | None]:
    """The machine and its card as the report has them, and the card's compute capability; None without a GPU."""
    import torch

    from benchmarks.machine import available_cores, describe_machine, describe_versions

    described: dict[str, Any] = {"card": None, "cpu": describe_machine()["cpu"], "cores": available_cores()}
    capability = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = f"{properties.major}.{properties.minor}"
        described |= {
            "card": properties.name,
            "capability": capability,
            "multiprocessors": properties.multi_processor_count,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        }
    versions = describe_versions() | {"CUDA of torch": torch.version.cuda, "triton": _triton()}
    return described | {name: version for name, version in versions.items() if version}, capability


def _triton() -> str | None:
    from benchmarks.machine import _version

    return _version("triton")


def say(text: str) -> None:
    print(text, flush=True)


def run_step(step: Step, pool: ThreadPoolExecutor) -> tuple[Findings, float]:
    """Run the parts of one step; what they found, and the seconds it took."""
    started = time.monotonic()
    say(f"{step.name}: {step.what} ...")
    parts = list(pool.map(_guarded, step.jobs)) if step.together else [_guarded(job) for job in step.jobs]
    return join(parts), time.monotonic() - started


def _guarded(job: Job) -> Findings:
    """What a part found; an error of ours is a failure of this part, and the others go on."""
    try:
        found = job()
    except Exception as error:
        found = Findings(failures=[f"{type(error).__name__}: {error}"])
    for line in [*found.notes, *found.failures, *([f"SKIPPED: {found.skipped}"] if found.skipped else [])]:
        say(f"  {line}")
    return found


def run_one_by_one(plan: Sequence[Step]) -> dict[str, tuple[Findings, float]]:
    """The steps in order, so that nothing disturbs what is timed."""
    ended = {}
    with ThreadPoolExecutor() as pool:
        for step in plan:
            ended[step.name] = run_step(step, pool)
            say(f"{step.name}: {ended[step.name][0].status} after {ended[step.name][1]:.0f} s")
    return ended


def run_side_by_side(plan: Sequence[Step], workers: int) -> dict[str, tuple[Findings, float]]:
    """All parts of all steps at once, as many as there are processors: nothing is timed."""
    started = time.monotonic()
    ended = {}
    with ThreadPoolExecutor(workers) as pool:
        running = {step.name: [pool.submit(_guarded, job) for job in step.jobs] for step in plan}
        for step in plan:
            say(f"{step.name}: {step.what} ...")
        for name, parts in running.items():
            found = join([part.result() for part in parts])
            ended[name] = found, time.monotonic() - started
            say(f"{name}: {found.status} after {ended[name][1]:.0f} s")
    return ended


def check(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code."""
    from benchmarks.machine import available_cores, describe_commit

    if args.without_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for what is started, too
    machine, capability = describe()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        folder = Path(name)
        if capability is not None:
            say(f"{machine['card']}, compute capability {capability}")
            ended = run_one_by_one(steps.with_gpu(folder, capability, args.steps, args.quick))
            not_run = []
        else:
            not_run = [step for step in args.steps if step in steps.MEASURED]
            say("There is no GPU here." + (f" Without one these cannot run: {', '.join(not_run)}." if not_run else ""))
            plan = steps.without_gpu(folder, args.arch, args.steps, args.quick)
            ended = run_side_by_side(plan, available_cores())
    commit, date = describe_commit(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    content = {
        "format": report.FORMAT,
        "machine": machine,
        "not_run": not_run,
        "steps": {
            name: {**found.as_json(), "seconds": round(seconds, 1), "date": date, "commit": commit}
            for name, (found, seconds) in ended.items()
        },
    }
    say("\n" + report.markdown(content))
    target = args.output or (RESULTS if capability is not None else None)
    if target is not None:
        say(f"wrote {report.write(content, target, report.file_name(machine['card'] or 'none'))} and .json beside it")
    failed = [name for name, (found, _) in ended.items() if found.failures]
    say(
        f"FAILED: {', '.join(failed)}" if failed else "passed" + (f"; not run: {', '.join(not_run)}" if not_run else "")
    )
    return 1 if failed else 0


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2, after one sentence, if it cannot be done."""
    args = build_parser().parse_args(arguments)
    if (
        args.output is not None
        and args.output.exists()
        and not (args.output.is_dir() and os.access(args.output, os.W_OK))
    ):
        print(f"error: {args.output} must be a folder that you may write into.", file=sys.stderr)
        return 2
    try:
        return check(args)
    except KeyboardInterrupt:
        print("error: stopped before the end.", file=sys.stderr)
        return 130
