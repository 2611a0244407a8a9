"""setup_cpu_env.py: what it asks pip for, what it does when a step fails, and what it leaves behind. No network."""

from __future__ import annotations

import ast
import http.server
import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "setup_cpu_env.py"
VERSIONS = '{"torch": "2.9.1+cpu", "torchvision": "0.24.1+cpu"}'


def load() -> Any:
    spec = importlib.util.spec_from_file_location("set_up_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


set_up = load()


class Machine:
    """Runs the commands of an `Environment` in its place: records them and answers as the test scripts it."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.commands: list[str] = []
        self.installed: str | None = None  # where the torch that is there came from
        self.working = {"the default index", set_up.CPU_INDEX}
        self.failures: dict[str, str] = {}  # part of a command: what it prints before it fails

    def run(self, command: list[str], shown: str = "", **variables: str) -> tuple[int, str]:
        line = " ".join(command)
        self.commands.append(line)
        for part, output in self.failures.items():
            if part in line:
                return 1, output
        if "-m venv" in line:
            (self.environment.folder / "pyvenv.cfg").write_text("")
        elif "pip install torch" in line:
            self.installed = "the default index"
        elif "pip install --index-url" in line:
            self.installed = command[command.index("--index-url") + 1]
        elif "pip uninstall" in line:
            self.installed = None
        elif "prove.py" in line and self.installed not in self.working:
            return 1, "RuntimeError: operator torchvision::nms does not exist"
        elif line.endswith("prove.py pair"):
            return 0, VERSIONS
        return 0, ""


@pytest.fixture
def environment(tmp_path: Path) -> Any:
    return set_up.Environment(tmp_path / "a venv")


@pytest.fixture
def machine(environment: Any, monkeypatch: pytest.MonkeyPatch) -> Machine:
    fake = Machine(environment)
    monkeypatch.setattr(set_up.Environment, "run", lambda self, *given, **named: fake.run(*given, **named))
    monkeypatch.setattr(set_up, "reachable", lambda url: True)
    monkeypatch.setattr(set_up.platform, "system", lambda: "Linux")
    monkeypatch.setattr(set_up.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(set_up.shutil, "disk_usage", lambda folder: SimpleNamespace(free=50e9))
    return fake


def main(environment: Any, *arguments: str) -> int:
    before = signal.getsignal(signal.SIGTERM)
    try:
        return set_up.main(["--venv", str(environment.folder), *arguments])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_older_python_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SystemExit, match=r"^error: Python 3\.10 or newer is needed"):
        runpy.run_path(str(SCRIPT))


def test_the_door_in_vim_is_the_same_script() -> None:
    outputs = [
        subprocess.run(
            [sys.executable, path, "--help"], capture_output=True, text=True, check=True, cwd=ROOT.parent
        ).stdout
        for path in (SCRIPT, ROOT / "vim" / "setup_cpu_env.py")
    ]
    assert outputs[0] == outputs[1]
    for flag in ("--venv", "--torch", "--demo", "--test", "--check", "--recreate"):
        assert flag in outputs[0]


@pytest.mark.parametrize(
    ("system", "machine", "torch_version", "sources", "requirements"),
    [
        ("Linux", "x86_64", None, ["cpu", "default"], ["torch>=2.4", "torchvision"]),
        ("Windows", "AMD64", None, ["cpu", "default"], ["torch>=2.4", "torchvision"]),
        ("Darwin", "arm64", None, ["cpu", "default"], ["torch>=2.4", "torchvision"]),
        ("Linux", "aarch64", None, ["default", "cpu"], ["torch===2.9.1", "torchvision==0.24.*"]),
        ("Linux", "aarch64", "2.15.0", ["cpu", "default"], ["torch===2.15.0", "torchvision>=0.29"]),
        ("Linux", "x86_64", "2.4.1", ["cpu", "default"], ["torch===2.4.1", "torchvision==0.19.*"]),
        ("Linux", "x86_64", "2.13.0", ["cpu", "default"], ["torch===2.13.0", "torchvision==0.28.*"]),
    ],
)
def test_candidates(
    system: str, machine: str, torch_version: str | None, sources: list[str], requirements: list[str]
) -> None:
    found = set_up.candidates(system, machine, torch_version, None)
    assert ["cpu" if each.source == set_up.CPU_INDEX else "default" for each in found] == sources
    default = found[sources.index("default")]
    cpu = found[sources.index("cpu")]
    assert default.arguments == requirements
    # A version of the CPU index is a local build of the one that was asked for, and == takes it.
    assert cpu.arguments == ["--index-url", set_up.CPU_INDEX, *(part.replace("===", "==") for part in requirements)]
    brings_cuda = system == "Linux" and (machine == "x86_64" or torch_version is not None)
    assert (default.disk_gb > 5) == brings_cuda
    assert cpu.disk_gb < 5


def test_an_index_that_is_named_is_the_only_one() -> None:
    (only,) = set_up.candidates("Linux", "x86_64", "2.9.1", "https://example.org/simple")
    assert only.arguments == ["--index-url", "https://example.org/simple", "torch==2.9.1", "torchvision==0.24.*"]


@pytest.mark.parametrize("version", ["2.3.1", "1.13.1", "newest", ""])
def test_an_impossible_torch_version_is_refused(version: str) -> None:
    with pytest.raises(set_up.SetupError, match=r"from 2\.4 on"):
        set_up.pair_requirements(version, "==")


@pytest.mark.parametrize(
    ("installed", "wanted", "suits"),
    [
        ("2.15.0+cu132", None, True),
        ("2.10.0", None, True),
        ("2.3.1", None, False),
        ("1.13.1", None, False),
        ("2.9.1+cpu", "2.9.1", True),
        ("2.9.1+cpu", "2.9.1+cpu", True),
        ("2.9.1+cpu", "2.9.1+cu126", False),
        ("2.9.1", "2.9", False),
    ],
)
def test_suits(installed: str, wanted: str | None, suits: bool) -> None:
    assert set_up.suits(installed, wanted) is suits


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("PermissionError: [Errno 13] Permission denied: '/usr/lib/x'", "no permission to write"),
        ("The virtual environment was not created because ensurepip is not available.", "python3-venv"),
        ("/usr/bin/python3: No module named venv", "python3-venv"),
        ("/x/bin/python: No module named pip", "--recreate"),
        (
            "WARNING: Retrying: NewConnectionError('[Errno -3] Temporary failure in name resolution')\n"
            "ERROR: No matching distribution found for torch>=2.4",
            "could not be reached",
        ),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))", "the machine's date"),
        ("ERROR: No matching distribution found for torch>=2.4", "no matching torch and torchvision for Python"),
        ("Traceback\n  File x\nRuntimeError: operator torchvision::nms does not exist\n", "nms does not exist"),
        ("ERROR: one.\nnote: two\n", "ERROR: one"),
        ("Collecting torch\nKilled\n", "memory is full"),
        ("", "printed nothing"),
    ],
)
def test_explain(output: str, words: str) -> None:
    assert words in set_up.explain(output)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal 9")
def test_a_command_that_the_system_kills_is_explained(environment: Any) -> None:
    program = "import os; print('Collecting torch', flush=True); os.kill(os.getpid(), 9)"
    code, output = environment.run([sys.executable, "-c", program])
    assert code != 0
    assert "memory is full" in set_up.explain(output)


def test_a_first_run_ends_whole_and_a_second_only_proves(
    environment: Any, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(environment) == 0
    assert environment.state["whole"] is True
    assert machine.installed == set_up.CPU_INDEX
    assert any("--no-build-isolation --no-deps -e" in command for command in machine.commands)
    machine.commands.clear()
    assert main(environment) == 0
    assert [command.split("prove.py ")[1].split()[0] for command in machine.commands] == ["pair", "packages"]
    assert main(environment, "--check") == 0
    assert "in place" in capsys.readouterr().out


def test_tests_need_more_and_are_installed_once(
    environment: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    monkeypatch.setattr(set_up.subprocess, "call", lambda command, cwd: called.append(command) or 5)
    assert main(environment) == 0
    assert not any("test.txt" in command for command in machine.commands)
    assert main(environment, "--test") == 5
    assert any("test.txt" in command for command in machine.commands)
    machine.commands.clear()
    assert main(environment, "--test") == 5
    assert not any("pip" in command for command in machine.commands)
    assert called == [[str(environment.python), "-m", "pytest", *set_up.SIDE_BY_SIDE]] * 2


def test_the_demo_runs_in_the_environment(environment: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(set_up.subprocess, "call", lambda command, cwd: called.append(command) or 0)
    assert main(environment, "--demo") == 0
    assert called == [[str(environment.python), *set_up.DEMO]]


def test_a_pair_that_does_not_prove_is_replaced(environment: Any, machine: Machine) -> None:
    machine.working.remove(set_up.CPU_INDEX)
    assert main(environment) == 0
    assert machine.installed == "the default index"


def test_an_index_out_of_reach_is_passed_over(
    environment: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_up, "reachable", lambda url: False)
    assert main(environment) == 0
    assert not any(set_up.CPU_INDEX in command for command in machine.commands)


def test_without_a_working_pair_nothing_is_left(
    environment: Any, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.working.clear()
    assert main(environment) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: No working torch and torchvision could be installed (")
    assert message.count("nms does not exist") == 2
    assert not environment.folder.exists()


def test_too_small_a_disk_is_seen_before_the_download(
    environment: Any, machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(set_up.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1.5e9))
    assert main(environment) == 1
    assert "it takes up to 9 GB of disk and 1.5 GB are free" in capsys.readouterr().err
    assert not any("pip install" in command for command in machine.commands)


def test_an_interrupted_download_leaves_nothing(
    environment: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(set_up.Environment, "pip", interrupted)
    assert main(environment) == 130
    assert not environment.folder.exists()


def test_what_was_killed_is_made_anew(environment: Any, machine: Machine) -> None:
    """No chance to clean up: the environment says that it is not whole and its torch does not prove."""
    environment.folder.mkdir()
    environment.write_state(made_here=True, whole=False)
    (environment.folder / "half a torch").write_text("")
    assert main(environment, "--check") == 1
    assert main(environment) == 0
    assert not (environment.folder / "half a torch").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no lock that a command inherits")
def test_a_pip_that_outlived_its_set_up_is_waited_for(
    environment: Any, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    with environment.exclusive():
        orphan = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=environment.locks)
    assert main(environment) == 1
    assert "Another set-up in" in capsys.readouterr().err
    assert machine.commands == []
    orphan.communicate(b"\n")
    assert main(environment) == 0


def test_a_later_failure_keeps_torch_and_the_next_run_goes_on(
    environment: Any, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.failures["-e "] = "ERROR: [Errno 28] No space left on device"
    assert main(environment) == 1
    assert "The packages could not be installed: the disk is full" in capsys.readouterr().err
    assert environment.state["whole"] is False
    assert main(environment, "--check") == 1
    machine.failures.clear()
    machine.commands.clear()
    assert main(environment) == 0
    assert environment.state["whole"] is True
    assert not any("-m venv" in command or "install torch" in command for command in machine.commands)


def test_a_whole_environment_that_broke_is_mended(
    environment: Any, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(environment) == 0
    machine.installed = "somebody's pip install"
    assert main(environment, "--check") == 1
    assert "does not work: RuntimeError: operator torchvision::nms does not exist" in capsys.readouterr().err
    assert main(environment) == 0
    assert machine.installed in machine.working


def test_another_torch_is_installed_when_asked_for(environment: Any, machine: Machine) -> None:
    assert main(environment) == 0
    machine.commands.clear()
    assert main(environment, "--torch", "2.9.1") == 0  # it is the one that is there
    assert not any("pip" in command for command in machine.commands)
    assert main(environment, "--torch", "2.4.1") == 1  # the machine goes on saying 2.9.1
    assert any("torch==2.4.1" in command for command in machine.commands)


def test_an_environment_of_the_user_is_used_and_never_deleted(environment: Any, machine: Machine) -> None:
    environment.folder.mkdir()
    (environment.folder / "pyvenv.cfg").write_text("")
    (environment.folder / "theirs").write_text("")
    machine.working.clear()
    assert main(environment) == 1
    assert (environment.folder / "theirs").exists()
    assert main(environment, "--recreate") == 1
    assert not (environment.folder / "theirs").exists()


def test_an_environment_does_not_delete_itself(
    environment: Any, machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(environment) == 0
    monkeypatch.setattr(sys, "prefix", str(environment.folder))
    assert main(environment, "--recreate") == 1
    assert "with a Python from outside it" in capsys.readouterr().err
    assert environment.state["whole"] is True


@pytest.mark.parametrize("arguments", [[], ["--recreate"]])
def test_a_folder_that_is_no_environment_is_left_alone(
    environment: Any, machine: Machine, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    environment.folder.mkdir()
    (environment.folder / "thesis.tex").write_text("")
    assert main(environment, *arguments) == 1
    assert "exists and is no virtual environment" in capsys.readouterr().err
    assert [path.name for path in environment.folder.iterdir()] == ["thesis.tex"]


def test_a_missing_venv_module_is_named(environment: Any, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.failures["-m venv"] = "The virtual environment was not created because ensurepip is not available."
    assert main(environment) == 1
    assert "sudo apt install python3-venv" in capsys.readouterr().err
    assert main(environment, "--check") == 1


def test_no_permission_is_one_sentence(
    environment: Any, machine: Machine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def refuse(self: Path, *given: Any, **named: Any) -> None:
        if self == environment.folder:
            raise PermissionError(13, "Permission denied", str(self))
        make(self, *given, **named)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(environment) == 1
    assert capsys.readouterr().err == f"error: {environment.folder}: there is no permission to write there.\n"


def test_the_inputs_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = set_up.fingerprint()
    assert set_up.fingerprint() == before
    monkeypatch.setenv("SELECTIVE_SCAN_FORCE_FALLBACK", "TRUE" if before else "")
    assert set_up.fingerprint() != before
    monkeypatch.delenv("SELECTIVE_SCAN_FORCE_FALLBACK")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "requirements" / "run.txt").write_text("timm\n")
    for package in set_up.PACKAGES:
        (tmp_path / package).mkdir()
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / package / name, tmp_path / package / name)
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    monkeypatch.setattr(set_up, "REQUIREMENTS", tmp_path / "requirements")
    assert set_up.fingerprint() != before


def test_check_of_what_is_not_there_says_so(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--check", "--venv", str(tmp_path / "nothing here")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "is not whole for this checkout" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_check_names_the_folder_and_the_variables(
    environment: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(environment) == 0
    monkeypatch.setenv("CAUSAL_CONV1D_FORCE_FALLBACK", "1")
    assert main(environment, "--check") == 1
    error = capsys.readouterr().err
    assert "is not whole for this checkout with CAUSAL_CONV1D_FORCE_FALLBACK set as now" in error
    assert f"run setup_cpu_env.py --venv {environment.folder} to make it so" in error


def test_check_and_recreate_exclude_each_other(environment: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(environment, "--check", "--recreate")
    assert "--check changes nothing and --recreate does" in capsys.readouterr().err


def test_a_missing_compiler_is_told_with_its_mend(
    environment: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "  native not available: no C++ compiler could build its kernels (no such file: c++)"
    monkeypatch.setattr(set_up.Environment, "prove", lambda self, *given: [VERSIONS, reason])
    assert main(environment) == 0
    assert "note: no C++ compiler was found" in capsys.readouterr().out


def test_check_of_a_real_environment_without_torch_fails(environment: Any) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.folder], check=True)
    environment.write_state(made_here=True, whole=True, inputs=set_up.fingerprint(), tests=False)
    command = [sys.executable, str(SCRIPT), "--check", "--venv", str(environment.folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=environment.folder.parent)
    assert result.returncode == 1
    assert "does not work: ModuleNotFoundError: No module named 'torch'" in result.stderr
    assert "Traceback" not in result.stderr


def test_commands_see_neither_the_users_modules_nor_pip_targets(
    environment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "PIP_TARGET", "PIP_USER"):
        monkeypatch.setenv(name, "x")
    program = "import json, os; print(json.dumps(dict(os.environ)))"
    code, output = environment.run([sys.executable, "-c", program], EXTRA="1")
    seen = json.loads(output)
    assert code == 0
    assert seen["EXTRA"] == "1"
    assert seen["PATH"] == os.environ["PATH"]
    assert not {"PYTHONPATH", "PIP_TARGET", "PIP_USER"} & set(seen)


def test_large_downloads_are_shown(environment: Any, capsys: pytest.CaptureFixture[str]) -> None:
    environment.folder.mkdir()
    shown: list[str] = []

    def run(command: list[str], pattern: str, **variables: str) -> tuple[int, str]:
        shown.append(pattern)
        return 0, ""

    real = environment.run
    environment.run = run
    environment.pip("install")
    printed = (
        "  Downloading torch-2.9.1-cp311-cp311-linux.whl (104.2 MB)\\n"
        "  Downloading idna-3.2-py3-none-any.whl (66 kB)\\n"
        "Installing collected packages: idna, torch\\n"
    )
    real([sys.executable, "-c", f"print('{printed}')"], shown[0])
    assert capsys.readouterr().out == "      Downloading torch-2.9.1 (104.2 MB)\n      Installing collected packages\n"


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as silent:
        silent.RequestHandlerClass.log_message = lambda *given: None  # type: ignore[method-assign]
        silent.RequestHandlerClass.do_GET = lambda self: (self.send_response(200), self.end_headers())  # type: ignore[attr-defined]
        thread = threading.Thread(target=silent.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{silent.server_port}"
        silent.shutdown()
        thread.join()


def test_reachable(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert set_up.reachable(server)
    assert not set_up.reachable("http://127.0.0.1:1", seconds=5.0)
    assert not set_up.reachable("no url", seconds=5.0)
