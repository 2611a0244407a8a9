"""What nvcc says about kernels when it is given -Xptxas -v: registers, stack, spills, shared memory; and warnings."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
# Of the compiler, not of setuptools, whose lines begin with the word. ptxas tells of lost performance as "info".
WARNING = re.compile(r"(?im)^.*(?:\S.*\bwarning\b|potential performance loss).*$")
REAL_SCAN = re.compile(r"scan::(forward|backward)<(?:scan::)?Cut<float, \d+, (\d+), (\d+)\b")
COMMON_STATES = 16  # of Vim and Mamba


@dataclass(frozen=True)
class Kernel:
    """The resources of one kernel on one architecture.

    Attributes:
        name: demangled where a tool for that is there.
        architecture: as in "sm_90".
        registers: per thread. stack, spill_stores, spill_loads: bytes per thread, those of the functions it calls
            included. shared: bytes per block.
    """

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0

    @property
    def spills(self) -> bool:
        return bool(self.spill_stores or self.spill_loads)


def parse(output: str) -> list[Kernel]:
    """The kernels that a compiler's output describes, in its order. One architecture at a time wrote it."""
    kernels: list[Kernel] = []
    for line in output.splitlines():
        if entry := ENTRY.search(line):
            kernels.append(Kernel(entry[1], entry[2]))
        elif kernels and (frame := FRAME.search(line)):
            stack, stores, loads = map(int, frame.groups())
            last = kernels[-1]
            kernels[-1] = replace(
                last,
                stack=last.stack + stack,
                spill_stores=last.spill_stores + stores,
                spill_loads=last.spill_loads + loads,
            )
        elif kernels and (registers := REGISTERS.search(line)):
            shared = SHARED.search(line)
            kernels[-1] = replace(kernels[-1], registers=int(registers[1]), shared=int(shared[1]) if shared else 0)
    return kernels


def warnings(output: str) -> list[str]:
    """The lines in which a compiler warns."""
    return [found[0].strip() for found in WARNING.finditer(output)]


def demangled(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The same with names that people read, as they are where neither c++filt nor cu++filt is there."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not kernels:
        return list(kernels)
    names = "\n".join(kernel.name for kernel in kernels)
    done = subprocess.run([tool], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    return [replace(kernel, name=short_name(name)) for kernel, name in zip(kernels, done, strict=True)]


def short_name(name: str) -> str:
    """A demangled kernel without its result and its arguments: `scan::forward<Cut<float, 128, 4, 4, 4, 3>>`."""
    name = re.sub(r"\(.*$", "", name.removeprefix("void "))
    name = re.sub(r"(?<=<)scan::", "", name)
    return re.sub(r" +(?=>)", "", name)


def is_common(kernel: Kernel) -> bool:
    """Whether this is a real scan of 16 states, which Vim and Mamba run; in every dtype, as it loads them all."""
    cut = REAL_SCAN.search(kernel.name)
    return cut is not None and int(cut[2]) * int(cut[3]) == COMMON_STATES


def complaints(kernels: Iterable[Kernel]) -> list[str]:
    """A sentence for each thing that must not be: a spill in a scan of 16 states, or no such scan in the report."""
    found: dict[str, set[str]] = {}
    sentences = []
    for kernel in kernels:
        directions = found.setdefault(kernel.architecture, set())
        if not is_common(kernel):
            continue
        directions.add(kernel.name.partition("<")[0])
        if kernel.spills:
            sentences.append(
                f"{kernel.name} spills on {kernel.architecture}: {kernel.spill_stores} bytes stored, "
                f"{kernel.spill_loads} loaded."
            )
    for architecture, directions in found.items():
        if len(directions) != 2:
            sentences.append(
                f"No scan of {COMMON_STATES} states, forward and backward, was compiled for {architecture}."
            )
    return sentences


def rows(kernels: Iterable[Kernel]) -> list[list[str]]:
    """A header and a line per kernel and architecture."""
    header = ["architecture", "kernel", "registers", "stack", "spill stores", "spill loads", "shared memory"]
    ordered = sorted(kernels, key=lambda kernel: (int(re.sub(r"\D", "", kernel.architecture)), kernel.name))
    return [header] + [
        [
            kernel.architecture,
            f"`{kernel.name}`",
            *map(str, (kernel.registers, kernel.stack, kernel.spill_stores, kernel.spill_loads, kernel.shared)),
        ]
        for kernel in ordered
    ]
