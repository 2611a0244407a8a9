"""The definition of the causal depthwise convolution: what every kernel is held to.

b batch, d channels, l length, w conv width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    *,
    silu: bool = False,
    reverse: bool = False,
) -> Tensor:
    """Correlate each channel with its own `w` taps, causally, and pass the sum through SiLU if asked.

        out[b, d, l] = act(bias[d] + sum_k weight[d, k] * x[b, d, l - (w - 1) + k])

    Positions before the start are `initial_states` or zero; with `seq_idx` a tap counts only where its position has
    the index of the output's. `reverse` runs from the end to the start: the taps then look ahead.

    Args:
        x: (b, d, l).
        weight: (d, w).
        bias: (d,).
        seq_idx: (b, l) integers.
        initial_states: (b, d, w - 1).

    Returns:
        (b, d, l) in the dtype of `x`. Accumulates in at least fp32. Source: arXiv 2312.00752, section 3.4.
    """
    if reverse:
        flipped = conv1d_reference(
            x.flip(-1), weight, bias, None if seq_idx is None else seq_idx.flip(-1), initial_states, silu=silu
        )
        return flipped.flip(-1)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    width = weight.shape[-1]
    history = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    padded = torch.cat([history, x], dim=-1).to(dtype)
    taps = padded.unfold(-1, width, 1)  # (b, d, l, w)
    if seq_idx is not None:
        index = F.pad(seq_idx, (width - 1, 0), value=-1)
        taps = taps * (index.unfold(-1, width, 1) == seq_idx[..., None])[:, None]
    out = (taps * weight.to(dtype)[:, None]).sum(-1)
    if bias is not None:
        out = out + bias.to(dtype)[:, None]
    return (F.silu(out) if silu else out).to(x.dtype)


def conv1d_update_reference(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    *,
    silu: bool = False,
) -> Tensor:
    """Convolve `l` new columns after the history in `conv_state`, and store them there.

    Args:
        x: (b, d, l), the new columns.
        conv_state: (b, d, s) with s >= w - 1, changed in place: a sliding window, or, with `cache_seqlens`, a
            circular buffer that the next column enters at `cache_seqlens % s`.
        weight: (d, w).
        bias: (d,).
        cache_seqlens: (b,) integers, the number of columns already stored.

    Returns:
        (b, d, l) in the dtype of `x`.
    """
    length, width, size = x.shape[-1], weight.shape[-1], conv_state.shape[-1]
    if cache_seqlens is None:
        window = torch.cat([conv_state.to(x.dtype), x], dim=-1)
        history = window[..., size - (width - 1) : size]
        conv_state.copy_(window[..., -size:])
    else:
        start = cache_seqlens.long()[:, None, None].expand(-1, x.shape[1], -1)
        past = torch.arange(1 - width, 0, device=x.device)
        history = conv_state.gather(-1, (start + past) % size).to(x.dtype)
        kept = min(length, size)  # of more columns than the buffer holds, the last ones stay
        future = torch.arange(length - kept, length, device=x.device)
        conv_state.scatter_(-1, (start + future) % size, x[..., length - kept :].to(conv_state.dtype))
    return conv1d_reference(x, weight, bias, initial_states=history, silu=silu)
