"""`python benchmarks/gpu` from any folder, or `scripts/gpu_check`; see `cli`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

if __name__ == "__main__":
    # The repository in place of this folder, so that the modules here have no names but benchmarks.gpu.NAME.
    sys.path[0] = str(ROOT)
    sys.path[1:1] = [str(ROOT / folder) for folder in ("causal-conv1d", "mamba-1p1p1", "vim")]

    from benchmarks.gpu.cli import run

    sys.exit(run())
