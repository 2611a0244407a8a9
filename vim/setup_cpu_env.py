#!/usr/bin/env python3
"""The set-up script of the repository's root, for those who look for it here: same flags, same effect."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent.parent / "setup_cpu_env.py"), run_name="__main__")
