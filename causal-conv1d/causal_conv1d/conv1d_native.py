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
    if seq_idx is not None or not _runs(x, weight, bias):
        return None
    out = torch.empty_like(x, dtype=_activations(x))
    conv1d_into(out, x, weight, bias, silu, reverse)
    return out.to(x.dtype)


def conv1d_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> None:
    """`conv1d` written to a tensor (b, d, l) of fp32 or bf16, in whose dtype x is read."""
    call = Call(out.dtype)
    call.sequence(x).sequence(out).parameter(weight).parameter(bias)
    call.integers(*x.shape, weight.shape[1], silu, reverse)
    call.run(LIBRARY, "conv1d")


def conv1d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The op `causal_conv1d::conv1d_backward`, or None for what the kernels do not do: fp64 and `seq_idx`."""
    if seq_idx is not None or not _runs(x, weight, bias) or dout.shape != x.shape:
        return None
    dx = torch.empty_like(x, dtype=_activations(x))
    sums = conv1d_backward_into(dx, dout, x, weight, bias, silu, reverse)
    dweight = weight.new_empty(weight.shape).copy_(sums[:, :-1])
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias).copy_(sums[:, -1])
    return dx.to(x.dtype), dweight, dbias


def conv1d_backward_into(
    dx: Tensor,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse: bool,
    accumulate: bool = False,
) -> Tensor:
    """The gradient of x, written or added to a tensor (b, d, l) of fp32 or bf16, in whose dtype the others are read.

    Returns:
        The gradients of the taps and, in the last column, of the bias: (d, w + 1), fp32.
    """
    channels, width = weight.shape
    if not x.numel():
        return torch.zeros((channels, width + 1))
    sums = torch.empty((channels, width + 1))
    call = Call(dx.dtype)
    call.sequence(x).sequence(dout).sequence(dx).parameter(weight).parameter(bias).address(sums)
    call.integers(*x.shape, width, silu, reverse, accumulate)
    call.run(LIBRARY, "conv1d_backward")
    return sums


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
    if x.dtype not in (torch.float32, torch.bfloat16) or conv_state.dtype != x.dtype or not _runs(x, weight, bias):
        return None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    call = Call(x.dtype)
    call.sequence(x).sequence(out).sequence(conv_state)
    call.address(None if cache_seqlens is None else call.kept(cache_seqlens.to(torch.int64).contiguous()))
    call.parameter(weight).parameter(bias)
    call.integers(*x.shape, weight.shape[1], conv_state.shape[2], silu)
    call.run(LIBRARY, "conv1d_update")
    return out


def _runs(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels do it; what does not fit together is left to PyTorch, which says so."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] == 0 or weight.shape[0] != x.shape[1]:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    return not any(value.dtype is torch.float64 or value.is_complex() for value in (x, weight))


def _activations(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
