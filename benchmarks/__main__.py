"""`python benchmarks` from any folder, or `scripts/bench`; see `cli`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    # The repository in place of this folder, so that the modules here have no names but benchmarks.NAME.
    sys.path[0] = str(ROOT)
    sys.path.insert(1, str(ROOT / "vim"))

    from benchmarks.cli import run

    sys.exit(run())
