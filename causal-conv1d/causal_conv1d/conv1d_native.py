"""The causal convolution on the compiled CPU kernels of `csrc/cpu`. b batch, d channels, l length, w conv width."""

from __future__ import annotations

import torch
from torch import Tensor

from causal_conv1d.backend.call import Call
from causal_conv1d.backend.native import Library

LIBRARY = Library("causal_conv1d")


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> Tensor | None:
    """The op `causal_conv1d::conv1d`, or None for what the kernels do not do: fp64 and `seq_idx`."""
    if seq_idx is not None or weight.shape[1] == 0 or torch.float64 in (x.dtype, weight.dtype):
        return None
    columns = x if x.dtype in (torch.float32, torch.bfloat16) else x.float()
    out = torch.empty_like(columns)
    call = Call(columns.dtype)
    call.sequence(columns).sequence(out).parameter(weight).parameter(bias)
    call.integers(*x.shape, weight.shape[1], silu, reverse)
    call.run(LIBRARY, "conv1d")
    return out.to(x.dtype)
