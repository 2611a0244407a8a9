"""The command line of the benchmarks.

scripts/bench                      the comparisons of the README
scripts/bench claims               those that prove what is claimed
scripts/bench 'resolution_*'       those whose names match; --list prints all names
scripts/bench --quick              three rounds of the first of them, to see that it works
scripts/bench --plot JSON PNG      draw what 'resolution_*' wrote with --json
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

from benchmarks.cases import COMPARISONS, FRONT_PAGE, GROUPS, Comparison
from command_line import note, positive, run_script

FORMAT = 2  # of the JSON file; grows when a field changes its meaning
QUICK_ROUNDS = 3


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description="Compare Vim with its step-by-step loop, with DeiT and others, in one run."
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME",
        help=f"comparison, pattern such as 'scan_*', or {', '.join(GROUPS)} (default: the README's)")  # fmt: skip
    add("--list", action="store_true", help="print the names of all comparisons")
    add("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds, no memory, one comparison if none is named")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: those of each comparison, mostly 2)")
    add("--rounds", type=positive, metavar="N", help="measured calls of each case (default: those of each comparison)")
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add("--markdown", action="store_true", help="print Markdown tables")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured to FILE")
    add("--plot", type=Path, nargs=2, metavar=("JSON", "PNG"),
        help="measure nothing: draw times and memory over the resolutions that such a JSON file holds")  # fmt: skip
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
        names = GROUPS.get(pattern) or fnmatch.filter(COMPARISONS, pattern)
        if not names:
            raise UsageError(f"no comparison is called {pattern!r}; `scripts/bench --list` prints all names")
        chosen.update((name, COMPARISONS[name]) for name in names)
    changes: dict[str, Any] = {"rounds": QUICK_ROUNDS, "memory": False} if args.quick else {}
    changes.update({name: getattr(args, name) for name in ("threads", "rounds") if getattr(args, name)})
    if args.no_memory:
        changes["memory"] = False
    return {name: dataclasses.replace(comparison, **changes) for name, comparison in chosen.items()}


def leave_out(chosen: dict[str, Comparison], by_name: Sequence[str]) -> dict[str, Comparison]:
    """Those of the chosen comparisons that can run here; a note tells of each other one.

    Raises:
        UsageError: one that was asked for `by_name`, or all of them, cannot; says why and what mends it.
    """
    from benchmarks.subjects import missing
    from flags import UsageError

    possible = dict(chosen)
    for name, comparison in chosen.items():
        reason = next(filter(None, map(missing, comparison.cases)), None)
        if reason is None:
            continue
        if name in by_name:
            raise UsageError(f"{name} cannot run: {reason}")
        note(f"left out: {name}: {reason}")
        del possible[name]
    if not possible:
        raise UsageError("none of these comparisons can run here; the lines above say why")
    return possible


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


def _warn(chosen: dict[str, Comparison], load: float | None) -> list[str]:
    """Tell what about this machine disturbs times; return the sentences."""
    from benchmarks.machine import available_cores, load_warning

    warnings = [load_warning(load)]
    most, cores = max(comparison.threads for comparison in chosen.values()), available_cores()
    if most > cores:
        warnings.append(f"WARNING: {most} threads on {cores} cores wait for each other: the times will be too long.")
    told = [warning for warning in warnings if warning is not None]
    for warning in told:
        note(warning)
    return told


def measure(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        UsageError: it cannot be done; one sentence says why.
    """
    from flags import UsageError

    if args.list:
        print(_names())
        return 0
    if args.plot:
        return _plot(*args.plot)
    chosen = select(args)
    _check_target(args.json)
    chosen = leave_out(chosen, args.names)

    from benchmarks.machine import load_average
    from benchmarks.report import noise_warnings, summary, write_json
    from benchmarks.runner import run_comparison

    load = load_average()
    warnings = _warn(chosen, load)
    description = _describe(load)
    try:
        outcomes = [run_comparison(name, comparison, note) for name, comparison in chosen.items()]
    except RuntimeError as error:
        raise UsageError(_first_line(error)) from error
    print(summary(outcomes, description, args.markdown))
    for warning in [*warnings, *noise_warnings(outcomes)]:
        note(warning)
    if args.json:
        try:
            write_json(args.json, description, outcomes)
        except OSError as error:
            raise UsageError(f"{args.json} cannot be written: {error.strerror}") from error
    return 0


def _names() -> str:
    """All names that can be asked for, and what they stand for."""
    told = {name: comparison.title for name, comparison in COMPARISONS.items()}
    told.update({name: f"{len(names)} of the above" for name, names in GROUPS.items()})
    width = max(map(len, told))
    return "\n".join(f"{name:<{width}}  {what}" for name, what in told.items())


def _first_line(error: Exception) -> str:
    """What went wrong, without what a compiler has to say about it."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def _plot(source: Path, target: Path) -> int:
    from benchmarks.plot import draw, read

    _check_target(target)
    draw(read(source, FORMAT), target)
    print(f"drew {target}")
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), measure, arguments)
