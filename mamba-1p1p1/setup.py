"""Build mamba_ssm: the Python package always, its CUDA extension where that can be compiled.

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
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PACKAGE = "mamba_ssm"
SWITCHES = "MAMBA"
FALLBACK = "SELECTIVE_SCAN_FORCE_FALLBACK"
CUDA_MODULE = "selective_scan_cuda"
CUDA_SOURCES = "csrc/selective_scan/cuda"


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
        for backend, reason in left_out.items():
            print(f"{PACKAGE} comes without its {backend} backend: {reason}. The others take its place.")
        folder = HERE if getattr(self, "editable_mode", False) else Path(self.build_lib)
        (folder / PACKAGE / "_build.py").write_text(
            '"""Written by setup.py: the backends that this installation comes without, and why."""\n\n'
            f"REASONS: dict[str, str] = {left_out!r}\n",
            encoding="utf-8",
        )


os.chdir(HERE)  # setuptools looks for the package in the working directory
left_out = {"native": "this version has no C++ kernels"}
if switched_on(FALLBACK):
    left_out["native"] = f"{FALLBACK} was set when it was installed"
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
    cmdclass=commands,
    python_requires=">=3.10",
    install_requires=["torch>=2.4"],
)
