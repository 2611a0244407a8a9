#!/usr/bin/env python3
"""Set up Vision Mamba on a machine without CUDA: python3 setup_cpu_env.py [--demo | --test | --check]

Makes or reuses a virtual environment (.venv beside this file), installs a torch and a torchvision that go
together, this repository's two packages and what vim/ needs, and proves the result by running it. Needs
Python 3.10 or newer and nothing else. A second run that finds all in place only proves it again, in seconds.

The environment's state stands in its setup_cpu_env.json, which says "whole" only after the proof: whatever
stops the set-up midway, the next run goes on, or starts anew where torch was not in place yet.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if sys.version_info < (3, 10):  # noqa: UP036 - an older Python must be told, so this file parses under 3.6
    sys.exit(
        f"error: Python 3.10 or newer is needed and this is Python {platform.python_version()}; "
        "start it with a newer one, as in `python3.11 setup_cpu_env.py`."
    )

ROOT = Path(__file__).resolve().parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEWEST_TRIED = (3, 13)
PACKAGES = ("causal-conv1d", "mamba-1p1p1")
REQUIREMENTS = ROOT / "requirements"
SWITCHES = re.compile(
    r"(CAUSAL_CONV1D|SELECTIVE_SCAN|MAMBA)_(FORCE|SKIP|LOCAL)_|CUDA_HOME|CUDA_PATH|CUDAHOSTCXX|NVCC_"
    r"|TORCH_CUDA_ARCH_LIST|ONNXRUNTIME_INCLUDE"
)
DEMO = (
    *("vim/infer_rpi.py", "--model", "vim_pico_patch4_32"),
    *("--checkpoint", "examples/digits/vim_pico_digits.safetensors"),
    *("--image", "examples/digits/samples/three.png"),
)

# The tests of a file stay in one process, which may take 2 GB.
SIDE_BY_SIDE = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")

# What a failed command printed, and the sentence for it. The first that is found counts.
FAILURES = (
    (r"No space left on device|Errno 28|not enough space on the disk", "the disk is full; free some space"),
    (
        r"(?m)^Killed$|MemoryError",
        "it was ended from outside, most likely because the memory is full; close other programs or add swap",
    ),
    (r"Read-only file system|Permission denied|Errno 13", "there is no permission to write there"),
    (
        r"ensurepip is not available|No module named '?(venv|ensurepip)",
        "this Python comes without its venv module; on Debian, Ubuntu and Raspberry Pi OS `sudo apt install "
        "python3-venv` adds it",
    ),
    (r"No module named '?pip", "the environment has no pip; add --recreate to make it anew"),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "the package index's certificate was refused; check the machine's date, and its proxy if it has one",
    ),
    (
        r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Max retries exceeded"
        r"|Name or service not known|name resolution|Network is unreachable|Connection (refused|reset|broken)"
        r"|IncompleteRead|Could not fetch URL|HTTP error \d",
        "the package index could not be reached; check the network, and HTTPS_PROXY and PIP_INDEX_URL if set",
    ),
    (
        r"No matching distribution found for torch|ResolutionImpossible",
        f"it has no matching torch and torchvision for Python {sys.version_info[0]}.{sys.version_info[1]} on "
        f"{platform.system()} {platform.machine()}",
    ),
)


class SetupError(Exception):
    """One sentence for the user: what is wrong and what mends it."""


class Candidate(NamedTuple):
    """One way to get torch and torchvision: where from, pip's arguments, GB of disk that it takes at most."""

    source: str
    arguments: list[str]
    disk_gb: float


def pair_requirements(torch_version: str | None, exactly: str) -> list[str]:
    """What to ask pip for. torchvision declares the torch that it goes with, so that pip completes the pair.

    Args:
        torch_version: "2.9.1", or None for the newest.
        exactly: "==", or "===" to keep out a local build such as 2.9.1+cpu that pip's options may offer.
    """
    if torch_version is None:
        return ["torch>=2.4", "torchvision"]
    found = re.match(r"2\.(\d+)", torch_version)
    if found is None or int(found[1]) < 4:
        raise SetupError(f"--torch must be a version from 2.4 on, such as 2.9.1, got {torch_version!r}.")
    minor = int(found[1])
    vision = f"torchvision==0.{minor + 15}.*" if minor < 14 else "torchvision>=0.29"
    return [f"torch{exactly}{torch_version}", vision]


def candidates(system: str, machine: str, torch_version: str | None, torch_index: str | None) -> list[Candidate]:
    """Where to look for torch, best first.

    The PyTorch CPU index has the smallest builds. On 64-bit ARM Linux the default index has them too, and
    2.9.1 is the last torch that runs on a Raspberry Pi 4; on other Linux it brings CUDA libraries along.
    """
    arm_linux = system == "Linux" and machine.lower() in ("aarch64", "arm64")
    pinned_for_arm = arm_linux and torch_version is None
    wanted = "2.9.1" if pinned_for_arm else torch_version
    heavy = system == "Linux" and not pinned_for_arm
    if torch_index is not None:
        arguments = ["--index-url", torch_index, *pair_requirements(wanted, "==")]
        return [Candidate(torch_index, arguments, 9.0 if heavy else 2.0)]
    cpu = Candidate(CPU_INDEX, ["--index-url", CPU_INDEX, *pair_requirements(wanted, "==")], 2.0)
    default = Candidate("the default index", pair_requirements(wanted, "==="), 9.0 if heavy else 2.0)
    return [default, cpu] if pinned_for_arm else [cpu, default]


def reachable(url: str, seconds: float = 6.0) -> bool:
    """Whether anything answers at `url`. In a thread of its own, as looking up a name has no time-out."""
    answers = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{url}/torch/", timeout=seconds):
                answers.append(True)
        except (OSError, ValueError):  # URLError and time-outs are OSErrors
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def explain(output: str) -> str:
    """A failed command's output in one clause."""
    for pattern, reason in FAILURES:
        if re.search(pattern, output):
            return reason
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"error|\w*(Error|Exception)\b", line, re.IGNORECASE)]
    return (errors or lines or ["it printed nothing"])[-1].rstrip(".")


@contextmanager
def step(number: int, title: str) -> Iterator[None]:
    print(f"[{number}/4] {title}", flush=True)
    start = time.monotonic()
    yield
    print(f"      done in {time.monotonic() - start:.0f} s", flush=True)


class Environment:
    """A virtual environment in `folder`, and what this script knows of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.state_file = folder / "setup_cpu_env.json"
        self.scratch = folder / "tmp"  # pip's downloads: on the disk that was checked, not on a small /tmp
        self.locks: tuple[int, ...] = ()  # descriptors that the commands inherit

    @property
    def state(self) -> dict[str, object]:
        """{"made_here", "whole", "inputs", "tests"}; empty where this script has not been."""
        try:
            found = json.loads(self.state_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_state(self, **changes: object) -> None:
        written = self.state_file.with_suffix(".new")
        written.write_text(json.dumps({**self.state, **changes}, indent=2) + "\n", encoding="utf-8")
        os.replace(written, self.state_file)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other set-ups away, and what a killed one left running: commands inherit the lock and so hold it."""
        if fcntl is None:
            yield
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder.parent, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.locks = (lock,)
            yield
        except BlockingIOError as error:
            raise SetupError(f"Another set-up in {self.folder.parent} still runs, or its pip; wait for it.") from error
        finally:
            self.locks = ()
            os.close(lock)

    def remove(self) -> None:
        """Delete the environment, and nothing that is not one."""
        if self.folder.exists():
            if not (self.folder / "pyvenv.cfg").exists() and not self.state_file.exists():
                raise SetupError(f"{self.folder} exists and is no virtual environment; name another with --venv.")
            if Path(sys.prefix) == self.folder:
                raise SetupError(f"{self.folder} is to be made anew; start this with a Python from outside it.")
            shutil.rmtree(self.folder)

    def make(self) -> None:
        """Create the environment, or make sure that the one that is there can be used."""
        if self.state.get("made_here") and not self.state.get("whole") and not self.has_pair():
            self.remove()
        if not self.folder.exists() or not any(self.folder.iterdir()):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write_state(made_here=True, whole=False)
            code, output = self.run([sys.executable, "-I", "-m", "venv", str(self.folder)])
            if code != 0:
                raise SetupError(f"{self.folder} could not be made: {explain(output)}.")
            return
        if not (self.folder / "pyvenv.cfg").exists():
            raise SetupError(f"{self.folder} exists and is no virtual environment; name another with --venv.")
        code, _ = self.run([str(self.python), "-I", "-c", "import sys; sys.exit(sys.version_info < (3, 10))"])
        if code != 0:
            raise SetupError(f"the Python in {self.folder} does not run or is too old; add --recreate to replace it.")
        self.write_state(whole=False)

    def run(self, command: list[str], shown: str = "(?!)", **variables: str) -> tuple[int, str]:
        """Run a command: its exit status and all its output. What `shown` captures of a line is echoed at once."""
        left_out = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "__PYVENV_LAUNCHER__")
        inherited = {name: value for name, value in os.environ.items() if name not in left_out}
        lines = []
        try:
            process = subprocess.Popen(
                command,
                env={**inherited, **variables},
                cwd=tempfile.gettempdir(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",
                pass_fds=self.locks,
            )
        except OSError as error:
            return 127, str(error)
        with process:
            try:
                for line in process.stdout or ():
                    lines.append(line)
                    found = re.search(shown, line)
                    if found is not None:
                        print("     ", *filter(None, found.groups()), flush=True)
            except BaseException:
                process.kill()
                raise
        if process.returncode == -9:
            lines.append("Killed\n")  # as a shell says it; the process itself could not
        return process.returncode, "".join(lines)

    def pip(self, *arguments: str) -> None:
        """Run pip, showing the large downloads.

        Raises:
            SetupError: it failed; says why.
        """
        large = r"(Downloading|Using cached) ([\w.]+-[^-]+).* (\([\d.]+ [MG]B\))"
        shown = rf"^\s*(?:{large}|(Installing collected packages):.*)$"
        command = [str(self.python), "-I", "-u", "-m", "pip", *arguments]
        self.scratch.mkdir(exist_ok=True)
        scratch = str(self.scratch)
        code, output = self.run(command, shown, PIP_NO_INPUT="1", TMPDIR=scratch, TEMP=scratch, TMP=scratch)
        shutil.rmtree(self.scratch, ignore_errors=True)
        if code != 0:
            raise SetupError(explain(output))

    def prove(self, *arguments: str) -> list[str]:
        """Run scripts/prove.py with the environment's Python and return the lines that it printed.

        Raises:
            SetupError: something does not work; says what.
        """
        program = str(ROOT / "scripts" / "prove.py")
        code, output = self.run([str(self.python), "-I", "-W", "ignore", program, *arguments])
        if code == -signal.SIGILL:
            raise SetupError("this torch uses instructions that this processor does not have")
        if code != 0:
            raise SetupError(explain(output))
        return output.splitlines()

    def pair(self) -> dict[str, str]:
        """The versions of torch and torchvision, proven to work together.

        Raises:
            SetupError: they do not, or are not there.
        """
        versions: dict[str, str] = json.loads(next(line for line in self.prove("pair") if line.startswith("{")))
        return versions

    def has_pair(self) -> bool:
        try:
            return bool(self.pair())
        except SetupError:
            return False


def install_pair(environment: Environment, torch_version: str | None, torch_index: str | None) -> None:
    """Install torch and torchvision from the first place whose pair proves to work together.

    Raises:
        SetupError: none did; says what was wrong with each.
    """
    if torch_index is None and environment.has_pair() and suits(environment.pair()["torch"], torch_version):
        print("      kept: those that are there work together", flush=True)
        return
    remove = ("uninstall", "--yes", "torch", "torchvision")
    environment.pip(*remove)
    problems = []
    for source, arguments, disk_gb in candidates(platform.system(), platform.machine(), torch_version, torch_index):
        free = shutil.disk_usage(environment.folder).free / 1e9
        if source == CPU_INDEX and not reachable(source):
            problems.append(f"{source}: it could not be reached")
        elif free < disk_gb:
            problems.append(f"{source}: it takes up to {disk_gb:.0f} GB of disk and {free:.1f} GB are free")
        else:
            print(f"      from {source} (up to {disk_gb:.0f} GB of disk)", flush=True)
            try:
                environment.pip("install", *arguments)
                versions = environment.pair()
                print(f"      torch {versions['torch']}, torchvision {versions['torchvision']}", flush=True)
                return
            except SetupError as error:
                problems.append(f"{source}: {error}")
                environment.pip(*remove)
        print(f"      {problems[-1]}", flush=True)
    raise SetupError(f"No working torch and torchvision could be installed ({'; '.join(problems)}).")


def suits(installed: str, wanted: str | None) -> bool:
    """Whether an installed torch, such as 2.9.1+cpu, is the wanted version (None: any from 2.4 on)."""
    if wanted is None:
        return tuple(int(part) for part in re.findall(r"\d+", installed)[:2]) >= (2, 4)
    return wanted in (installed, installed.split("+")[0])


def fingerprint() -> str:
    """A hash of what an environment depends on: the requirements, what is built, how, and from where."""
    files = sorted(REQUIREMENTS.glob("*.txt"))
    for package in PACKAGES:
        built = sorted(path for path in (ROOT / package / "csrc").rglob("*") if path.is_file())
        files += [ROOT / package / "setup.py", ROOT / package / "pyproject.toml", *built]
    digest = hashlib.sha256(str(ROOT).encode())
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    digest.update(json.dumps(sorted(item for item in os.environ.items() if SWITCHES.match(item[0]))).encode())
    return digest.hexdigest()


def install(environment: Environment, options: argparse.Namespace) -> None:
    """Bring the environment to the state that the proof then tests.

    Raises:
        SetupError: a step failed. An environment that was made here and has no torch yet is removed again.
    """
    with step(1, f"virtual environment {environment.folder}"):
        environment.make()
    with step(2, "torch and torchvision"):
        try:
            install_pair(environment, options.torch, options.torch_index)
        except BaseException:
            if environment.state.get("made_here"):
                shutil.rmtree(environment.folder, ignore_errors=True)
            raise
    tests = bool(options.test or environment.state.get("tests"))
    with step(3, "the packages of this repository and what they need"):
        files = ["run.txt", "test.txt"] if tests else ["run.txt"]
        try:
            environment.pip("install", "setuptools>=64", "wheel")
            environment.pip("install", *(part for name in files for part in ("-r", str(REQUIREMENTS / name))))
            folders = [part for name in PACKAGES for part in ("-e", str(ROOT / name))]
            environment.pip("install", "--no-build-isolation", "--no-deps", *folders)
        except SetupError as error:
            raise SetupError(
                f"The packages could not be installed: {error}. Run it again to go on from here."
            ) from error
    environment.write_state(inputs=fingerprint(), tests=tests)


def is_in_place(environment: Environment, options: argparse.Namespace) -> bool:
    """Whether the environment was once proven whole, for the files and options of today."""
    state = environment.state
    return bool(
        state.get("whole")
        and state.get("inputs") == fingerprint()
        and (state.get("tests") or not options.test)
        and options.torch_index is None
    )


def prove(environment: Environment, torch_version: str | None) -> None:
    """Prove the environment by using it, and print what runs.

    Raises:
        SetupError: something does not work.
    """
    try:
        versions = environment.pair()
        report = environment.prove("packages", str(ROOT))
    except SetupError as error:
        raise SetupError(f"The installation in {environment.folder} does not work: {error}.") from error
    if not suits(versions["torch"], torch_version):
        raise SetupError(f"{environment.folder} has torch {versions['torch']} and not {torch_version}.")
    for line in (
        f"torch {versions['torch']} and torchvision {versions['torchvision']} work together",
        *report,
    ):
        print(f"      {line}", flush=True)
    if any(re.search(r"native\s+not available.*C\+\+ compiler", line) for line in report):
        print(
            "note: no C++ compiler was found, so pure PyTorch runs, several times slower; install one (on Debian, "
            "Ubuntu and Raspberry Pi OS `sudo apt install g++`) and run this again with --recreate.",
            flush=True,
        )


def set_up(environment: Environment, options: argparse.Namespace) -> None:
    if options.recreate:
        environment.remove()
    if is_in_place(environment, options):
        print(f"{environment.folder} is in place; proving it", flush=True)
        try:
            prove(environment, options.torch)
            return
        except SetupError as error:
            print(f"{error} Mending it.", flush=True)
    if sys.version_info[:2] > NEWEST_TRIED:
        print(
            f"note: Python {platform.python_version()} is newer than any that this was tried with.",
            flush=True,
        )
    install(environment, options)
    with step(4, "proof"):
        prove(environment, options.torch)
    environment.write_state(whole=True)
    print(f"Ready. Run programs with {environment.python}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Set up Vision Mamba on a machine without CUDA, or prove that it is.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="environment to make or reuse (%(default)s)")
    parser.add_argument("--torch", metavar="VERSION", help="torch version (default: the newest; 2.9.1 on ARM Linux)")
    parser.add_argument("--torch-index", metavar="URL", help="take torch and torchvision from this package index only")
    parser.add_argument("--recreate", action="store_true", help="delete the environment and make it anew")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--demo", action="store_true", help="then classify the shipped pictures")
    action.add_argument("--test", action="store_true", help="then run the tests")
    action.add_argument("--check", action="store_true", help="only prove an environment; exit 1 if it is not whole")
    options = parser.parse_args(arguments)
    if options.check and options.recreate:
        parser.error("--check changes nothing and --recreate does; give one of them")
    options.venv = Path(os.path.abspath(options.venv))
    return options


def check(environment: Environment, options: argparse.Namespace) -> None:
    if not is_in_place(environment, options):
        here = environment.folder == ROOT / ".venv"
        command = "setup_cpu_env.py" if here else f"setup_cpu_env.py --venv {environment.folder}"
        switches = ", ".join(sorted(name for name in os.environ if SWITCHES.match(name)))
        setting = f" with {switches} set as now" if switches else ""
        raise SetupError(f"{environment.folder} is not whole for this checkout{setting}; run {command} to make it so.")
    prove(environment, options.torch)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    environment = Environment(options.venv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if sys.maxsize < 2**32:
            raise SetupError("torch needs a 64-bit Python; on a Raspberry Pi, the 64-bit Raspberry Pi OS has one.")
        if options.check:
            check(environment, options)
            return 0
        with environment.exclusive():
            set_up(environment, options)
    except (SetupError, OSError) as error:
        sentence = (
            str(error)
            if isinstance(error, SetupError)
            else f"{error.filename or environment.folder}: {explain(str(error))}."
        )
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run it again to finish.", file=sys.stderr)
        return 130
    if options.demo:
        return subprocess.call([str(environment.python), *DEMO], cwd=ROOT)
    if options.test:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several processes would wait for each other
        return subprocess.call([str(environment.python), "-m", "pytest", *SIDE_BY_SIDE], cwd=ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
