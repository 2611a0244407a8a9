"""The causal convolution as kernels that triton compiles for the GPU at hand.

    b batch, d channels, l length, w conv width

Each function takes what its op takes and returns what that returns, or None for what the kernels do not do: fp64 and
complex numbers. They compute in fp32. A program has one tile of (tokens, channels), wide along the axis that is
contiguous in memory. The sums that make up the gradients of the taps are taken per program and added up by PyTorch,
so results do not change from call to call.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZES = ["channels", "length", "time_blocks", "channel_blocks", "new", "size"]
DIRECT = 8  # taps up to which the backward computes dx at once; for more it stores the gradient of the sum first

# --- kernels --------------------------------------------------------------------------------------------------------
#
# A tensor comes with its strides, as a tuple: (pointer, b, d, l) of a sequence, (pointer, b, l) of `seq_idx`,
# (pointer, d, w) of the taps, (pointer, d) of the bias. Offsets are 64 bits wide. SIGN is 1, or -1 for the taps that
# look ahead: tap w - 1 - shift meets the column SIGN * shift before the output's.


@triton.jit
def _tile(time_blocks, channel_blocks, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):
    """Picture, tokens (tokens, 1) and channels (1, channels) of the program, 64 bits wide."""
    program = tl.program_id(0).to(tl.int64)
    tokens = program // channel_blocks % time_blocks * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    channels = program % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return program // channel_blocks // time_blocks, tokens, channels


@triton.jit
def _column(x, picture, channels, tokens, n_channels, length):
    """A tile of a sequence in fp32, zeros where there is no such token or channel."""
    inside = (tokens >= 0) & (tokens < length) & (channels < n_channels)
    at = x[0] + picture * x[1] + (channels * x[2] + tokens * x[3])
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _tap(weight, channels, n_channels, tap):
    """(1, channels) in fp32."""
    at = weight[0] + channels * weight[1] + tap * weight[2]
    return tl.load(at, mask=channels < n_channels, other=0.0).to(tl.float32)


@triton.jit
def _same(seq_idx, picture, tokens, others, length):
    """(tokens, 1): whether two columns, where they exist, belong to one document."""
    start = seq_idx[0] + picture * seq_idx[1]
    mine = tl.load(start + tokens * seq_idx[2], mask=(tokens >= 0) & (tokens < length), other=0)
    return mine == tl.load(start + others * seq_idx[2], mask=(others >= 0) & (others < length), other=0)


@triton.jit
def _sum(x, weight, bias, seq_idx, picture, tokens, channels, n_channels, length,
         WIDTH: tl.constexpr, SIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The convolution before its activation."""
    total = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    if bias is not None:
        total += tl.load(bias[0] + channels * bias[1], mask=channels < n_channels, other=0.0).to(tl.float32)
    for shift in tl.static_range(WIDTH):
        source = tokens - SIGN * shift
        term = _column(x, picture, channels, source, n_channels, length)
        if seq_idx is not None:
            term = tl.where(_same(seq_idx, picture, tokens, source, length), term, 0.0)
        total += term * _tap(weight, channels, n_channels, WIDTH - 1 - shift)
    return total


@triton.jit(do_not_specialize=SIZES)
def conv1d_kernel(x, weight, bias, seq_idx, out, channels, length, time_blocks, channel_blocks,
             SILU: tl.constexpr, WIDTH: tl.constexpr, SIGN: tl.constexpr,
             BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """out = act(bias + sum of taps * columns)."""
    picture, tokens, own = _tile(time_blocks, channel_blocks, BLOCK_L, BLOCK_D)
    y = _sum(x, weight, bias, seq_idx, picture, tokens, own, channels, length, WIDTH, SIGN, BLOCK_L, BLOCK_D)
    if SILU:
        y *= 1.0 / (1.0 + tl.exp(-y))
    at = out[0] + picture * out[1] + (own * out[2] + tokens * out[3])
    tl.store(at, y, mask=(tokens < length) & (own < channels))


@triton.jit
def _slope(dout, x, weight, bias, seq_idx, picture, tokens, channels, n_channels, length, SILU: tl.constexpr,
           WIDTH: tl.constexpr, SIGN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The gradient of the convolution before its activation."""
    grad = _column(dout, picture, channels, tokens, n_channels, length)
    if SILU:
        y = _sum(x, weight, bias, seq_idx, picture, tokens, channels, n_channels, length,
                 WIDTH, SIGN, BLOCK_L, BLOCK_D)  # fmt: skip
        opening = 1.0 / (1.0 + tl.exp(-y))
        grad *= opening * (1.0 + y * (1.0 - opening))
    return grad


@triton.jit(do_not_specialize=SIZES)
def conv1d_backward_kernel(dout, x, weight, bias, seq_idx, found, sums, channels, length, time_blocks, channel_blocks,
              DIRECT: tl.constexpr, SILU: tl.constexpr, WIDTH: tl.constexpr, SIGN: tl.constexpr,
              BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The gradient of x in `found`, or, unless DIRECT, that of the convolution before its activation.

    sums (b, time blocks, w + 1, d) get those of the taps and of the bias, summed over the program's tokens.
    """
    picture, tokens, own = _tile(time_blocks, channel_blocks, BLOCK_L, BLOCK_D)
    grad = _slope(dout, x, weight, bias, seq_idx, picture, tokens, own, channels, length,
                  SILU, WIDTH, SIGN, BLOCK_L, BLOCK_D)  # fmt: skip
    row = sums + (tl.program_id(0) // channel_blocks).to(tl.int64) * ((WIDTH + 1) * channels) + own
    tl.store(row + WIDTH * channels, tl.sum(grad, 0, keep_dims=True), mask=own < channels)
    for shift in tl.static_range(WIDTH):
        source = tokens - SIGN * shift
        product = grad * _column(x, picture, own, source, channels, length)
        if seq_idx is not None:
            product = tl.where(_same(seq_idx, picture, tokens, source, length), product, 0.0)
        tl.store(row + (WIDTH - 1 - shift) * channels, tl.sum(product, 0, keep_dims=True), mask=own < channels)
    if DIRECT:
        grad *= _tap(weight, own, channels, WIDTH - 1)
        for shift in tl.static_range(1, WIDTH):
            target = tokens + SIGN * shift
            term = _slope(dout, x, weight, bias, seq_idx, picture, target, own, channels, length,
                          SILU, WIDTH, SIGN, BLOCK_L, BLOCK_D)  # fmt: skip
            if seq_idx is not None:
                term = tl.where(_same(seq_idx, picture, tokens, target, length), term, 0.0)
            grad += term * _tap(weight, own, channels, WIDTH - 1 - shift)
    at = found[0] + picture * found[1] + (own * found[2] + tokens * found[3])
    tl.store(at, grad, mask=(tokens < length) & (own < channels))


@triton.jit(do_not_specialize=SIZES)
def conv1d_update_kernel(x, state, weight, bias, seen, out, channels, new, size, channel_blocks,
            SILU: tl.constexpr, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """As many new columns after those in the state (pointer, b, d, s), which takes them in.

    `seen` (b,) tells how many columns the circular buffer has taken so far; None: the state is a window.
    """
    program = tl.program_id(0).to(tl.int64)
    picture = program // channel_blocks
    own = program % channel_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = own < channels
    kept = state[0] + picture * state[1] + own * state[2]
    columns = x[0] + picture * x[1] + own * x[2]
    start = tl.cast(size, tl.int64)  # the slot of the column that comes next, were there no end
    if seen is not None:
        start = tl.load(seen + picture).to(tl.int64) % size
    for token in range(new):
        y = tl.zeros((BLOCK_D,), tl.float32)
        if bias is not None:
            y += tl.load(bias[0] + own * bias[1], mask=mask, other=0.0).to(tl.float32)
        for shift in tl.static_range(WIDTH):
            column = tl.zeros((BLOCK_D,), tl.int64) + (token - shift)
            slot = start + column
            if seen is not None:
                slot = (slot + size) % size
            fresh = tl.load(columns + column * x[3], mask=mask & (column >= 0), other=0.0)
            old = tl.load(kept + slot * state[3], mask=mask & (column < 0), other=0.0).to(fresh.dtype)
            tap = tl.load(weight[0] + own * weight[1] + (WIDTH - 1 - shift) * weight[2], mask=mask, other=0.0)
            y += (fresh.to(tl.float32) + old.to(tl.float32)) * tap.to(tl.float32)
        if SILU:
            y *= 1.0 / (1.0 + tl.exp(-y))
        tl.store(out + (picture * channels + own) * new + token, y, mask=mask)
    slots = tl.arange(0, BLOCK_S)[:, None].to(tl.int64)
    both = (slots < size) & mask[None, :]
    if seen is not None:
        column = (slots - start + size) % size  # the first to come to this slot, then the last of those that do
        column = tl.where(column < new, column + (new - 1 - column) // size * size, -1)
        source = slots
    else:
        column = slots + new - size
        source = slots + new
    old = tl.load(kept[None, :] + source * state[3], mask=both & (column < 0), other=0.0)
    fresh = tl.load(columns[None, :] + column * x[3], mask=both & (column >= 0), other=0.0).to(old.dtype)
    tl.debug_barrier()
    tl.store(kept[None, :] + slots * state[3], tl.where(column < 0, old, fresh), mask=both)


# --- launches -------------------------------------------------------------------------------------------------------


def conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> Tensor | None:
    """The op `causal_conv1d::conv1d`."""
    if not _runs(x, weight, bias, seq_idx):
        return None
    out = torch.empty_like(x)
    _correlate(x, weight, bias, seq_idx, silu, reverse, out)
    return out


def _correlate(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool, out: Tensor
) -> None:
    if x.numel():
        grid, sizes, options = _plan(x, weight, reverse)
        conv1d_kernel[grid](*map(_view, (x, weight, bias, seq_idx, out)), *sizes, SILU=silu, **options)


def conv1d_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The op `causal_conv1d::conv1d_backward`."""
    if not _runs(x, weight, bias, seq_idx) or dout.shape != x.shape:
        return None
    dx = torch.empty_like(x)
    width = weight.shape[1]
    direct = width <= DIRECT
    grid, sizes, options = _plan(x, weight, reverse)
    sums = x.new_empty((x.shape[0] * sizes[2], width + 1, x.shape[1]), dtype=torch.float32)
    if x.numel():
        found = dx if direct else torch.empty_like(x, dtype=torch.float32)
        views = map(_view, (dout, x, weight, bias, seq_idx, found))
        conv1d_backward_kernel[grid](*views, sums, *sizes, DIRECT=direct, SILU=silu, **options)
        if not direct:  # The gradient of a causal correlation is the same correlation, run the other way.
            _correlate(found, weight, None, seq_idx, False, not reverse, dx)
    total = sums.sum(0)
    dweight = weight.new_empty(weight.shape).copy_(total[:-1].t())
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias).copy_(total[-1])
    return dx, dweight, dbias


def conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    silu: bool,
) -> Tensor | None:
    """The op `causal_conv1d::conv1d_update`."""
    if not _runs(x, weight, bias, None) or not _narrow(conv_state) or conv_state.shape[2] == 0:
        return None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    batch, channels, new = x.shape
    size = conv_state.shape[2]
    slots = triton.next_power_of_2(size)
    own = max(1, min(64, 4096 // slots))
    blocks = triton.cdiv(channels, own)
    seen = None if cache_seqlens is None else cache_seqlens.contiguous()
    conv1d_update_kernel[(batch * blocks,)](
        *map(_view, (x, conv_state, weight, bias)), seen, out, channels, new, size, blocks,
        SILU=silu, WIDTH=weight.shape[1], BLOCK_S=slots, BLOCK_D=own, num_warps=2, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _runs(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> bool:
    """Whether the kernels do it; what does not fit together is left to PyTorch, which says so."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] == 0 or weight.shape[0] != x.shape[1]:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    if seq_idx is not None and seq_idx.shape != (x.shape[0], x.shape[2]):
        return False
    return all(value is None or _narrow(value) for value in (x, weight, bias))


def _narrow(value: Tensor) -> bool:
    return value.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _view(value: Tensor | None) -> tuple[Any, ...] | None:
    return None if value is None else (value, *value.stride())


def _plan(x: Tensor, weight: Tensor, reverse: bool) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """The grid, (channels, tokens, blocks of tokens, blocks of channels), and the constants of the kernels."""
    batch, channels, length = x.shape
    tokens, own = _block(x.stride(1) == 1 and channels > 1)
    sizes = (channels, length, triton.cdiv(length, tokens), triton.cdiv(channels, own))
    options = _constants(weight.shape[1], reverse, tokens, own) | {"num_warps": 4, "enable_fp_fusion": True}
    return (batch * sizes[2] * sizes[3],), sizes, options


def _block(channel_last: bool) -> tuple[int, int]:
    """Tokens and channels of a program: rows of at least 128 bytes, and 8 numbers of a thread."""
    return (16, 64) if channel_last else (128, 8)


def _constants(width: int, reverse: bool, tokens: int, channels: int) -> dict[str, Any]:
    return {"WIDTH": width, "SIGN": -1 if reverse else 1, "BLOCK_L": tokens, "BLOCK_D": channels}


def variants() -> list[tuple[Any, dict[str, Any], dict[Any, Any]]]:
    """The kernels of the calls that matter, as (kernel, signature, constants), to compile without a GPU.

    Four taps with bias and SiLU, launched with `num_warps=4`, the update with 2. A tensor with strides has a tuple of
    types; a stride of 1 is a constant, by the path (argument, place in the tuple).
    """
    made = [
        _variant(kernel, dtype, channel_last, reverse)
        for kernel in (conv1d_kernel, conv1d_backward_kernel)
        for dtype in ("fp32", "bf16")
        for channel_last, reverse in ((True, False), (True, True), (False, False))
    ]
    return [*made, *(_variant(conv1d_update_kernel, dtype, False, False) for dtype in ("fp32", "bf16"))]


def _variant(kernel: Any, dtype: str, channel_last: bool, reverse: bool) -> tuple[Any, dict[str, Any], dict[Any, Any]]:
    constants: dict[Any, Any] = _constants(4, reverse, *_block(channel_last)) | {"SILU": True, "DIRECT": True}
    constants |= {"seq_idx": None, "seen": None, "BLOCK_S": 4}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    strides = {"weight": 2, "bias": 1} | dict.fromkeys(("dout", "x", "found", "state"), 3)
    if kernel is conv1d_kernel:
        strides["out"] = 3
    signature: dict[str, Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in strides:
            one = 2 if strides[name] == 3 and channel_last else strides[name]
            pointer = "*fp32" if strides[name] < 3 else f"*{dtype}"
            signature[name] = (pointer, *("constexpr" if at == one else "i32" for at in range(1, strides[name] + 1)))
            constants[index, one] = 1
        else:
            signature[name] = "i32" if name in SIZES else "*fp32" if name == "sums" else f"*{dtype}"
    return kernel, signature, constants
