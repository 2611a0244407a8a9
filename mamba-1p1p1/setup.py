"""Build mamba_ssm: the Python package always, its CPU kernels and its CUDA extension where they can be compiled.

Read from the environment; TRUE, 1, YES or ON in any case switch one on:

    SELECTIVE_SCAN_FORCE_FALLBACK   compile nothing, neither CUDA nor native
    MAMBA_SKIP_CUDA_BUILD           do not compile the CUDA extension
    MAMBA_FORCE_BUILD               fail where the CUDA extension cannot be compiled; skipping wins over it
    MAMBA_FORCE_CXX11_ABI           accepted without effect: the C++ ABI is always that of the installed torch
    MAMBA_LOCAL_VERSION             a text that the version ends with, after a "+"

torch itself reads CUDA_HOME and TORCH_CUDA_ARCH_LIST. What was left out, and why, is printed and written to
mamba_ssm/_build.py, where `python -m mamba_ssm` finds it.
"""

from __future__ import annotations

import os
import re
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from setuptools import Distribution, find_packages, setup
from setuptools._distutils.ccompiler import new_compiler
from setuptools._distutils.sysconfig import customize_compiler
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PACKAGE = "mamba_ssm"
SWITCHES = "MAMBA"
FALLBACK = "SELECTIVE_SCAN_FORCE_FALLBACK"
CUDA_MODULE = "selective_scan_cuda"
CUDA_SOURCES = "csrc/selective_scan/cuda"

NATIVE_LIBRARY = "kernels.cpu.so"  # a dot in its stem: nothing that walks the package takes it for a module
NATIVE_SOURCES = ["csrc/cpu/*.cpp", "csrc/common/isa_*.cpp"]  # common: causal-conv1d/csrc/cpu
NATIVE_INCLUDES = ["csrc/cpu", "csrc/common"]
# -ffast-math must never be among them: it deletes the range reduction of the exponential.
NATIVE_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
NATIVE_FLAGS += ["-fno-exceptions", "-fno-rtti", "-w"]  # gcc 12 warns about its own AVX-512 header


class BuildError(Exception):
    """Why an extension is not compiled, as a clause."""


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


def cuda_build() -> tuple[list[Any], dict[str, type]]:
    """The CUDA extension and the command that compiles it, as `setup` takes them.

    Language standard, ABI and architectures are torch's choice, so that they suit its headers.

    Raises:
        BuildError: it is switched off, or something that it needs is missing.
    """
    if skip := skip_switch():
        over = f", which wins over {SWITCHES}_FORCE_BUILD" if switched_on(f"{SWITCHES}_FORCE_BUILD") else ""
        raise BuildError(f"{skip} was set when it was installed{over}")
    sources = sorted(f"{CUDA_SOURCES}/{path.name}" for path in Path(CUDA_SOURCES).glob("*.c*") if path.suffix != ".cuh")
    if not sources:
        raise BuildError("this version has no CUDA kernels")
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        raise BuildError(
            f"torch could not be imported to build it ({error}), which pip's --no-build-isolation mends"
        ) from error
    if torch.version.cuda is None:
        raise BuildError(f"torch {torch.__version__} was built without CUDA")
    if cpp_extension.CUDA_HOME is None:
        raise BuildError(f"nvcc {torch.version.cuda} was not found, neither on PATH nor in CUDA_HOME")
    if not (torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST")):
        raise BuildError("there is no GPU to compile for and TORCH_CUDA_ARCH_LIST names none")

    class BuildCuda(cpp_extension.BuildExtension):
        """Compiles, and steps down to an installation without the extension where that fails."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # compilers and torch's checks fail in many types
                print(f"{CUDA_MODULE}: {error}")
                left_out["cuda"] = "its compilation failed; pip install -v shows the compiler's output"
                refuse_if_forced()
                self.extensions.clear()

    return [cpp_extension.CUDAExtension(CUDA_MODULE, sources)], {"build_ext": BuildCuda}


def native_sources() -> list[str]:
    return [path for pattern in NATIVE_SOURCES for path in sorted(glob(pattern))]


def build_native(folder: Path) -> None:
    """Compile the CPU kernels into one library in `folder`, for whatever Python and torch will load it.

    Each source holds the kernels of one instruction set and says so itself; the machine that runs them chooses.

    Raises:
        BuildError: it is switched off, or cannot be compiled. No library of an earlier build is left then.
    """
    library = folder / NATIVE_LIBRARY
    library.unlink(missing_ok=True)
    if switched_on(FALLBACK):
        raise BuildError(f"{FALLBACK} was set when it was installed")
    if os.name != "posix":
        raise BuildError("its kernels compile on Linux and macOS only")
    sources = native_sources()
    if not sources:
        raise BuildError("the sources of its kernels are missing; install it from a whole checkout")
    compiler = new_compiler()
    customize_compiler(compiler)
    with TemporaryDirectory() as objects:
        try:
            compiled = compiler.compile(sources, objects, include_dirs=NATIVE_INCLUDES, extra_postargs=NATIVE_FLAGS)
            compiler.link_shared_object(compiled, str(library), target_lang="c++")
        except Exception as error:  # of a class that depends on the version of setuptools
            library.unlink(missing_ok=True)
            raise BuildError(
                f"no C++ compiler could build its kernels ({error}); pip install -v shows its output"
            ) from error


def refuse_if_forced() -> None:
    if cuda_is_forced() and "cuda" in left_out:
        raise SystemExit(
            f"error: {SWITCHES}_FORCE_BUILD is set and the CUDA extension of {PACKAGE} cannot be built: "
            f"{left_out['cuda']}."
        )


class BuildPackage(build_py):
    """Copies the package and tells, in it and on the screen, which backends it comes without."""

    def run(self) -> None:
        refuse_if_forced()
        if self.distribution.ext_modules:
            self.run_command("build_ext")
        super().run()
        folder = HERE if getattr(self, "editable_mode", False) else Path(self.build_lib)
        try:
            build_native(folder / PACKAGE)
        except BuildError as error:
            left_out["native"] = str(error)
        for backend, reason in left_out.items():
            print(f"{PACKAGE} comes without its {backend} backend: {reason}. The others take its place.")
        (folder / PACKAGE / "_build.py").write_text(
            '"""Written by setup.py: the backends that this installation comes without, and why."""\n\n'
            f"REASONS: dict[str, str] = {left_out!r}\n",
            encoding="utf-8",
        )


class BinaryDistribution(Distribution):
    """A distribution whose wheel belongs to one platform, because of its compiled library."""

    def has_ext_modules(self) -> bool:
        return bool(self.ext_modules) or (bool(native_sources()) and not switched_on(FALLBACK))


os.chdir(HERE)  # setuptools looks for the package in the working directory
left_out: dict[str, str] = {}
extensions: list[Any] = []
commands: dict[str, type] = {"build_py": BuildPackage}
try:
    extensions, cuda_commands = cuda_build()
    commands.update(cuda_commands)
except BuildError as error:
    left_out["cuda"] = str(error)

setup(
    name=PACKAGE,
    version=version(),
    description="The selective scan, Mamba and Vision Mamba blocks, on any device that PyTorch runs on",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={PACKAGE: ["py.typed"]},
    ext_modules=extensions,
    distclass=BinaryDistribution,
    cmdclass=commands,
    python_requires=">=3.10",
    install_requires=["torch>=2.4"],
)
