"""Build mamba_ssm: the Python package always, its CPU and its CUDA kernels where they can be compiled.

Beside them, where ONNX Runtime's headers are, the CPU kernels as operators of ONNX Runtime.

Read from the environment; TRUE, 1, YES or ON in any case switch one of the first four on:

    SELECTIVE_SCAN_FORCE_FALLBACK   compile nothing: no CUDA, no native kernels, no operators
    MAMBA_SKIP_CUDA_BUILD           do not compile the CUDA kernels
    MAMBA_FORCE_BUILD               fail where the CUDA kernels cannot be compiled; needs no GPU; skipping wins over it
    MAMBA_FORCE_CXX11_ABI           accepted without effect: what is compiled knows no torch, and so no ABI of it
    MAMBA_LOCAL_VERSION             a text that the version ends with, after a "+"
    TORCH_CUDA_ARCH_LIST            what to compile for, as in "8.0;9.0+PTX", or "all"; unset: the GPUs here
    CUDA_HOME, CUDA_PATH            the CUDA toolkit's folder; unset: nvcc is on PATH, in /usr/local/cuda or from pip
    NVCC_CCBIN, CUDAHOSTCXX         the C++ compiler for nvcc to use
    ONNXRUNTIME_INCLUDE             the folder of onnxruntime_c_api.h; unset: where systems and Homebrew keep it
    MAX_JOBS                        how many compilations to run at a time; unset: as many as there are processors

nvcc itself reads NVCC_APPEND_FLAGS: "-Xptxas -v" makes it report registers and memory. What was left out, and why, is
printed and written to mamba_ssm/_build.py, where `python -m mamba_ssm` finds it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory

from setuptools import Distribution, find_packages, setup
from setuptools._distutils.ccompiler import new_compiler
from setuptools._distutils.sysconfig import customize_compiler
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PACKAGE = "mamba_ssm"
SWITCHES = "MAMBA"
FALLBACK = "SELECTIVE_SCAN_FORCE_FALLBACK"
CUDA_MODULE = "selective_scan_cuda"  # upstream's extension module; here it is Python and calls the library

NATIVE_LIBRARY = "kernels.cpu.so"  # a dot in its stem: nothing that walks the package takes it for a module
NATIVE_SOURCES = ["csrc/cpu/*.cpp", "csrc/common/isa_*.cpp"]  # common: causal-conv1d/csrc/cpu
NATIVE_INCLUDES = ["csrc/cpu", "csrc/common"]
# -ffast-math must never be among them: it deletes the range reduction of the exponential.
NATIVE_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
NATIVE_FLAGS += ["-fno-exceptions", "-fno-rtti", "-w"]  # gcc 12 warns about its own AVX-512 header

ONNX_LIBRARY = "kernels.onnxruntime.so"
ONNX_SOURCES = ["csrc/onnxruntime/*.cpp"]
ONNX_HEADER = "onnxruntime_c_api.h"
ONNX_FOLDERS = [f"{root}/include/onnxruntime" for root in ("/usr", "/usr/local", "/opt/homebrew")]

CUDA_LIBRARY = "kernels.cuda.so"
CUDA_SOURCES = ["csrc/selective_scan/cuda/*.cu"]
CUDA_INCLUDES = ["csrc/selective_scan/cuda", "csrc/selective_scan/common"]  # common: causal-conv1d/csrc/cuda
# --use_fast_math must never be among them: it flushes denormals to zero and makes exp and division inexact.
CUDA_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
OLDEST = 75  # Turing; what older GPUs lack is needed, such as parameters of kernels that stay where they are
# The first toolkit for each of the later architectures.
FIRST_CUDA = {89: "11.8", 90: "11.8", 100: "12.8", 103: "12.9", 110: "13.0", 120: "12.8", 121: "12.9"}
NVCC_MENDS = {
    "unsupported (GNU|clang)": "set NVCC_CCBIN or CUDAHOSTCXX to an older g++, or install a newer CUDA toolkit",
    "died due to signal 9": "the memory is full; set MAX_JOBS=1",
}


# What is said of a part that is left out, with the reason as a clause.
WITHOUT = {
    "cuda": "cuda backend: {}. The others take its place.",
    "native": "native backend: {}. The others take its place.",
    "onnxruntime": "operators for ONNX Runtime: {}. Exported files run without them.",
}


class BuildError(Exception):
    """Why kernels are not compiled, as a clause."""


def switched_on(name: str) -> bool:
    return os.environ.get(name, "").strip().upper() in {"TRUE", "1", "YES", "ON"}


def skip_switch() -> str | None:
    """The switch that forbids the CUDA build, None if none does."""
    return next((name for name in (FALLBACK, f"{SWITCHES}_SKIP_CUDA_BUILD") if switched_on(name)), None)


def cuda_is_forced() -> bool:
    return switched_on(f"{SWITCHES}_FORCE_BUILD") and skip_switch() is None


def version() -> str:
    """`__version__` of the package, read as text, with the local suffix if one is asked for."""
    source = (HERE / PACKAGE / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise SystemExit(f"error: {PACKAGE}/__init__.py does not define __version__.")
    local = os.environ.get(f"{SWITCHES}_LOCAL_VERSION", "").strip()
    return f"{found[1]}+{local}" if local else found[1]


def sources(patterns: list[str]) -> list[str]:
    return [path for pattern in patterns for path in sorted(glob(pattern))]


def call(*command: str) -> str:
    """Run nvcc, print what it says for `pip install -v` to show, and return it.

    Raises:
        BuildError: it failed; has the first line that tells why.
    """
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started ({error})") from error
    print(f"{shlex.join(command)}\n{done.stdout}", end="", flush=True)
    if done.returncode == 0:
        return done.stdout
    line = re.search(r"(?im)^.*(\berror\b|\bfatal\b|not found|no such file).*$", done.stdout)
    why = line[0].strip() if line else f"it ended with status {done.returncode}"
    mend = next((mend for sign, mend in NVCC_MENDS.items() if re.search(sign, done.stdout)), None)
    raise BuildError(f"{command[0]} failed ({why}); {mend or 'pip install -v shows its output'}")


def find_nvcc() -> str:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [f"{home}/bin" for home in homes] + [os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    for site in [*sys.path, *map(sysconfig.get_path, ("purelib", "platlib"))]:  # pip's isolation hides the last two
        folders += sorted((str(folder) for folder in Path(site).glob("nvidia/cu[0-9]*/bin")), reverse=True)
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None:
        raise BuildError(
            "nvcc was not found; install a CUDA toolkit and set CUDA_HOME to its folder, or (CUDA 13) "
            "pip install nvidia-cuda-nvcc nvidia-cuda-cccl"
        )
    return nvcc


def cards() -> list[str]:
    """The compute capabilities of the GPUs in this machine, such as 9.0, lowest first."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):  # no driver, or one that does not work
        return []
    return sorted(set(re.findall(r"(?m)^\d+\.\d(?=\s*$)", printed)), key=float)


def architectures() -> list[str]:
    """What to compile for: the names in TORCH_CUDA_ARCH_LIST, or those of the GPUs here, or "all" if it is forced."""
    listed = re.findall(r"[^;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
    if listed:
        return listed
    if present := cards():
        return [*present[:-1], f"{present[-1]}+PTX"]  # PTX is what later GPUs run
    if cuda_is_forced():
        return ["all"]
    raise BuildError("there is no GPU to compile for and TORCH_CUDA_ARCH_LIST names none")


def unknown(number: int, known: list[int], nvcc: str) -> str:
    asks = "TORCH_CUDA_ARCH_LIST asks for" if os.environ.get("TORCH_CUDA_ARCH_LIST") else "the GPU here is of"
    older = [each for each in known if each < number]
    install = f"CUDA {FIRST_CUDA[number]} or newer" if number in FIRST_CUDA else "a newer CUDA toolkit"
    names = ", ".join(str(each / 10) for each in known)
    if not older:
        return f"{asks} architecture {number / 10} and its kernels need 7.5 or newer ({nvcc} compiles for {names})"
    mend = f"{install}, or set TORCH_CUDA_ARCH_LIST={older[-1] / 10}+PTX"
    return f"{asks} architecture {number / 10} and {nvcc} compiles only for {names}; install {mend}"


def architecture_flags(wanted: list[str], nvcc: str) -> list[str]:
    """Machine code for each architecture, and PTX for those with +PTX, as options of nvcc.

    Raises:
        BuildError: one is no architecture, or none that this nvcc knows.
    """
    listed = map(int, re.findall(r"(?m)^sm_(\d+)\s*$", call(nvcc, "--list-gpu-code")))
    known = sorted(number for number in listed if number >= OLDEST)
    if [name.lower() for name in wanted] == ["all"]:
        wanted = [f"{number / 10}{'+PTX' if number == known[-1] else ''}" for number in known]
    codes: dict[str, list[str]] = {}
    for name in wanted:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if found is None:
            raise BuildError(f'TORCH_CUDA_ARCH_LIST has {name!r} in it and must be like "8.0;9.0+PTX", or "all"')
        number = int(found[1] + found[2])
        if number not in known:
            raise BuildError(unknown(number, known, nvcc))
        codes.setdefault(f"{number}{found[3]}", []).append(found[4])
    suffixes = {name: f"[sm_{name},compute_{name}]" if any(ptx) else f"sm_{name}" for name, ptx in codes.items()}
    return [f"-gencode=arch=compute_{name},code={code}" for name, code in suffixes.items()]


def build_cuda(folder: Path) -> None:
    """Compile the CUDA kernels into one library in `folder`, for whatever Python and torch will load it.

    Raises:
        BuildError: it is switched off, or cannot be compiled. No library of an earlier build is left then.
    """
    library = folder / CUDA_LIBRARY
    library.unlink(missing_ok=True)
    if skip := skip_switch():
        over = f", which wins over {SWITCHES}_FORCE_BUILD" if switched_on(f"{SWITCHES}_FORCE_BUILD") else ""
        raise BuildError(f"{skip} was set when it was installed{over}")
    if sys.platform != "linux":
        raise BuildError("its kernels compile on Linux only")
    files = sources(CUDA_SOURCES)
    if not files:
        raise BuildError("the sources of its kernels are missing; install it from a whole checkout")
    wanted = architectures()  # before nvcc is missed: who has no GPU needs no toolkit
    nvcc = find_nvcc()
    host = os.environ.get("NVCC_CCBIN") or os.environ.get("CUDAHOSTCXX")
    compiler = [nvcc, *([f"-ccbin={host}"] if host else [])]
    limit = os.environ.get("MAX_JOBS", "")
    jobs = max(1, int(limit) if limit.isdecimal() else len(os.sched_getaffinity(0)))
    flags = [*CUDA_FLAGS, *(f"-I{path}" for path in CUDA_INCLUDES), *architecture_flags(wanted, nvcc)]
    flags.append(f"--threads={max(1, jobs // len(files))}")  # more than one architecture at a time
    with TemporaryDirectory(dir=folder) as objects, ThreadPoolExecutor(min(jobs, len(files))) as pool:
        compiled = [f"{objects}/{Path(file).stem}.o" for file in files]
        commands = [(*compiler, *flags, "-c", file, "-o", made) for file, made in zip(files, compiled, strict=True)]
        list(pool.map(lambda command: call(*command), commands))
        call(*compiler, "-shared", "-cudart=static", *compiled, "-o", f"{objects}/{CUDA_LIBRARY}")
        os.replace(f"{objects}/{CUDA_LIBRARY}", library)


def build_native(folder: Path, objects: Path) -> None:
    """Compile the CPU kernels into one library in `folder`, for whatever Python and torch will load it.

    Each source holds the kernels of one instruction set and says so itself; the machine that runs them chooses.

    Raises:
        BuildError: it is switched off, or cannot be compiled. No library of an earlier build is left then.
    """
    library = folder / NATIVE_LIBRARY
    library.unlink(missing_ok=True)
    link(library, compilable(NATIVE_SOURCES), objects, NATIVE_INCLUDES)


def build_onnxruntime(folder: Path, objects: Path) -> None:
    """Compile the operators for ONNX Runtime into a library of their own, with the kernels in it.

    It is linked to no library of ONNX Runtime: the one that loads it hands in its functions. `objects` holds what
    `build_native` made: the kernels, and what its library exports, which this one does not.

    Raises:
        BuildError: as `build_native`; or there are no headers.
    """
    library = folder / ONNX_LIBRARY
    library.unlink(missing_ok=True)
    files, headers = compilable(ONNX_SOURCES), find_headers()
    if not (folder / NATIVE_LIBRARY).is_file():
        raise BuildError("the native kernels, which it calls, were not built")
    kernels = sorted(str(path) for path in objects.rglob("*.o") if path.stem != "library")
    link(library, files, objects, [*NATIVE_INCLUDES, headers], kernels)


def find_headers() -> str:
    """The folder of ONNX Runtime's headers, which its wheels lack."""
    asked = os.environ.get("ONNXRUNTIME_INCLUDE", "").strip()
    for folder in [asked] if asked else ONNX_FOLDERS:
        if (Path(folder) / ONNX_HEADER).is_file():
            return folder
    if asked:
        raise BuildError(f"ONNXRUNTIME_INCLUDE is {asked} and there is no {ONNX_HEADER} in that folder")
    raise BuildError(
        f"{ONNX_HEADER} was not found; install Debian's libonnxruntime-dev, or set ONNXRUNTIME_INCLUDE to its folder"
    )


def compilable(patterns: list[str]) -> list[str]:
    """The C++ sources, if they are to be compiled and are there."""
    if switched_on(FALLBACK):
        raise BuildError(f"{FALLBACK} was set when it was installed")
    if os.name != "posix":
        raise BuildError("its kernels compile on Linux and macOS only")
    files = sources(patterns)
    if not files:
        raise BuildError("the sources of its kernels are missing; install it from a whole checkout")
    return files


def link(library: Path, files: list[str], objects: Path, include: list[str], more: Sequence[str] = ()) -> None:
    """Compile `files` into the folder `objects`, and link them and `more` objects."""
    compiler = new_compiler()
    customize_compiler(compiler)
    try:
        compiled = compiler.compile(files, str(objects), include_dirs=include, extra_postargs=NATIVE_FLAGS)
        compiler.link_shared_object([*compiled, *more], str(library), target_lang="c++")
    except Exception as error:  # of a class that depends on the version of setuptools
        library.unlink(missing_ok=True)
        raise BuildError(
            f"no C++ compiler could build its kernels ({error}); pip install -v shows its output"
        ) from error


class BuildPackage(build_py):
    """Copies the package and tells, in it and on the screen, which compiled parts it comes without."""

    def run(self) -> None:
        super().run()
        folder = (HERE if getattr(self, "editable_mode", False) else Path(self.build_lib)) / PACKAGE
        left_out: dict[str, str] = {}
        with TemporaryDirectory() as made:
            objects = Path(made)
            builds: dict[str, Callable[[], None]] = {
                "cuda": lambda: build_cuda(folder),
                "native": lambda: build_native(folder, objects),
                "onnxruntime": lambda: build_onnxruntime(folder, objects),
            }
            for part, build in builds.items():
                try:
                    build()
                except BuildError as error:
                    if part == "cuda" and cuda_is_forced():
                        raise SystemExit(
                            f"error: {SWITCHES}_FORCE_BUILD is set and the CUDA kernels of {PACKAGE} "
                            f"cannot be built: {error}."
                        ) from error
                    left_out[part] = str(error)
                    print(f"{PACKAGE} comes without its {WITHOUT[part].format(error)}")
        (folder / "_build.py").write_text(
            '"""Written by setup.py: the compiled parts that this installation comes without, and why."""\n\n'
            f"REASONS: dict[str, str] = {left_out!r}\n",
            encoding="utf-8",
        )


class BinaryDistribution(Distribution):
    """A distribution whose wheel belongs to one platform, because of its compiled libraries."""

    def has_ext_modules(self) -> bool:
        native = sources(NATIVE_SOURCES) and not switched_on(FALLBACK)
        return bool(native or (sources(CUDA_SOURCES) and skip_switch() is None))


os.chdir(HERE)  # setuptools looks for the package in the working directory

setup(
    name=PACKAGE,
    version=version(),
    description="The selective scan, Mamba and Vision Mamba blocks, on any device that PyTorch runs on",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    py_modules=[CUDA_MODULE, f"{CUDA_MODULE}_oflex"],
    package_data={PACKAGE: ["py.typed"]},
    distclass=BinaryDistribution,
    cmdclass={"build_py": BuildPackage},
    python_requires=">=3.10",
    install_requires=["torch>=2.4"],
)
