"""How many exponentials per second the device computes, in registers, by a triton kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4  # eight numbers per thread, which do not wait for each other
PROGRAMS_PER_UNIT = 64


@triton.jit
def exp_kernel(out: Any, repeats: Any, BLOCK: tl.constexpr) -> None:
    """Each number is 2 to the power of minus the one before, `repeats` times."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = offsets.to(tl.float32) * 1e-9
    for _ in range(repeats):
        value = tl.exp2(-value)
    tl.store(out + offsets, value)


def run_exponentials(out: Tensor, repeats: int) -> int:
    """Compute them and return how many: `repeats` per element of `out`, whose number BLOCK divides."""
    exp_kernel[(out.numel() // BLOCK,)](out, repeats, BLOCK=BLOCK, num_warps=WARPS)
    return out.numel() * repeats


def output_for(units: int, device: torch.device) -> Tensor:
    """An output that keeps this many multiprocessors busy."""
    return torch.full((units * PROGRAMS_PER_UNIT * BLOCK,), float("nan"), device=device)
