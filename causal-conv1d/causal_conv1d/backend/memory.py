"""How the process keeps its memory between calls."""

from __future__ import annotations

from functools import cache

import torch


@cache
def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next call instead of giving it back to the system.

    glibc gives back what is freed above a threshold, so every layer would page its buffers in anew: up to 18,000 page
    faults, and half of the time, for Vim-Tiny at 224 px. The threshold rises with the largest block that was ever
    mapped and freed, up to 32 MB; one such block, never touched, settles it. Harmless with any other allocator.
    """
    torch.empty(30 << 20, dtype=torch.uint8)
