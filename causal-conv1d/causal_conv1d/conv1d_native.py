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
    if seq_idx is not None or not _runs(x, weight):
        return None
    call = Call(_activations(x))
    out = torch.empty_like(x, dtype=call.dtype)
    call.sequence(x).sequence(out).parameter(weight).parameter(bias)
    call.integers(*x.shape, weight.shape[1], silu, reverse)
    call.run(LIBRARY, "conv1d")
    return out.to(x.dtype)


def conv1d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The op `causal_conv1d::conv1d_backward`, or None for what the kernels do not do: fp64 and `seq_idx`."""
    if seq_idx is not None or not _runs(x, weight):
        return None
    channels, width = weight.shape
    call = Call(_activations(x))
    dx, sums = torch.empty_like(x, dtype=call.dtype), torch.empty((channels, width + 1))
    call.sequence(x).sequence(dout).sequence(dx).parameter(weight).parameter(bias).address(sums)
    call.integers(*x.shape, width, silu, reverse)
    call.run(LIBRARY, "conv1d_backward")
    dweight = weight.new_empty(weight.shape).copy_(sums[:, :width])
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias).copy_(sums[:, width])
    return dx.to(x.dtype), dweight, dbias


def conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    silu: bool,
) -> Tensor | None:
    """The op `causal_conv1d::conv1d_update`, or None for what the kernel does not do: fp64, fp16, a state of another
    dtype than x."""
    if x.dtype not in (torch.float32, torch.bfloat16) or conv_state.dtype != x.dtype or not _runs(x, weight):
        return None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    call = Call(x.dtype)
    call.sequence(x).sequence(out).sequence(conv_state)
    call.address(None if cache_seqlens is None else call.kept(cache_seqlens.to(torch.int64).contiguous()))
    call.parameter(weight).parameter(bias)
    call.integers(*x.shape, weight.shape[1], conv_state.shape[2], silu)
    call.run(LIBRARY, "conv1d_update")
    return out


def _runs(x: Tensor, weight: Tensor) -> bool:
    return weight.shape[1] > 0 and torch.float64 not in (x.dtype, weight.dtype)


def _activations(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
