"""What the machine is said to be good at."""

from __future__ import annotations

from pathlib import Path

import pytest

from causal_conv1d.backend import machine


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags : amx_bf16 sse", True),
        ("processor : 0\nflags : fpu avx2 avx512f\nbugs : bf16\n", False),
        ("Features : fp asimd bf16 i8mm\n", True),
        ("Features : fp asimd evtstrm\n", False),
        ("", False),
        (None, False),
    ],
)
def test_fast_bf16(text: str | None, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert machine.has_fast_bf16.__wrapped__() is fast
