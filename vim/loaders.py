"""Loaders whose worker processes leave signals to the main process, which needs them to save what it reads on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

_ASKS_TO_STOP = {signal.SIGTERM, signal.SIGINT}


class GuardedLoader(DataLoader[Any]):
    """A DataLoader whose workers outlive a signal to the process group: `timeout`, Ctrl-C and batch systems send it so.

    Each worker sits in a process group of its own. It starts with the signals blocked, as one would end it that comes
    before it has got there.
    """

    def __init__(self, dataset: Any, batch_size: int | None = 1, **settings: Any) -> None:
        super().__init__(dataset, batch_size, worker_init_fn=_leave_group, **settings)

    def __iter__(self) -> Any:
        with _signals_held():
            return super().__iter__()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let SIGTERM and SIGINT wait, in this thread and the processes that it starts."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which has no process groups either
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKS_TO_STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_group(worker: int) -> None:
    """Put a worker in a group of its own, and drop what was sent to the run's group before.

    The main process still ends it with SIGTERM, and a worker whose main process was killed ends by itself.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        os.setpgrp()
        while came := signal.sigpending() & _ASKS_TO_STOP:
            signal.sigwait(came)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKS_TO_STOP)
