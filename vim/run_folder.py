"""The files of a training run in --output_dir: their names, and what becomes of those of an earlier run."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

LOG, SUMMARY = "log.txt", "summary.png"
LATEST, BEST = "checkpoint.pth", "best_checkpoint.pth"


def put_aside(folder: Path) -> None:
    """Rename the log and the checkpoints of another run in `folder` to log-1.txt, checkpoint-1.pth ..., and say so.

    All of a run get the same number, the first for which none of these names is taken. An empty log is no log.
    """
    paths = [folder / name for name in (LOG, LATEST, BEST)]
    found = [path for path in paths if path.exists() and path.stat().st_size]
    if not found:
        return
    number = next(number for number in count(1) if not any(_numbered(path, number).exists() for path in paths))
    for path in found:
        os.replace(path, _numbered(path, number))
    aside = ", ".join(_numbered(path, number).name for path in found)
    print(f"note: {folder} holds an earlier run, which is kept as {aside}; --auto-resume would have gone on with it")


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in `folder`, each as large as what it was to become."""
    for name in (LOG, LATEST, BEST):
        for path in folder.glob(f".{name}.*.tmp"):
            number = path.name.split(".")[-2]
            if number.isdecimal() and not _runs(int(number)):
                path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Whether another process than this one has the number; this one writes nothing while it clears up."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)  # signal 0 asks alone
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
