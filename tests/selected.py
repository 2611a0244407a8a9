"""The backends that --backend names, for test files of one backend only."""

from __future__ import annotations

BACKENDS: list[str] = []  # filled by conftest.py
