"""Where and on what a benchmark ran."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("timm", "causal-conv1d", "mamba-ssm", "mambapy", "transformers")
# What decides the speed of the kernels, in the names of Linux.
INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
QUIET = 0.3  # runnable processes, on average over a minute, that another program may have before timings suffer


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, instruction sets, memory in bytes, operating system."""
    import torch

    fields = _cpu_fields()
    return {
        "cpu": fields.get("model name") or fields.get("Model") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": available_cores(),
        "instruction_sets": instruction_sets(),
        "kernels_instruction_set": _kernels(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": _memory(),
        "system": platform.platform(),
    }


def available_cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def instruction_sets() -> list[str]:
    """Those of `INSTRUCTION_SETS` that the processor has."""
    fields = _cpu_fields()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return [name for name in INSTRUCTION_SETS if name in flags]


def _kernels() -> str:
    """The instruction set that the compiled kernels use here; empty without them."""
    from mamba_ssm.ops.selective_scan import FAMILY

    return "" if FAMILY.missing("native") is not None else FAMILY.engines["native"].detail


def _lacks_kernels(prefix: str) -> str | None:
    used = _kernels()
    if used.startswith(prefix):
        return None
    return f"the compiled kernels use {used} here" if used else "there are no compiled kernels here"


def _lacks_bf16_products() -> str | None:
    if {"amx_bf16", "avx512_bf16"} & set(instruction_sets()):
        return None
    return "this processor has neither AMX nor AVX-512-BF16"


def _lacks_vnni() -> str | None:
    if {"avx512_vnni", "avx_vnni"} & set(instruction_sets()):
        return None
    return "this processor has no VNNI instructions"


# What claims may need, and a function that says as a clause why the machine has it not, None if it has.
ABILITIES: dict[str, Callable[[], str | None]] = {
    "AVX-512 kernels": partial(_lacks_kernels, "avx512"),
    "AVX2 kernels": partial(_lacks_kernels, "avx2"),
    "bf16 products": _lacks_bf16_products,
    "VNNI": _lacks_vnni,
}


def _cpu_fields() -> dict[str, str]:
    """The first value of each field of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        name, found, value = line.partition(":")
        if found:
            fields.setdefault(name.strip(), value.strip())
    return fields


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not on this system
        return None


def describe_versions() -> dict[str, str | None]:
    """Python and the packages that matter; None for one that runs from its source without being installed."""
    import torch

    # torch itself says which build it is ("+cpu", "+cu130"); its installed metadata need not.
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_commit() -> dict[str, Any]:
    """The checked-out commit and whether files differ from it; None for what git does not tell."""
    commit, changes = _git("rev-parse", "--verify", "HEAD"), _git("status", "--porcelain")
    return {"id": commit, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def load_average() -> float | None:
    """Runnable processes over the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def load_warning(load: float | None) -> str | None:
    """A sentence if other programs keep the machine busy, which makes timings too long; None if it is quiet."""
    if load is None or load <= QUIET:
        return None
    return (
        f"WARNING: other programs keep this machine busy (load average {load:.2f} over the last minute, above "
        f"{QUIET}). The times below will be too long and the ratios wrong: end those programs, wait a minute and run "
        "this again."
    )
