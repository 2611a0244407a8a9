"""The command line of the benchmarks.

scripts/bench                      the comparisons of the README
scripts/bench 'resolution_*'       those whose names match; --list prints all names
scripts/bench --quick              the first of them in a few seconds, to see that it works
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.cases import COMPARISONS, FRONT_PAGE, Comparison
from command_line import note, positive, run_script

FORMAT = 1  # of the JSON file; grows when a field changes its meaning
QUICK_ROUNDS = 3


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Compare Vim with its step-by-step loop and with DeiT, in one run."
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="comparison or pattern such as 'scan_*' (default: the README's)")
    add("--list", action="store_true", help="print the names of all comparisons")
    add("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, no memory, one comparison if none is named")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: those of each comparison, mostly 2)")
    add("--rounds", type=positive, metavar="N", help="measured calls of each case (default: those of each comparison)")
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add("--markdown", action="store_true", help="print Markdown tables")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    return parser


def select(args: argparse.Namespace) -> dict[str, Comparison]:
    """The comparisons that the command line asks for, changed as it says.

    Raises:
        UsageError: a name that no comparison has.
    """
    from flags import UsageError

    default = list(FRONT_PAGE)[: 1 if args.quick else None]
    chosen: dict[str, Comparison] = {}
    for pattern in args.names or default:
        names = fnmatch.filter(COMPARISONS, pattern)
        if not names:
            raise UsageError(f"no comparison is called {pattern!r}; `scripts/bench --list` prints all names")
        chosen.update((name, COMPARISONS[name]) for name in names)
    changes: dict[str, Any] = {"rounds": QUICK_ROUNDS, "memory": False} if args.quick else {}
    changes.update({name: getattr(args, name) for name in ("threads", "rounds") if getattr(args, name)})
    if args.no_memory:
        changes["memory"] = False
    return {name: dataclasses.replace(comparison, **changes) for name, comparison in chosen.items()}


def _describe(load: float | None) -> dict[str, Any]:
    from benchmarks.machine import describe_commit, describe_machine, describe_versions
    from causal_conv1d.backend import available_backends

    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv[1:],
        "machine": describe_machine(),
        "versions": describe_versions(),
        "commit": describe_commit(),
        "backends": available_backends(),
        "load_average": load,
    }


def _check_target(path: Path | None) -> None:
    """Find out before minutes of measuring whether the file can be written."""
    from flags import UsageError

    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {folder}")
    if path.is_dir():
        raise UsageError(f"{path} cannot be written: it is a folder")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{path} cannot be written: you may not write into {folder}")


def measure(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        UsageError: it cannot be done; one sentence says why.
    """
    from flags import UsageError

    if args.list:
        print("\n".join(f"{name:<34}{comparison.title}" for name, comparison in COMPARISONS.items()))
        return 0
    chosen = select(args)
    _check_target(args.json)

    from benchmarks.machine import available_cores, load_average, load_warning
    from benchmarks.report import noise_warnings, summary, write_json
    from benchmarks.runner import run_comparison

    load = load_average()
    warnings = [load_warning(load)]
    most, cores = max(comparison.threads for comparison in chosen.values()), available_cores()
    if most > cores:
        warnings.append(f"WARNING: {most} threads on {cores} cores wait for each other: the times will be too long.")
    for warning in filter(None, warnings):
        note(warning)
    description = _describe(load)
    try:
        outcomes = [run_comparison(name, comparison, note) for name, comparison in chosen.items()]
    except RuntimeError as error:
        raise UsageError(str(error)) from error
    print(summary(outcomes, description, args.markdown))
    for warning in filter(None, [*warnings, *noise_warnings(outcomes)]):
        note(warning)
    if args.json:
        try:
            write_json(args.json, description, outcomes)
        except OSError as error:
            raise UsageError(f"{args.json} cannot be written: {error.strerror}") from error
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), measure, arguments)
