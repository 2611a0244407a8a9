"""Run the steps of an example one after the other, each as the command that a person would type."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

POLL_SECONDS = 0.2


def run_and_say(command: Sequence[str], interrupt_after: Path | None = None) -> int:
    """Print the command, run it, and return its exit code.

    Ctrl-C reaches the command too; it has all the time it takes to save what it has. Of a command that a signal ended
    the code is that of a shell, 128 and the number of the signal.

    Args:
        interrupt_after: send SIGTERM, once, as soon as something is in this file.
    """
    print("$ " + shlex.join(["python", *command[1:]]), flush=True)
    # The model is too small for several threads to be of use; the training has a process beside it for the pictures.
    process = subprocess.Popen(command, env={"OMP_NUM_THREADS": "1", **os.environ})
    while True:
        try:
            while interrupt_after is not None and process.poll() is None:
                if interrupt_after.exists() and interrupt_after.stat().st_size:
                    print("reproduce.py sends SIGTERM", flush=True)
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(POLL_SECONDS)
            code = process.wait()
            return code if code >= 0 else 128 - code
        except KeyboardInterrupt:
            interrupt_after = None
