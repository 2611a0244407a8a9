"""The causal convolution on the compiled CUDA kernels of `csrc/cuda`. b batch, d channels, l length, w conv width."""

from __future__ import annotations

import torch
from torch import Tensor

from causal_conv1d.backend.cuda import ELEMENTS, CudaCall, CudaLibrary

LIBRARY = CudaLibrary("causal_conv1d")
MAX_WIDTH = 32  # as in conv1d.cuh
TOKENS = 64
MAX_BATCH = 65535


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> Tensor | None:
    """The op `causal_conv1d::conv1d`, or None for what the kernels do not do: fp64, complex, a width above 32."""
    if not _runs(x, weight, bias) or not _fits(seq_idx, x.shape[0], x.shape[2]):
        return None
    out = torch.empty_like(x)
    if x.numel():
        _call(x, weight, bias, seq_idx, silu, reverse).sequence(out).run(LIBRARY, "conv1d_forward")
    return out


def conv1d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The op `causal_conv1d::conv1d_backward`; None as `conv1d`. The same bits each time: no sum is left to chance."""
    if not _runs(x, weight, bias) or dout.shape != x.shape or dout.dtype not in ELEMENTS:
        return None
    if not _fits(seq_idx, x.shape[0], x.shape[2]):
        return None
    batch, channels, length = x.shape
    dx = torch.empty_like(x)
    shares = x.new_empty((batch, -(-length // TOKENS), channels, weight.shape[1] + 1), dtype=torch.float32)
    if x.numel():
        call = _call(x, weight, bias, seq_idx, silu, reverse).sequence(dout).sequence(dx).address(shares)
        call.run(LIBRARY, "conv1d_backward")
    sums = shares.sum((0, 1))
    dweight = weight.new_empty(weight.shape).copy_(sums[:, :-1])
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias).copy_(sums[:, -1])
    return dx, dweight, dbias


def conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    silu: bool,
) -> Tensor | None:
    """The op `causal_conv1d::conv1d_update`; None as `conv1d`."""
    if not _runs(x, weight, bias) or conv_state.dtype not in ELEMENTS or not _fits(cache_seqlens, x.shape[0]):
        return None
    if conv_state.dim() != 3 or conv_state.shape[:2] != x.shape[:2] or conv_state.shape[2] < weight.shape[1] - 1:
        return None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        call = CudaCall(x).sequence(x).sequence(out).sequence(conv_state).whole_numbers(cache_seqlens)
        call.parameter(weight).parameter(bias)
        call.integers(*x.shape, weight.shape[1], conv_state.shape[2], silu).run(LIBRARY, "conv1d_update")
    return out


def _call(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> CudaCall:
    """What both directions of the op begin with: the inputs and the sizes."""
    call = CudaCall(x).sequence(x).parameter(weight).parameter(bias).whole_numbers(seq_idx)
    return call.integers(*x.shape, weight.shape[1], silu, reverse)


def _fits(value: Tensor | None, *shape: int) -> bool:
    return value is None or tuple(value.shape) == shape


def _runs(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels do it; what does not fit together is left to PyTorch, which says so."""
    if x.dim() != 3 or weight.dim() != 2 or not 0 < weight.shape[1] <= MAX_WIDTH or weight.shape[0] != x.shape[1]:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    narrow = weight.dtype is not torch.float64 and not weight.is_complex()
    return x.dtype in ELEMENTS and narrow and x.shape[0] <= MAX_BATCH
