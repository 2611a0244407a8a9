"""What each package's setup.py builds, for every switch, with and without what a CUDA build needs."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from causal_conv1d.backend.native import Library

ROOT = Path(__file__).resolve().parents[2]


class Package(NamedTuple):
    folder: str
    name: str
    version: str
    switches: str  # the prefix of upstream's variables
    fallback: str
    cuda_module: str
    cuda_sources: str


PACKAGES = [
    Package(
        *("causal-conv1d", "causal_conv1d", "1.4.0"),
        *("CAUSAL_CONV1D", "CAUSAL_CONV1D_FORCE_FALLBACK", "causal_conv1d_cuda", "csrc/cuda"),
    ),
    Package(
        *("mamba-1p1p1", "mamba_ssm", "1.1.1"),
        *("MAMBA", "SELECTIVE_SCAN_FORCE_FALLBACK", "selective_scan_cuda", "csrc/selective_scan/cuda"),
    ),
]

# Stands in for torch: a CUDA build of it, with a GPU, whose compiler is scripted by the test.
TORCH = """
from types import SimpleNamespace
__version__ = "2.99.0"
version = SimpleNamespace(cuda={cuda!r})
cuda = SimpleNamespace(is_available=lambda: {gpu!r})
"""
CPP_EXTENSION = """
from pathlib import Path
from setuptools import Extension
from setuptools.command.build_ext import build_ext
CUDA_HOME = {cuda_home!r}
CUDAExtension = Extension
class BuildExtension(build_ext):
    def build_extensions(self):
        if {broken!r}:
            raise RuntimeError("cc1plus was killed")
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("compiled from " + " ".join(extension.sources))
"""


@pytest.fixture(params=PACKAGES, ids=lambda package: package.name)
def package(request: pytest.FixtureRequest) -> Package:
    return request.param


@pytest.fixture
def source(package: Package, tmp_path: Path) -> Path:
    """A copy of the package's folder, in a path with a space, as a checkout has it."""
    ignored = shutil.ignore_patterns("build", "dist", "csrc", "*.egg-info", "__pycache__", "_build.py", ".*")
    return Path(shutil.copytree(ROOT / package.folder, tmp_path / "a checkout" / package.folder, ignore=ignored))


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on `command`, with no build variable set but those that are given."""
    prefixes = (
        "CAUSAL_CONV1D_",
        "MAMBA_",
        "SELECTIVE_SCAN_",
        "CUDA_HOME",
        "TORCH_CUDA_ARCH_LIST",
        "PYTHONPATH",
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def build_wheel(source: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run("setup.py", "-q", "bdist_wheel", cwd=source, **variables)


def left_out(source: Path) -> dict[str, str]:
    """What the only wheel in dist/ says that it comes without."""
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/_build.py"))
        namespace: dict[str, dict[str, str]] = {}
        exec(archive.read(name), namespace)  # a file that this test has just made
    return namespace["REASONS"]


def add_cuda(source: Path, package: Package, **traits: object) -> dict[str, str]:
    """Give the copy a CUDA source and a stand-in torch; returns the variables that make the build find it."""
    sources = source / package.cuda_sources
    sources.mkdir(parents=True)
    for name in ("kernel.cu", "binding.cpp", "kernel.cuh"):
        (sources / name).write_text("")
    traits = {"cuda": "13.0", "gpu": True, "cuda_home": "/cuda", "broken": False, **traits}
    modules = source.parent / "modules" / "torch"
    (modules / "utils").mkdir(parents=True)
    (modules / "__init__.py").write_text(TORCH.format(**traits))
    (modules / "utils" / "__init__.py").write_text("")
    (modules / "utils" / "cpp_extension.py").write_text(CPP_EXTENSION.format(**traits))
    return {"PYTHONPATH": str(modules.parent)}


def test_the_wheel_is_pure_and_complete_and_says_what_it_lacks(source: Path, package: Package) -> None:
    result = build_wheel(source)
    assert result.returncode == 0, result.stderr
    assert f"{package.name} comes without its cuda backend: this version has no CUDA kernels." in result.stdout
    assert set(left_out(source)) == {"cuda", "native"}
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name == f"{package.name}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"{package.name}-{package.version}.dist-info/METADATA").decode()
    modules = {path.relative_to(source).as_posix() for path in (source / package.name).rglob("*.py")}
    assert modules <= set(names)
    assert f"{package.name}/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert "Requires-Python: >=3.10" in metadata
    requirements = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert requirements == ["Requires-Dist: torch>=2.4"]


def test_setup_works_from_any_folder(source: Path, package: Package, tmp_path: Path) -> None:
    result = run(source / "setup.py", "--version", cwd=tmp_path)
    assert result.stdout.split() == [package.version], result.stderr


def test_setup_needs_neither_torch_nor_wheel_to_be_read(source: Path, package: Package, tmp_path: Path) -> None:
    for name in ("torch", "wheel"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('kept away by the test')")
    result = run("setup.py", "--version", cwd=source, PYTHONPATH=str(tmp_path))
    assert result.stdout.split() == [package.version], result.stderr


def test_the_local_version_is_appended(source: Path, package: Package) -> None:
    result = run("setup.py", "--version", cwd=source, **{f"{package.switches}_LOCAL_VERSION": "cpu.1"})
    assert result.stdout.split() == [f"{package.version}+cpu.1"], result.stderr


@pytest.mark.parametrize("value", ["TRUE", "on"])
def test_the_fallback_switch_compiles_nothing(source: Path, package: Package, value: str) -> None:
    variables = add_cuda(source, package)
    result = build_wheel(source, **variables, **{package.fallback: value})
    assert result.returncode == 0, result.stderr
    assert left_out(source) == dict.fromkeys(("native", "cuda"), f"{package.fallback} was set when it was installed")


@pytest.mark.parametrize("skip", ["fallback", "SKIP_CUDA_BUILD"])
def test_skipping_wins_over_forcing_and_says_so(source: Path, package: Package, skip: str) -> None:
    variables = add_cuda(source, package)
    switch = package.fallback if skip == "fallback" else f"{package.switches}_{skip}"
    forced = {f"{package.switches}_FORCE_BUILD": "TRUE", f"{package.switches}_FORCE_CXX11_ABI": "TRUE"}
    result = build_wheel(source, **variables, **forced, **{switch: "TRUE"})
    assert result.returncode == 0, result.stderr
    expected = f"{switch} was set when it was installed, which wins over {package.switches}_FORCE_BUILD"
    assert left_out(source)["cuda"] == expected
    assert [path.name for path in (source / "dist").iterdir()] == [f"{package.name}-{package.version}-py3-none-any.whl"]


def test_forcing_a_build_that_cannot_be_is_an_error(source: Path, package: Package) -> None:
    result = build_wheel(source, **{f"{package.switches}_FORCE_BUILD": "TRUE"})
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        f"error: {package.switches}_FORCE_BUILD is set and the CUDA extension of {package.name} "
        "cannot be built: this version has no CUDA kernels."
    )
    assert not list(source.glob("dist/*"))


def test_other_values_switch_nothing_on(source: Path, package: Package) -> None:
    off = {f"{package.switches}_FORCE_BUILD": "FALSE", package.fallback: "0"}
    assert build_wheel(source, **off).returncode == 0
    assert left_out(source)["native"].startswith("the sources of its kernels are missing")


@pytest.mark.parametrize(
    ("traits", "reason"),
    [
        ({"cuda": None}, "torch 2.99.0 was built without CUDA"),
        ({"cuda_home": None}, "nvcc 13.0 was not found, neither on PATH nor in CUDA_HOME"),
        ({"gpu": False}, "there is no GPU to compile for and TORCH_CUDA_ARCH_LIST names none"),
        ({"broken": True}, "its compilation failed; pip install -v shows the compiler's output"),
    ],
    ids=["torch-without-cuda", "no-nvcc", "no-gpu", "compiler-fails"],
)
def test_a_cuda_build_steps_down_unless_it_is_forced(
    source: Path, package: Package, traits: dict[str, object], reason: str
) -> None:
    variables = add_cuda(source, package, **traits)
    result = build_wheel(source, **variables)
    assert result.returncode == 0, result.stderr
    assert left_out(source)["cuda"] == reason
    forced = build_wheel(source, **variables, **{f"{package.switches}_FORCE_BUILD": "1"})
    assert forced.returncode == 1
    assert forced.stderr.strip().splitlines()[-1].endswith(f"cannot be built: {reason}.")


def test_without_torch_there_is_no_cuda_build(source: Path, package: Package) -> None:
    """As under pip's build isolation."""
    variables = add_cuda(source, package)
    (source.parent / "modules" / "torch" / "__init__.py").write_text("raise ImportError('no torch here')")
    assert build_wheel(source, **variables).returncode == 0
    assert "(no torch here), which pip's --no-build-isolation mends" in left_out(source)["cuda"]


def test_a_cuda_build_puts_the_extension_into_the_wheel(source: Path, package: Package) -> None:
    variables = add_cuda(source, package)
    result = build_wheel(source, **variables, **{f"{package.switches}_FORCE_BUILD": "TRUE"})
    assert result.returncode == 0, result.stderr
    assert set(left_out(source)) == {"native"}
    (wheel,) = (source / "dist").glob("*.whl")
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (module,) = (name for name in archive.namelist() if Path(name).name.startswith(package.cuda_module))
        made_of = archive.read(module).decode()
    assert made_of == f"compiled from {package.cuda_sources}/binding.cpp {package.cuda_sources}/kernel.cu"


def test_an_editable_build_notes_in_the_checkout(source: Path, package: Package, tmp_path: Path) -> None:
    program = "import sys, setuptools.build_meta as backend; print(backend.build_editable(sys.argv[1]))"
    result = run("-c", program, tmp_path, cwd=source)
    assert result.returncode == 0, result.stderr
    assert "this version has no CUDA kernels" in (source / package.name / "_build.py").read_text()


def test_the_source_archive_can_be_built_again(source: Path, package: Package) -> None:
    (source / package.name / "_build.py").write_text("REASONS = {'cuda': 'of another machine'}")
    assert run("setup.py", "-q", "sdist", cwd=source).returncode == 0
    (archive,) = (source / "dist").glob("*.tar.gz")
    assert run("-m", "tarfile", "-e", archive, source.parent / "unpacked", cwd=source).returncode == 0
    (unpacked,) = (source.parent / "unpacked").iterdir()
    assert not (unpacked / package.name / "_build.py").exists()
    assert build_wheel(unpacked).returncode == 0
    assert left_out(unpacked)["cuda"] == "this version has no CUDA kernels"


def test_pip_builds_it_without_isolation_or_network(source: Path, package: Package, tmp_path: Path) -> None:
    if run("-m", "pip", "--version", cwd=tmp_path).returncode != 0:
        pytest.skip("this environment has no pip")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path / "wheels")
    result = run("-m", "pip", "wheel", *options, source, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == [
        f"{package.name}-{package.version}-py3-none-any.whl"
    ]


# --- the compiled CPU kernels ---------------------------------------------------------------------------------------


@pytest.fixture
def whole_source(package: Package, source: Path) -> Path:
    """`source` with the C++ sources of its CPU kernels."""
    shutil.copytree(ROOT / package.folder / "csrc", source / "csrc")
    return source


def libraries(source: Path) -> list[str]:
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
def test_the_kernels_are_compiled_into_the_wheel_without_torch(whole_source: Path, package: Package) -> None:
    """As under pip's build isolation."""
    (whole_source / "torch.py").write_text("raise ImportError('kept away by the test')")
    result = build_wheel(whole_source, PYTHONPATH=str(whole_source))
    assert result.returncode == 0, result.stderr
    assert libraries(whole_source) == [f"{package.name}/kernels.cpu.so"]
    assert set(left_out(whole_source)) == {"cuda"}


def test_without_a_compiler_the_package_is_built_without_kernels(whole_source: Path, package: Package) -> None:
    result = build_wheel(whole_source, CC="no-such-compiler", CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    assert libraries(whole_source) == []
    assert left_out(whole_source)["native"].startswith("no C++ compiler could build its kernels")
    assert f"{package.name} comes without its native backend: no C++ compiler" in result.stdout


def test_the_fallback_switch_removes_kernels_of_an_earlier_build(whole_source: Path, package: Package) -> None:
    stale = whole_source / package.name / "kernels.cpu.so"
    stale.write_text("of another time")
    program = "import sys, setuptools.build_meta as backend; print(backend.build_editable(sys.argv[1]))"
    result = run("-c", program, whole_source.parent, cwd=whole_source, **{package.fallback: "1"})
    assert result.returncode == 0, result.stderr
    assert not stale.exists()


# The header of an ELF file whose table of 3 sections, 64 bytes each, starts at byte 10,000.
CUT_SHORT = struct.pack("<4sBB34xQ10xHH2x", b"\x7fELF", 2, 1, 10_000, 64, 3).ljust(5000, b"\0")


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"not a library", "cannot be loaded"), (CUT_SHORT, "cut short"), (CUT_SHORT[:9], "cut short"), (None, "")],
    ids=["broken", "cut", "cut in the header", "none"],
)
def test_a_library_that_cannot_be_loaded_is_a_reason_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, reason: str
) -> None:
    folder = tmp_path / "package_of_the_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    if content is not None:
        (folder / "kernels.cpu.so").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    missing = Library("package_of_the_test").missing
    assert missing is not None
    assert reason in missing
