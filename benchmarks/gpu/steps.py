"""The steps of the check: with a GPU, and what of them a machine without one can do."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.gpu import commands
from benchmarks.gpu.commands import PACKAGES, PYTHON, ROOT
from benchmarks.gpu.findings import Findings

Job = Callable[[], Findings]
TESTS = (
    "tests/ops/test_causal_conv1d.py",
    "tests/ops/test_selective_scan.py",
    "tests/ops/test_norm.py",
    "tests/ops/test_selective_state_update.py",
    "tests/modules/test_mamba_inner.py",
    "tests/ops/test_selective_scan_2d.py",
)
OF_BACKENDS = {  # what one has alone
    "cuda": ("tests/ops/test_cuda.py", "tests/ops/test_cuda_oflex.py"),
    "triton": ("tests/ops/test_triton_scan.py",),
}
# The norm and the update of one token have triton kernels alone.
WITH_CUDA = (TESTS[0], TESTS[1], *TESTS[4:], *OF_BACKENDS["cuda"])
MEASURED = {  # {part of measure.py: (what it does, seconds that it may take)}
    "training": ("a short training run of Vim-Tiny on random pictures", 300),
    "ops": ("the ops against the speed of a copy and of exponentials", 300),
    "step": ("a training step of Vim-Tiny over DeiT-Tiny's", 300),
    "inference": ("inference at 1248 px against DeiT-Tiny", 300),
    "mixers": ("the inner functions and the mixers, kept and recomputed", 300),
}
NAMES = ("build", "tests", "sanitizer", *MEASURED)
# {file: what of it is interpreted}. The interpreter takes seconds for what a GPU does in microseconds.
SOME_DTYPES = "triton and not float64 and not torch.float16"  # fp16 is loaded as bf16 is, and torch computes fp64
INTERPRETED = {
    TESTS[0]: SOME_DTYPES,
    TESTS[1]: "triton and float32 and (odd or chunk-and-one or reverse-groups or groups-one-constant)",
    TESTS[2]: SOME_DTYPES,
    TESTS[3]: SOME_DTYPES,
    TESTS[4]: "triton and float32 and (projection-bias or options4)",
    TESTS[5]: "triton and float32 and (one-row or rows)",
    OF_BACKENDS["triton"][0]: "not call_to_call and not many_taps",
}
SANITIZED = "cuda and float32 and not golden"
PRELOADED = ("libasan.so", "libstdc++.so")
SANITIZERS = "-fsanitize=address,undefined"


@dataclass(frozen=True)
class Step:
    """Attributes: name; what it does, for people; jobs, its parts; together: whether they may run side by side."""

    name: str
    what: str
    jobs: Sequence[Job]
    together: bool = False


def skip(reason: str) -> Job:
    """A part that is left out; the reason is a clause."""
    return lambda: Findings(skipped=reason)


# --- with a GPU -----------------------------------------------------------------------------------------------------


def with_gpu(folder: Path, capability: str, names: Sequence[str], quick: bool) -> list[Step]:
    """The steps with the packages built for this card (its compute capability, as in "9.0") in an empty folder.

    The build comes first whatever is asked for, as all others need it.
    """
    commands.copy_for_tests(folder)
    paths = [folder / name for name in (*PACKAGES, "vim", "tests", "")]
    run_there = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
    tests = [partial(_pytest_there, folder, run_there, backend) for backend in ("cuda", "triton") if _may_run(backend)]
    steps = [
        Step("build", f"nvcc compiles both packages for {capability}", _builds_there(folder, capability), True),
        Step("tests", "the tests of the ops on the GPU", tests, True),
        Step("sanitizer", "compute-sanitizer on a small case", _sanitizer_jobs(folder, run_there)),
        *(
            Step(name, what, [partial(_measure, folder, run_there, name, quick, limit)])
            for name, (what, limit) in MEASURED.items()
        ),
    ]
    return [step for step in steps if step.name in names or step.name == "build"]


def _may_run(backend: str) -> bool:
    if backend == "cuda":
        return commands.find_nvcc() is not None
    return importlib.util.find_spec("triton") is not None


def _builds_there(folder: Path, capability: str) -> list[Job]:
    if commands.find_nvcc() is None:
        return [partial(_build_without_nvcc, package, folder / package) for package in PACKAGES]
    return [partial(commands.build, package, folder / package, capability, {}) for package in PACKAGES]


def _build_without_nvcc(package: str, target: Path) -> Findings:
    """Put the package there without CUDA kernels: triton takes their place."""
    done = commands.run([PYTHON, "setup.py", "build_py", "--build-lib", target], 600, ROOT / package)
    return Findings(skipped=f"nvcc was not found for {package}", failures=done.why_not(f"Building {package}"))


def _pytest_there(folder: Path, environment: dict[str, str], backend: str) -> Findings:
    return commands.pytest((*TESTS, *OF_BACKENDS[backend]), ("--backend", backend), 540, environment, folder)


def _sanitizer_jobs(folder: Path, environment: dict[str, str]) -> list[Job]:
    tool = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
    if tool is None:
        return [skip("compute-sanitizer is not installed")]
    if not _may_run("cuda"):
        return [skip("there are no CUDA kernels to watch, as nvcc was not found")]
    return [partial(_sanitize, tool, kind, folder, environment) for kind in ("memcheck", "racecheck")]


def _sanitize(tool: str, kind: str, folder: Path, environment: dict[str, str]) -> Findings:
    told = folder / f"{kind}.json"
    options = ["--tool", kind, "--error-exitcode", "9", "--report-api-errors", "no"]
    command = [tool, *options, PYTHON, "-m", "benchmarks.gpu.measure", "small", str(told)]
    # Else torch's allocator hands out pieces of large blocks, past whose ends the tool sees nothing wrong.
    done = commands.run(command, 300, folder, **environment, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    summary = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
    notes = [f"{kind}: {summary[-1] if summary else 'no summary'}"]
    return Findings(notes=notes, failures=done.why_not(f"compute-sanitizer {kind}"))


def _measure(folder: Path, environment: dict[str, str], part: str, quick: bool, limit: float) -> Findings:
    told = folder / f"{part}.json"
    command = [PYTHON, "-m", "benchmarks.gpu.measure", part, str(told), *(["--quick"] if quick else [])]
    done = commands.run(command, limit, folder, **environment)
    if not told.is_file():
        return Findings(failures=done.why_not(f"The part {part}") or [f"The part {part} told nothing."])
    return Findings.from_json(json.loads(told.read_text(encoding="utf-8")))


# --- without a GPU --------------------------------------------------------------------------------------------------


def without_gpu(folder: Path, architecture: str | None, names: Sequence[str], quick: bool) -> list[Step]:
    """What of the steps needs no GPU: kernels compiled for one architecture or all, and run emulated or interpreted."""
    steps = [
        Step("tests", "the tests of the ops, CUDA kernels emulated and triton's interpreted", _emulated(folder, quick)),
        Step("build", "nvcc compiles both packages", _builds(folder, architecture)),
        Step(
            "sanitizer", "the emulated CUDA kernels under the sanitizers of g++", [partial(_sanitize_emulated, folder)]
        ),
    ]
    return [step for step in steps if step.name in names]


def _builds(folder: Path, architecture: str | None) -> list[Job]:
    nvcc = commands.find_nvcc()
    if nvcc is None:
        return [skip("nvcc was not found; `pip install nvidia-cuda-nvcc nvidia-cuda-cccl` brings it")]
    wanted = [architecture] if architecture else commands.architectures_of(nvcc)
    # One compiler at a time, since the jobs run side by side.
    environment = {"MAX_JOBS": "1", **commands.without_cpu_kernels()}
    return [
        partial(commands.build, package, folder / f"{package}-{name}", name, environment)
        for name in wanted
        for package in PACKAGES
    ]


def _emulated(folder: Path, quick: bool) -> list[Job]:
    jobs: list[Job] = []
    if importlib.util.find_spec("triton") is None:
        jobs.append(skip("triton is not installed: its kernels were not interpreted"))
    else:
        # Each file by itself, so that they share the processors evenly.
        jobs += [partial(_interpret, file, few) for file, few in list(INTERPRETED.items())[: 1 if quick else None]]
    if shutil.which(os.environ.get("CXX") or "g++") is None:
        return [*jobs, skip("g++ is not installed: the CUDA kernels were not emulated")]
    return [*jobs, partial(_test_emulated, folder / "emulated", quick)]


def _interpret(file: str, few: str) -> Findings:
    return commands.pytest([file], ("--backend", "triton", "-k", few), 900, {"TRITON_INTERPRET": "1"})


def _test_emulated(folder: Path, quick: bool) -> Findings:
    done = commands.run([ROOT / "scripts/emulate_cuda", folder], 300)
    if done.code != 0:
        return Findings(failures=done.why_not("scripts/emulate_cuda"))
    few = ("-k", "cuda and not torch.float16") if quick else ("-k", "cuda")
    return commands.pytest(WITH_CUDA, ("--backend", "cuda", "--emulated-cuda", str(folder), *few), 900, {})


def _sanitize_emulated(folder: Path) -> Findings:
    """As scripts/sanitize does for the CPU kernels. The emulated threads have stacks of their own, which the sanitizer
    remarks on and copes with."""
    compiler = shutil.which("g++")
    runtimes = [commands.run(["g++", f"-print-file-name={name}"], 60).stdout.strip() for name in PRELOADED]
    if compiler is None or not all(map(os.path.isabs, runtimes)):
        return Findings(skipped="g++ or the runtime of its sanitizers is not installed")
    flags = ("-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all", SANITIZERS)
    done = commands.run([ROOT / "scripts/emulate_cuda", folder / "sanitized", *flags], 600, CXX=compiler)
    if done.code != 0:
        return Findings(failures=done.why_not("scripts/emulate_cuda with sanitizers"))
    environment = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    }
    # The sanitizers' maps of memory do not go with addresses drawn at random from a wide range.
    before = ("setarch", "-R") if commands.run(["setarch", "-R", "true"], 60).code == 0 else ()
    given = ("--capture=sys", "--backend", "cuda", "--emulated-cuda", str(folder / "sanitized"), "-k", SANITIZED)
    return commands.pytest(WITH_CUDA[:2], given, 900, environment, before=before)
