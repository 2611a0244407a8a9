"""What each package's setup.py builds, for every switch, with and without what a CUDA build needs."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from causal_conv1d.backend.cuda import CudaLibrary
from causal_conv1d.backend.native import CompiledLibrary, Library

ROOT = Path(__file__).resolve().parents[2]


class Package(NamedTuple):
    folder: str
    name: str
    version: str
    switches: str  # the prefix of upstream's variables
    fallback: str
    cuda_module: str
    cuda_sources: str
    cuda_shared: str  # where the headers of both packages are
    more: frozenset[str] = frozenset()  # the parts that it builds beside its cuda and native kernels

    def parts(self, *backends: str) -> set[str]:
        """These backends, and whatever else it comes without where the tests' machine has nothing for it."""
        return {*backends, *self.more}


PACKAGES = [
    Package(
        *("causal-conv1d", "causal_conv1d", "1.4.0"),
        *("CAUSAL_CONV1D", "CAUSAL_CONV1D_FORCE_FALLBACK", "causal_conv1d_cuda", "csrc/cuda", "csrc/cuda"),
    ),
    Package(
        *("mamba-1p1p1", "mamba_ssm", "1.1.1"),
        *("MAMBA", "SELECTIVE_SCAN_FORCE_FALLBACK", "selective_scan_cuda"),
        *("csrc/selective_scan/cuda", "csrc/selective_scan/common", frozenset({"onnxruntime"})),
    ),
]

# Stands in for nvcc: notes its arguments, one to a line and a blank line after them, and writes what it is to write.
NVCC = """#!/bin/sh
printf '%s\\n' "$@" '' >> "{log}"
case " $* " in *" --list-gpu-code "*) printf 'sm_%s\\n' {codes}; exit 0;; esac
for argument; do
    if [ "$before" = -o ]; then target=$argument; fi
    before=$argument
done
case " $* " in *" {fails_at} "*) printf half > "$target"; printf '%s\\n' '{complaint}'; exit 1;; esac
{meanwhile}
printf 'library of %s' "$*" > "$target"
"""
NVIDIA_SMI = """#!/bin/sh
printf '{cards}'
exit {status}
"""
# Lets the build find no other nvcc than those of the test, wherever this machine has one.
SITECUSTOMIZE = """
import os, shutil
which = shutil.which
def which_of_the_test(name, mode=os.F_OK | os.X_OK, path=None):
    if name == "nvcc":
        path = os.pathsep.join(folder for folder in path.split(os.pathsep) if folder.startswith({root!r}))
    return which(name, mode, path)
shutil.which = which_of_the_test
"""
BUILD_EDITABLE = "import sys, setuptools.build_meta as backend; print(backend.build_editable(sys.argv[1]))"
NO_HEADERS = {"ONNXRUNTIME_INCLUDE": "/no/headers"}  # whether this machine has them or not
MISSING = "the sources of its kernels are missing; install it from a whole checkout"


@pytest.fixture(params=PACKAGES, ids=lambda package: package.name)
def package(request: pytest.FixtureRequest) -> Package:
    return request.param


@pytest.fixture
def source(package: Package, tmp_path: Path) -> Path:
    """A copy of the package's folder, in a path with a space, as a checkout has it."""
    ignored = shutil.ignore_patterns("build", "dist", "csrc", "*.egg-info", "__pycache__", "_build.py", "*.so", ".*")
    return Path(shutil.copytree(ROOT / package.folder, tmp_path / "a checkout" / package.folder, ignore=ignored))


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python on `command`, with no build variable set but those that are given."""
    prefixes = (
        "CAUSAL_CONV1D_",
        "MAMBA_",
        "SELECTIVE_SCAN_",
        "CUDA",
        "NVCC_",
        "TORCH_CUDA_ARCH_LIST",
        "MAX_JOBS",
        "PYTHONPATH",
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**inherited, **NO_HEADERS, **variables},
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


class Toolkit(NamedTuple):
    """A stand-in for a CUDA toolkit and a driver, and the variables that make a build find nothing else."""

    nvcc: Path
    log: Path
    variables: dict[str, str]

    def calls(self) -> list[list[str]]:
        return [call.splitlines() for call in self.log.read_text().split("\n\n") if call]

    def compilations(self) -> list[list[str]]:
        return [call for call in self.calls() if "-c" in call]


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def add_sources(source: Path, package: Package, **files: str) -> None:
    """Give the copy CUDA sources, and their common headers through a link as in the repository."""
    folder = source / package.cuda_sources
    folder.mkdir(parents=True)
    shared = source.parent / "causal-conv1d" / "csrc" / "cuda"
    if shared != folder:
        shared.mkdir(parents=True)
        (source / package.cuda_shared).symlink_to(os.path.relpath(shared, folder.parent), target_is_directory=True)
    for name, text in (files or {"first": "", "second": ""}).items():
        (folder / f"{name}.cu").write_text(text)
    (folder / "own.cuh").write_text("")
    (shared / "shared.cuh").write_text("#define ANSWER 42\n")
    (source / f"{package.cuda_module}.py").write_text("")


def add_cuda(source: Path, package: Package, **traits: object) -> Toolkit:
    """Give the copy CUDA sources, a toolkit and GPUs, of which `traits` may change any.

    codes: what nvcc compiles for. cards: what nvidia-smi prints, `status`: with which exit status.
    fails_at: the argument at which nvcc fails, with `complaint`. meanwhile: shell commands that nvcc runs.
    """
    add_sources(source, package)
    root = source.parent / "a machine"
    traits = {"codes": "75 80 90 110 103 120", "cards": "9.0\\n", "status": 0, **traits}
    traits = {"fails_at": "(never)", "complaint": "", "meanwhile": ":", "log": root / "log", **traits}
    nvcc = root / "cuda" / "bin" / "nvcc"
    write_program(nvcc, NVCC.format(**traits))
    write_program(root / "bin" / "nvidia-smi", NVIDIA_SMI.format(**traits))
    (root / "modules").mkdir()
    (root / "modules" / "sitecustomize.py").write_text(SITECUSTOMIZE.format(root=str(root)))
    variables = {"PATH": str(root / "bin"), "PYTHONPATH": str(root / "modules"), "CUDA_HOME": str(root / "cuda")}
    return Toolkit(nvcc, root / "log", variables)


def test_the_wheel_is_pure_and_complete_and_says_what_it_lacks(source: Path, package: Package) -> None:
    result = build_wheel(source)
    assert result.returncode == 0, result.stderr
    assert f"{package.name} comes without its cuda backend: {MISSING}." in result.stdout
    assert set(left_out(source)) == package.parts("cuda", "native")
    (wheel,) = (source / "dist").glob("*.whl")
    assert wheel.name == f"{package.name}-{package.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"{package.name}-{package.version}.dist-info/METADATA").decode()
    modules = {path.relative_to(source).as_posix() for path in (source / package.name).rglob("*.py")}
    assert modules | {f"{package.cuda_module}.py"} <= set(names)
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
    toolkit = add_cuda(source, package)
    result = build_wheel(source, **toolkit.variables, **{package.fallback: value})
    assert result.returncode == 0, result.stderr
    reason = f"{package.fallback} was set when it was installed"
    assert left_out(source) == dict.fromkeys(package.parts("native", "cuda"), reason)
    assert not toolkit.log.exists()


@pytest.mark.parametrize("skip", ["fallback", "SKIP_CUDA_BUILD"])
def test_skipping_wins_over_forcing_and_says_so(source: Path, package: Package, skip: str) -> None:
    variables = add_cuda(source, package).variables
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
        f"error: {package.switches}_FORCE_BUILD is set and the CUDA kernels of {package.name} "
        f"cannot be built: {MISSING}."
    )
    assert not list(source.glob("dist/*"))


def test_other_values_switch_nothing_on(source: Path, package: Package) -> None:
    off = {f"{package.switches}_FORCE_BUILD": "FALSE", package.fallback: "0"}
    assert build_wheel(source, **off).returncode == 0
    assert left_out(source) == dict.fromkeys(package.parts("cuda", "native"), MISSING)


def test_an_editable_build_notes_in_the_checkout(source: Path, package: Package, tmp_path: Path) -> None:
    result = run("-c", BUILD_EDITABLE, tmp_path, cwd=source)
    assert result.returncode == 0, result.stderr
    assert MISSING in (source / package.name / "_build.py").read_text()


def test_the_source_archive_can_be_built_again(source: Path, package: Package) -> None:
    (source / package.name / "_build.py").write_text("REASONS = {'cuda': 'of another machine'}")
    assert run("setup.py", "-q", "sdist", cwd=source).returncode == 0
    (archive,) = (source / "dist").glob("*.tar.gz")
    assert run("-m", "tarfile", "-e", archive, source.parent / "unpacked", cwd=source).returncode == 0
    (unpacked,) = (source.parent / "unpacked").iterdir()
    assert not (unpacked / package.name / "_build.py").exists()
    assert build_wheel(unpacked).returncode == 0
    assert left_out(unpacked)["cuda"] == MISSING


def test_pip_builds_it_without_isolation_or_network(source: Path, package: Package, tmp_path: Path) -> None:
    if run("-m", "pip", "--version", cwd=tmp_path).returncode != 0:
        pytest.skip("this environment has no pip")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path / "wheels")
    result = run("-m", "pip", "wheel", *options, source, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == [
        f"{package.name}-{package.version}-py3-none-any.whl"
    ]


# --- the compiled CUDA kernels --------------------------------------------------------------------------------------


def generated(*codes: str) -> list[str]:
    """nvcc's options for "80", and for "90+PTX"."""
    pairs = [(code.removesuffix("+PTX"), code.endswith("+PTX")) for code in codes]
    return [f"-gencode=arch=compute_{n},code={f'[sm_{n},compute_{n}]' if ptx else f'sm_{n}'}" for n, ptx in pairs]


def test_a_cuda_build_puts_its_library_into_the_wheel(source: Path, package: Package) -> None:
    toolkit = add_cuda(source, package)
    result = build_wheel(source, **toolkit.variables, **{f"{package.switches}_FORCE_BUILD": "TRUE"})
    assert result.returncode == 0, result.stderr
    assert set(left_out(source)) == package.parts("native")
    (wheel,) = (source / "dist").glob("*.whl")
    assert not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        made = archive.read(f"{package.name}/kernels.cuda.so").decode()
    assert f"{package.cuda_module}.py" in names
    assert not [name for name in names if name.endswith(".o")]
    assert "-shared" in made
    assert "-cudart=static" in made
    compilations = toolkit.compilations()
    compiled = {call[call.index("-c") + 1] for call in compilations}
    assert compiled == {f"{package.cuda_sources}/{name}.cu" for name in ("first", "second")}
    for call in compilations:
        assert call[call.index("-o") + 1] in made.split()
        assert {"-O3", "-std=c++17", f"-I{package.cuda_sources}", f"-I{package.cuda_shared}"} <= set(call)
        assert not [argument for argument in call if "fast" in argument]
        assert [argument for argument in call if "gencode" in argument] == generated("90+PTX")


def test_an_editable_cuda_build_leaves_its_library_in_the_checkout(
    source: Path, package: Package, tmp_path: Path
) -> None:
    toolkit = add_cuda(source, package)
    before = set(os.listdir(source / package.name))
    result = run("-c", BUILD_EDITABLE, tmp_path, cwd=source, **toolkit.variables)
    assert result.returncode == 0, result.stderr
    assert set(os.listdir(source / package.name)) - before == {"kernels.cuda.so", "_build.py"}
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    find = "import site, sys, importlib.util as i; site.addsitedir('site'); print(i.find_spec(sys.argv[1]).origin)"
    result = run("-S", "-c", find, package.cuda_module, cwd=tmp_path)  # -S: not one that is installed here
    assert Path(result.stdout.strip()) == source / f"{package.cuda_module}.py", result.stderr


@pytest.mark.parametrize(
    ("listed", "cards", "expected"),
    [
        ("8.0;9.0+PTX", "", ["80", "90+PTX"]),
        (" 7.5 9.0a; ", "8.0", ["75", "90a"]),
        ("8.0 8.0+PTX", "", ["80+PTX"]),
        ("All", "8.0", ["75", "80", "90", "103", "110", "120+PTX"]),
        (None, "12.0\\n8.0\\n12.0\\n", ["80", "120+PTX"]),
        ("", "9.0", ["90+PTX"]),
    ],
    ids=["listed", "spaces", "twice", "all", "cards", "empty"],
)
def test_it_compiles_for_what_is_listed_or_else_for_the_cards(
    source: Path, package: Package, listed: str | None, cards: str, expected: list[str]
) -> None:
    toolkit = add_cuda(source, package, cards=cards)
    variables = {} if listed is None else {"TORCH_CUDA_ARCH_LIST": listed}
    assert build_wheel(source, **toolkit.variables, **variables).returncode == 0
    assert set(left_out(source)) == package.parts("native")
    for call in toolkit.compilations():
        assert [argument for argument in call if "gencode" in argument] == generated(*expected)


def test_a_forced_build_needs_no_card(source: Path, package: Package) -> None:
    toolkit = add_cuda(source, package, codes="120 75", status=9)
    result = build_wheel(source, **toolkit.variables, **{f"{package.switches}_FORCE_BUILD": "1"})
    assert result.returncode == 0, result.stderr
    assert set(generated("75", "120+PTX")) <= set(toolkit.compilations()[0])


UNSUPPORTED = (
    "host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!"
)
NO_CARD = "there is no GPU to compile for and TORCH_CUDA_ARCH_LIST names none"
TOOLKIT = {"codes": "50 80 90"}


@pytest.mark.parametrize(
    ("traits", "variables", "reason"),
    [
        ({"cards": ""}, {}, NO_CARD),
        ({"cards": "NVIDIA-SMI has failed"}, {}, NO_CARD),
        ({}, {"PATH": ""}, NO_CARD),
        ({"cards": ""}, {"CUDA_HOME": ""}, NO_CARD),
        ({"status": 9}, {"TORCH_CUDA_ARCH_LIST": " ; "}, NO_CARD),
        *(
            ({}, {"TORCH_CUDA_ARCH_LIST": f"8.0 {name}"}, f"TORCH_CUDA_ARCH_LIST has {name!r} in it and must be like ")
            for name in ("Hopper", "8.0,9.0", "90", "8.0+ptx")
        ),
        (
            TOOLKIT,
            {"TORCH_CUDA_ARCH_LIST": "9.0;12.0"},
            "TORCH_CUDA_ARCH_LIST asks for architecture 12.0 and {nvcc} compiles only for 8.0, 9.0; "
            "install CUDA 12.8 or newer, or set TORCH_CUDA_ARCH_LIST=9.0+PTX",
        ),
        (
            {**TOOLKIT, "cards": "15.0"},
            {},
            "the GPU here is of architecture 15.0 and {nvcc} compiles only for 8.0, 9.0; "
            "install a newer CUDA toolkit, or set TORCH_CUDA_ARCH_LIST=9.0+PTX",
        ),
        (
            {"cards": "6.1"},
            {},
            "the GPU here is of architecture 6.1 and its kernels need 7.5 or newer "
            "({nvcc} compiles for 7.5, 8.0, 9.0, 10.3, 11.0, 12.0)",
        ),
        (
            {"fails_at": "-c", "complaint": "first\nk.cu(3): error: no such thing\nk.cu(4): error: another"},
            {},
            "{nvcc} failed (k.cu(3): error: no such thing); pip install -v shows its output",
        ),
        ({"fails_at": "-shared"}, {}, "{nvcc} failed (it ended with status 1); pip install -v shows its output"),
        (
            {"fails_at": "-c", "complaint": UNSUPPORTED},
            {},
            f"{{nvcc}} failed ({UNSUPPORTED}); "
            "set NVCC_CCBIN or CUDAHOSTCXX to an older g++, or install a newer CUDA toolkit",
        ),
        (
            {"fails_at": "-c", "complaint": "nvcc error   : cicc died due to signal 9 (Kill signal)"},
            {},
            "{nvcc} failed (nvcc error   : cicc died due to signal 9 (Kill signal)); "
            "the memory is full; set MAX_JOBS=1",
        ),
    ],
    ids=[
        *("no card", "no word of cards", "no nvidia-smi", "no card or nvcc", "no driver", "by name", "commas"),
        *("no point", "small", "not known", "too new a card", "too old a card", "compiling fails", "linking fails"),
        *("too new a compiler", "out of memory"),
    ],
)
def test_a_cuda_build_steps_down_and_says_why(
    source: Path, package: Package, traits: dict[str, object], variables: dict[str, str], reason: str
) -> None:
    toolkit = add_cuda(source, package, **traits)
    stale = source / package.name / "kernels.cuda.so"
    stale.write_text("of another time")
    result = run("-c", BUILD_EDITABLE, source.parent, cwd=source, **{**toolkit.variables, **variables})
    assert result.returncode == 0, result.stderr
    (said,) = (line for line in result.stdout.splitlines() if "comes without its cuda" in line)
    assert said.startswith(f"{package.name} comes without its cuda backend: {reason.format(nvcc=toolkit.nvcc)}")
    assert said.endswith(". The others take its place.")
    assert not list((source / package.name).glob("kernels.*"))
    assert not list((source / package.name).glob("tmp*"))


@pytest.mark.parametrize("traits", [{"fails_at": "-c"}, {"codes": "50 80"}], ids=["compiling fails", "too new a card"])
def test_a_forced_cuda_build_fails_where_it_would_step_down(
    source: Path, package: Package, traits: dict[str, object]
) -> None:
    toolkit = add_cuda(source, package, **traits)
    result = build_wheel(source, **toolkit.variables, **{f"{package.switches}_FORCE_BUILD": "1"})
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {package.switches}_FORCE_BUILD is set and the CUDA kernels of {package.name} ")
    assert not list(source.glob("dist/*"))


def test_a_broken_nvcc_is_a_reason_not_a_crash(source: Path, package: Package) -> None:
    toolkit = add_cuda(source, package)
    toolkit.nvcc.write_text("#!/no/such/shell\n")
    assert build_wheel(source, **toolkit.variables).returncode == 0
    assert left_out(source)["cuda"].startswith(f"{toolkit.nvcc} cannot be started (")


def ask(source: Path, expression: str, **variables: str) -> str:
    """What an expression gives in setup.py, read without being run."""
    program = "import runpy, setuptools, sys; setuptools.setup = lambda **_: None; read = runpy.run_path('setup.py')"
    result = run("-c", f"{program}; print({expression})", cwd=source, **variables)
    return result.stdout.strip() or result.stderr.strip()


def test_where_nvcc_is_looked_for(source: Path, package: Package) -> None:
    """CUDA_HOME, CUDA_PATH, PATH, pip's own toolkits; torch is not asked, for pip's isolation hides it."""
    toolkit = add_cuda(source, package)
    root = toolkit.log.parent
    (root / "modules" / "torch.py").write_text("raise ImportError('kept away by the test')")
    places = [toolkit.nvcc, root / "other" / "bin" / "nvcc", root / "bin" / "nvcc"]
    places += [root / "modules" / "nvidia" / version / "bin" / "nvcc" for version in ("cu14", "cu13")]
    variables = {**toolkit.variables, "CUDA_PATH": str(root / "other")}
    for place in places[1:]:
        write_program(place, "#!/bin/sh\n")
    for place in places:
        assert ask(source, "read['find_nvcc']()", **variables) == str(place)
        place.chmod(0o644)
    assert build_wheel(source, **variables).returncode == 0
    assert left_out(source)["cuda"] == (
        "nvcc was not found; install a CUDA toolkit and set CUDA_HOME to its folder, or (CUDA 13) "
        "pip install nvidia-cuda-nvcc nvidia-cuda-cccl"
    )


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_cuda_kernels_are_for_linux(source: Path, package: Package, platform: str) -> None:
    variables = add_cuda(source, package).variables
    said = ask(source, f"setattr(sys, 'platform', {platform!r}) or read['build_cuda'](read['HERE'])", **variables)
    assert said.endswith("BuildError: its kernels compile on Linux only")


@pytest.mark.parametrize("name", ["NVCC_CCBIN", "CUDAHOSTCXX"])
def test_nvcc_is_given_the_host_compiler(source: Path, package: Package, name: str) -> None:
    toolkit = add_cuda(source, package)
    assert build_wheel(source, **toolkit.variables, **{name: "/opt/g++-12"}).returncode == 0
    built = [call for call in toolkit.calls() if "-o" in call]
    assert len(built) == 3
    assert all("-ccbin=/opt/g++-12" in call for call in built)


# Each compilation waits for the other to be running, for ten seconds at most.
TOGETHER = """case "$*" in *" -c "*) : > "$target.runs"; for turn in 0 1 2 3 4 5 6 7 8 9; do
    set -- "${target%/*}"/*.runs; [ $# = 2 ] && break; /bin/sleep 1; done; [ $# = 2 ] || exit 1;; esac"""
# Each fails if another is running.
ALONE = """case "$*" in *" -c "*)
    /bin/mkdir "${target%/*}/runs" || exit 1; /bin/sleep .1; /bin/rmdir "${target%/*}/runs";; esac"""


@pytest.mark.parametrize(("jobs", "meanwhile", "threads"), [("2", TOGETHER, 1), ("9", TOGETHER, 4), ("1", ALONE, 1)])
def test_as_many_compilations_run_at_a_time_as_max_jobs_says(
    source: Path, package: Package, jobs: str, meanwhile: str, threads: int
) -> None:
    toolkit = add_cuda(source, package, meanwhile=meanwhile)
    assert build_wheel(source, **toolkit.variables, MAX_JOBS=jobs).returncode == 0
    assert set(left_out(source)) == package.parts("native")
    assert all(f"--threads={threads}" in call for call in toolkit.compilations())


def test_the_source_archive_holds_the_cuda_sources_and_what_is_linked_to(source: Path, package: Package) -> None:
    add_sources(source, package)
    (source / package.name / "kernels.cuda.so").write_text("of this machine")
    assert run("setup.py", "-q", "sdist", cwd=source).returncode == 0
    (path,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    own = {f"{package.cuda_sources}/{name}" for name in ("first.cu", "second.cu", "own.cuh")}
    assert {*own, f"{package.cuda_shared}/shared.cuh", f"{package.cuda_module}.py"} <= files
    assert not [name for name in files if name.endswith(".so")]


KERNELS = """
#include "own.cuh"
#include "shared.cuh"
__global__ void fill(float* x) { x[threadIdx.x] = ANSWER; }
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
extern "C" __attribute__((visibility("default"))) int launch(float* x) {
    fill<<<1, 32>>>(x);
    return static_cast<int>(cudaGetLastError());
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here")
def test_nvcc_compiles_a_library_that_needs_nothing_but_the_driver(source: Path, package: Package) -> None:
    add_sources(source, package, kernels=KERNELS, more='extern "C" int hidden() { return 1; }')
    forced = {f"{package.switches}_FORCE_BUILD": "1", "TORCH_CUDA_ARCH_LIST": "8.0+PTX"}
    result = build_wheel(source, **forced)
    assert result.returncode == 0, result.stderr
    (built,) = (source / "build").glob(f"lib*/{package.name}/kernels.cuda.so")
    library = ctypes.CDLL(str(built))
    assert library.answer() == 42
    assert library.launch
    assert not hasattr(library, "hidden")
    assert not hasattr(library, "cudaGetLastError")  # that of torch and this one do not meet
    (source / package.cuda_sources / "more.cu").write_text("int broken = nothing;")
    failed = build_wheel(source, **forced)
    assert failed.returncode == 1
    assert "more.cu(1): error: " in failed.stderr.splitlines()[-1]
    assert not built.exists()


# --- the compiled CPU kernels ---------------------------------------------------------------------------------------


@pytest.fixture
def whole_source(package: Package, source: Path) -> Path:
    """`source` with the C++ sources of its CPU kernels."""
    shutil.copytree(ROOT / package.folder / "csrc", source / "csrc")
    return source


def without_cuda(package: Package) -> dict[str, str]:
    """The same build on a machine with a GPU as on one without."""
    return {f"{package.switches}_SKIP_CUDA_BUILD": "1"}


def libraries(source: Path) -> list[str]:
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
def test_the_kernels_are_compiled_into_the_wheel_without_torch(whole_source: Path, package: Package) -> None:
    """As under pip's build isolation."""
    (whole_source / "torch.py").write_text("raise ImportError('kept away by the test')")
    result = build_wheel(whole_source, PYTHONPATH=str(whole_source), **without_cuda(package))
    assert result.returncode == 0, result.stderr
    assert libraries(whole_source) == [f"{package.name}/kernels.cpu.so"]
    assert set(left_out(whole_source)) == package.parts("cuda")


def test_without_a_compiler_the_package_is_built_without_kernels(whole_source: Path, package: Package) -> None:
    result = build_wheel(whole_source, CC="no-such-compiler", CXX="no-such-compiler", **without_cuda(package))
    assert result.returncode == 0, result.stderr
    assert libraries(whole_source) == []
    assert left_out(whole_source)["native"].startswith("no C++ compiler could build its kernels")
    assert f"{package.name} comes without its native backend: no C++ compiler" in result.stdout


@pytest.mark.parametrize("kernels", ["kernels.cpu.so", "kernels.cuda.so"])
def test_the_fallback_switch_removes_kernels_of_an_earlier_build(
    whole_source: Path, package: Package, kernels: str
) -> None:
    stale = whole_source / package.name / kernels
    stale.write_text("of another time")
    result = run("-c", BUILD_EDITABLE, whole_source.parent, cwd=whole_source, **{package.fallback: "1"})
    assert result.returncode == 0, result.stderr
    assert not stale.exists()


# --- the operators for ONNX Runtime ---------------------------------------------------------------------------------

# Stand-ins for the kernels of one instruction set, for the library of the package, for the operators, for the headers.
ONNX_SOURCES = {
    "csrc/cpu/kernels.h": "int answer();\nint more();",
    "csrc/cpu/more.cpp": "#include <kernels.h>\nint more() { return 1000; }",
    "csrc/cpu/library.cpp": '#include <kernels.h>\nextern "C" EXPORT int native() { return answer(); }',
    "csrc/common/isa_generic.cpp": '#include <kernels.h>\nextern "C" EXPORT int once = 1; int answer() { return 42; }',
    "csrc/onnxruntime/op.cpp": """
#include <kernels.h>
#include <onnxruntime_c_api.h>
extern "C" EXPORT int RegisterCustomOps() { return answer() + more() + HEADER; }
""",
    "headers/onnxruntime_c_api.h": "#define HEADER 100",
}
EXPORT = '-DEXPORT=__attribute__((visibility("default")))'
COMPILER = """#!/bin/sh
printf '%s\\n' "$*" >> '{log}'
exec {program} '{flag}' "$@"
"""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
of_mamba = pytest.mark.parametrize("package", PACKAGES[1:], indirect=True)


@pytest.fixture
def onnx_build(package: Package, source: Path) -> dict[str, str]:
    """Give the copy small sources, and the variables with which they are built: with a compiler that keeps a log."""
    for name, text in ONNX_SOURCES.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    for name in ("cc", "c++"):
        found = shutil.which(name) or name
        write_program(source / name, COMPILER.format(log=source / "log", program=found, flag=EXPORT))
    compilers = {"CC": f"'{source}/cc'", "CXX": f"'{source}/c++'"}
    return {**without_cuda(package), **compilers, "ONNXRUNTIME_INCLUDE": str(source / "headers")}


@needs_compiler
@of_mamba
def test_the_operators_are_a_library_with_the_kernels_in_it(
    source: Path, package: Package, onnx_build: dict[str, str]
) -> None:
    result = build_wheel(source, **onnx_build)
    assert result.returncode == 0, result.stderr
    assert sorted(libraries(source)) == [f"{package.name}/kernels.{kind}.so" for kind in ("cpu", "onnxruntime")]
    assert set(left_out(source)) == {"cuda"}
    (built,) = (source / "build").glob(f"lib*/{package.name}/kernels.onnxruntime.so")
    library = ctypes.CDLL(str(built))
    assert library.RegisterCustomOps() == 1142
    assert not hasattr(library, "native")
    log = (source / "log").read_text().splitlines()
    assert len([line for line in log if "-c csrc/common/isa_generic.cpp" in line]) == 1


@needs_compiler
@of_mamba
def test_without_the_headers_the_operators_are_left_out_with_a_sentence(
    source: Path, package: Package, onnx_build: dict[str, str]
) -> None:
    result = build_wheel(source, **{**onnx_build, **NO_HEADERS})
    assert result.returncode == 0, result.stderr
    reason = "ONNXRUNTIME_INCLUDE is /no/headers and there is no onnxruntime_c_api.h in that folder"
    assert left_out(source)["onnxruntime"] == reason
    said = f"{package.name} comes without its operators for ONNX Runtime: {reason}. Exported files run without them."
    assert said in result.stdout.splitlines()
    assert libraries(source) == [f"{package.name}/kernels.cpu.so"]


@of_mamba
def test_where_the_headers_are_looked_for(source: Path, package: Package) -> None:
    """In the folder that is named, else where systems keep them."""
    places = [source / name for name in ("asked", "first", "second")]
    for place in places:
        place.mkdir()
    known = [str(place) for place in places[1:]]
    look = f"read['find_headers'].__globals__.update(ONNX_FOLDERS={known!r}) or read['find_headers']()"
    reason = (
        "onnxruntime_c_api.h was not found; install Debian's libonnxruntime-dev, "
        "or set ONNXRUNTIME_INCLUDE to its folder"
    )
    assert ask(source, look, ONNXRUNTIME_INCLUDE="").endswith(f"BuildError: {reason}")
    for place in reversed(places[1:]):
        (place / "onnxruntime_c_api.h").write_text("")
        assert ask(source, look, ONNXRUNTIME_INCLUDE=" ") == str(place)
    assert "there is no onnxruntime_c_api.h in that folder" in ask(source, look, ONNXRUNTIME_INCLUDE=str(places[0]))
    (places[0] / "onnxruntime_c_api.h").write_text("")
    assert ask(source, look, ONNXRUNTIME_INCLUDE=str(places[0])) == str(places[0])


@of_mamba
def test_without_native_kernels_there_are_no_operators(
    source: Path, package: Package, onnx_build: dict[str, str]
) -> None:
    stale = source / package.name / "kernels.onnxruntime.so"
    stale.write_text("of another time")
    broken = {**onnx_build, "CC": "no-such-compiler", "CXX": "no-such-compiler"}
    result = run("-c", BUILD_EDITABLE, source.parent, cwd=source, **broken)
    assert result.returncode == 0, result.stderr
    assert "ONNX Runtime: the native kernels, which it calls, were not built. Exported files run" in result.stdout
    assert not stale.exists()


@needs_compiler
@of_mamba
def test_operators_that_do_not_compile_leave_the_kernels(
    source: Path, package: Package, onnx_build: dict[str, str]
) -> None:
    (source / "headers" / "onnxruntime_c_api.h").write_text("#error of another kind\n")
    result = build_wheel(source, **onnx_build)
    assert result.returncode == 0, result.stderr
    assert libraries(source) == [f"{package.name}/kernels.cpu.so"]
    assert left_out(source)["onnxruntime"].startswith("no C++ compiler could build its kernels")


@of_mamba
def test_the_fallback_switch_removes_operators_of_an_earlier_build(
    source: Path, package: Package, onnx_build: dict[str, str]
) -> None:
    stale = source / package.name / "kernels.onnxruntime.so"
    stale.write_text("of another time")
    result = run("-c", BUILD_EDITABLE, source.parent, cwd=source, **onnx_build, **{package.fallback: "1"})
    assert result.returncode == 0, result.stderr
    assert f"ONNX Runtime: {package.fallback} was set when it was installed." in result.stdout
    assert not stale.exists()


# --- libraries that cannot be loaded --------------------------------------------------------------------------------

# The header of an ELF file whose table of 3 sections, 64 bytes each, starts at byte 10,000.
CUT_SHORT = struct.pack("<4sBB34xQ10xHH2x", b"\x7fELF", 2, 1, 10_000, 64, 3).ljust(5000, b"\0")


@pytest.mark.parametrize("kind", [Library, CudaLibrary])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"not a library", "cannot be loaded"), (CUT_SHORT, "cut short"), (CUT_SHORT[:9], "cut short"), (None, "")],
    ids=["broken", "cut", "cut in the header", "none"],
)
def test_a_library_that_cannot_be_loaded_is_a_reason_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[CompiledLibrary], content: bytes | None, reason: str
) -> None:
    folder = tmp_path / "package_of_the_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    if content is not None:
        (folder / kind.file).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    missing = kind("package_of_the_test").missing
    assert missing is not None
    assert reason in missing
