"""What the machine is good at."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

CPU_INFO = Path("/proc/cpuinfo")
FAST_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86 and of Arm, as Linux names them


@torch.compiler.assume_constant_result
@cache
def has_fast_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices faster than fp32 ones; False where the system does not say.

    PyTorch's products of bf16 matrices take five times as long as those of fp32 where it has not.
    """
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    words = (line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features")))
    return bool(FAST_BF16.intersection(next(words, [])))
