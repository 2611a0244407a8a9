"""Signals that reach the processes that read pictures."""

import subprocess
import sys
import textwrap

import pytest
from training_runs import MAIN

ASK = """
    import os, signal, sys
    from torch.utils.data import DataLoader
    import loaders

    number, when = getattr(signal, sys.argv[1]), sys.argv[2]
    asked = []
    signal.signal(number, lambda *_: asked.append(number))
    leave = loaders._leave_group

    def ask(worker):
        if when == "before":
            os.killpg(os.getpgrp(), number)
        leave(worker)

    loaders._leave_group = ask
    read = []
    for item in loaders.GuardedLoader(range(8), num_workers=2):
        if when == "after" and not asked:
            os.killpg(os.getpgrp(), number)
        read += item.tolist()
    assert read == list(range(8)), read
    assert asked, "the main process was not asked"
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_workers_outlive_a_signal_to_the_group(number, when):
    """Also one that finds a worker just started, not yet in a group of its own."""
    command = [sys.executable, "-c", textwrap.dedent(ASK), number, when]
    done = subprocess.run(
        command, cwd=MAIN.parent, capture_output=True, text=True, timeout=120, start_new_session=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
