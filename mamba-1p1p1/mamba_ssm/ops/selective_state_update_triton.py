"""One token of Mamba's recurrence as a triton kernel, on a GPU.

b batch, h heads, d channels (of one head), n state, g groups. A program advances BLOCK_D channels of one head by all
their states, as a tile of BLOCK_D rows and BLOCK_N >= n columns, in fp32.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TILE = 512  # numbers of the state that a program takes where a channel has fewer: small batches need many programs
# Of the kernel's tensors, in its order; the groups of B and C stand in the place of heads.
AXES = {
    "state": "bhdn",
    "x": "bhd",
    "dt": "bhd",
    "A": "hdn",
    "B": "bhn",
    "C": "bhn",
    "D": "hd",
    "z": "bhd",
    "dt_bias": "hd",
    "out": "bhd",
}


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact also where it is tiny: what rounding takes from 1 + e, the quotient gives back."""
    e = tl.exp(-tl.abs(x))
    rounded = 1.0 + e
    lost = rounded == 1.0
    log1p = tl.log(rounded) * (e / tl.where(lost, 1.0, rounded - 1.0))
    return tl.maximum(x, 0.0) + tl.where(lost, e, log1p)


@triton.jit
def _place(view, b, h, d, n):
    return view[0] + (b * view[1] + h * view[2] + d * view[3] + n * view[4])


@triton.jit
def _load(view, b, h, d, n, inside):
    return tl.load(_place(view, b, h, d, n), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _update_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, out, heads, heads_per_group, channels, numbers,
    SOFTPLUS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The tensors as `_view` makes them; D, z and dt_bias may be None. channels: d. numbers: n."""
    b, h = tl.program_id(0).to(tl.int64) // heads, tl.program_id(0).to(tl.int64) % heads
    g = h // heads_per_group
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[None, :].to(tl.int64)
    rows, columns = d < channels, n < numbers

    step = _load(dt, b, h, d, 0, rows)
    if dt_bias is not None:
        step += _load(dt_bias, 0, h, d, 0, rows)
    if SOFTPLUS:
        step = _softplus(step)
    u = _load(x, b, h, d, 0, rows)
    decay = tl.exp(step * _load(A, 0, h, d, n, rows & columns))
    new = decay * _load(state, b, h, d, n, rows & columns) + step * u * _load(B, b, g, 0, n, columns)
    tl.store(_place(state, b, h, d, n), new, mask=rows & columns)

    y = tl.sum(new * _load(C, b, g, 0, n, columns), axis=1, keep_dims=True)
    if D is not None:
        y += u * _load(D, 0, h, d, 0, rows)
    if z is not None:
        gate = _load(z, b, h, d, 0, rows)
        y *= gate * tl.sigmoid(gate)
    tl.store(_place(out, b, h, d, 0), y, mask=rows)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor | None:
    """Advance `state` in place and return the token's output; None for the dtypes that the kernel does not take."""
    if any(value is not None and value.dtype not in DTYPES for value in (state, x, dt, A, B, C, D, z, dt_bias)):
        return None
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    batch, heads, d, n = state.shape if state.dim() == 4 else (state.shape[0], 1, *state.shape[1:])
    groups = B.shape[1] if state.dim() == 4 else 1
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, out)
    views = [_view(value, axes, state.dim() == 4) for value, axes in zip(tensors, AXES.values(), strict=True)]
    blocks = _blocks(n)
    with torch.cuda.device_of(x):
        _update_kernel[(batch * heads, triton.cdiv(d, blocks["BLOCK_D"]))](
            *views, heads, heads // groups, d, n, dt_softplus, **blocks, enable_fp_fusion=True
        )
    if not state.is_inference():  # autograd must know of the overwriting where it kept the old state
        torch.autograd.graph.increment_version(state)
    return out


def variants() -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Typical kernels, their signatures and constants, for compiling them ahead of time."""
    found: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    optional = ("D", "z", "dt_bias")
    # dtypes of the state, of x and what belongs to it, of the parameters; which optional arguments are given; n
    for state, x, parameter, options, softplus, n in (
        ("fp32", "fp32", "fp32", (), False, 5),
        ("fp32", "bf16", "fp32", optional, True, 16),
        ("fp16", "fp16", "fp16", ("D", "dt_bias"), True, 128),
    ):
        dtypes = {"state": state, "A": parameter, "D": parameter, "dt_bias": parameter}
        constants = {**{name: None for name in optional if name not in options}, "SOFTPLUS": softplus, **_blocks(n)}
        views = {name: (f"*{dtypes.get(name, x)}", *["i32"] * 4) for name in AXES}
        sizes = dict.fromkeys(("heads", "heads_per_group", "channels", "numbers"), "i32")
        found.append((_update_kernel, {**views, **sizes, **dict.fromkeys(constants, "constexpr")}, constants))
    return found


def _view(value: Tensor | None, axes: str, has_heads: bool) -> tuple[Any, ...] | None:
    """The tensor and its strides along b, h (or g), d and n, which are 0 along an axis that it lacks."""
    if value is None:
        return None
    strides = dict(zip(axes if has_heads else axes.replace("h", ""), value.stride(), strict=True))
    return (value, *(strides.get(axis, 0) for axis in "bhdn"))


def _blocks(n: int) -> dict[str, int]:
    """The constants of a launch for states of n numbers."""
    block = triton.next_power_of_2(max(n, 1))
    return {"BLOCK_D": max(TILE // block, 1), "BLOCK_N": block}
