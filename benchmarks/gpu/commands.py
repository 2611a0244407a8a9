"""Commands that the check runs, each with a log of its own, and what is built with them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import ptxas
from benchmarks.gpu.findings import Findings

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = {"causal-conv1d": "CAUSAL_CONV1D", "mamba-1p1p1": "MAMBA"}  # folder: the prefix of its switches
OF_THE_CALLER = re.compile(
    r"(CAUSAL_CONV1D|SELECTIVE_SCAN|MAMBA)_(FORCE|SKIP|LOCAL)_|NVCC_APPEND_FLAGS|TRITON_INTERPRET"
)
SUMMARY = re.compile(r"(?m)^=*\s*(\d+ (?:passed|failed|error|skipped|deselected|no tests)[^=\n]*? in [\d.]+s).*$")
PYTHON = sys.executable
COPIED = ("tests", "vim", "vmamba", "benchmarks", "pyproject.toml")


@dataclass(frozen=True)
class Done:
    """A command that ended.

    Attributes:
        code: its exit status; None if it ran past its time. seconds: how long it ran. stdout, stderr: what it wrote.
    """

    code: int | None
    seconds: float
    stdout: str
    stderr: str

    def why_not(self, what: str) -> list[str]:
        """A sentence with the last lines of what it wrote if it failed; else nothing."""
        if self.code == 0:
            return []
        how = "ran past its time" if self.code is None else f"ended with status {self.code}"
        lines = [line for line in f"{self.stdout}\n{self.stderr}".splitlines() if line.strip()]
        telling = [line for line in lines if line.startswith(("FAILED", "ERROR", "E   "))][:12]
        return [f"{what} {how}:\n" + "\n".join(telling + lines[-12:])]


def run(command: Sequence[str | Path], limit: float, folder: Path = ROOT, **environment: str) -> Done:
    """Run a command to its end, or to `limit` seconds, without the switches that the caller's environment may hold."""
    started = time.monotonic()
    variables = {name: value for name, value in os.environ.items() if not OF_THE_CALLER.match(name)}
    texts = list(map(str, command))
    try:
        done = subprocess.run(
            texts,
            cwd=folder,
            env=variables | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
        )
    except subprocess.TimeoutExpired as error:
        out, err = (_text(part) for part in (error.stdout, error.stderr))
        return Done(None, time.monotonic() - started, out, err)
    except OSError as error:
        return Done(127, time.monotonic() - started, "", f"{texts[0]} cannot be started: {error}")
    return Done(done.returncode, time.monotonic() - started, done.stdout, done.stderr)


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def find_nvcc() -> str | None:
    """Where the packages' set-up looks for nvcc, too."""
    homes = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def architectures_of(nvcc: str) -> list[str]:
    """All that it compiles for, as in "9.0"."""
    listed = run([nvcc, "--list-gpu-code"], 60).stdout
    return [str(number / 10) for number in sorted(int(each) for each in re.findall(r"(?m)^sm_(\d+)\s*$", listed))]


def build(
    package: str, folder: Path, architecture: str, environment: Mapping[str, str], limit: float = 900
) -> Findings:
    """Compile the CUDA kernels of a package as its set-up does, and read what nvcc says of them.

    Args:
        package: its folder in the repository. folder: an empty one, for the built package.
        architecture: as in "9.0": one, since what nvcc says of several at a time is mixed up.
    """
    command: list[str | Path] = [PYTHON, "setup.py", "build_py", "--build-lib", folder]
    switches = {
        "TORCH_CUDA_ARCH_LIST": architecture,
        "NVCC_APPEND_FLAGS": " ".join(filter(None, (os.environ.get("NVCC_APPEND_FLAGS"), "-Xptxas -v"))),
        f"{PACKAGES[package]}_FORCE_BUILD": "1",
    }
    done = run(command, limit, ROOT / package, **{**switches, **environment})
    kernels = ptxas.demangled(ptxas.parse(done.stdout))
    findings = Findings(
        tables={
            "Registers and memory of the CUDA kernels (bytes per thread; shared memory: per block)": ptxas.rows(kernels)
        },
        measured={
            "kernels": [vars(kernel) for kernel in kernels],
            "compiled": [{"package": package, "architecture": architecture, "seconds": round(done.seconds, 1)}],
        },
        failures=done.why_not(f"Compiling {package} for {architecture}"),
    )
    if not findings.failures:
        findings.failures += [f"A compiler warned: {line}" for line in ptxas.warnings(done.stdout)]
        findings.failures += ptxas.complaints(kernels) if package == "mamba-1p1p1" else []
        spilling = sum(kernel.spills for kernel in kernels)
        findings.notes.append(
            f"{package} for {architecture}: {len(kernels)} kernels in {done.seconds:.0f} s, {spilling} of them spill"
        )
    return findings


def without_cpu_kernels() -> dict[str, str]:
    """What lets a package's set-up leave the CPU kernels out: nvcc does not look here for its C++ compiler."""
    return {"CC": "false", "CXX": "false"}


def copy_for_tests(folder: Path) -> None:
    """Put into a folder, beside the packages that are built there, what the tests and benchmarks need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results", "*.so"))
        else:
            shutil.copy2(source, folder / name)


def pytest(
    files: Sequence[str],
    arguments: Sequence[str],
    limit: float,
    environment: Mapping[str, str],
    folder: Path = ROOT,
    before: Sequence[str] = (),
) -> Findings:
    """Run tests, behind the words of `before`, and say how many passed."""
    what = f"pytest {' '.join((*files, *arguments))}"
    command = [*before, PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *arguments]
    done = run(command, limit, folder, **environment)
    counted = SUMMARY.findall(done.stdout)
    told = counted[-1] if counted else f"no count, after {done.seconds:.0f} s"
    result: Mapping[str, object] = {"command": what, "environment": dict(environment), "told": told, "code": done.code}
    return Findings(
        measured={"tests": [dict(result)]},
        notes=[
            f"{' '.join((*(f'{name}={value}' for name, value in environment.items() if name[0] == 'T'), what))}: {told}"
        ],
        failures=done.why_not(what),
    )
