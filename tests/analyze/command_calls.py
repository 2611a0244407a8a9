"""Calls of the commands as their users make them, for the tests."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DIGITS = ROOT / "examples" / "digits"
WEIGHTS = DIGITS / "vim_pico_digits.safetensors"
THREE = DIGITS / "samples" / "three.png"


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if "error: " in line]


def call_here(run: Callable[[Sequence[str]], int], line: str, capfd: pytest.CaptureFixture[str]) -> Outcome:
    """Call a command's `run` in this process; what it writes about a failure is never a traceback."""
    try:
        code = run(shlex.split(line))
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    return Outcome(code, captured.out, captured.err)


def call_elsewhere(script: str, line: str, folder: Path) -> Outcome:
    """Call a command as a file, in another folder and a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [sys.executable, str(ROOT / "analyze" / script), *shlex.split(line)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)
