"""The selective scan as kernels that triton compiles for the GPU at hand.

    b batch, d channels, l length, n state, g groups, k = d / g channels of a group, s directions

`scan` and `scan_backward` return None for what the kernels do not do: fp64 and complex numbers. They compute in fp32. A
program is one warp (more for large n) that runs a block of the channels of one picture through time, their states,
(n, channels), in registers; each direction is a launch, and the two of a bidirectional scan meet in fp32. The backward
visits the chunks between kept states from the last to the first; within one, it notes the states every few tokens, and
computes those in between again, in registers. Every sum over channels or pictures is made of sums per program that
PyTorch adds up, so results do not change from call to call.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ssm.ops.selective_scan_native import runs
from mamba_ssm.ops.selective_scan_torch import CHUNK, Direction

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

SIZES = ["blocks", "groups", "width", "n_states", "length", "pictures"]

# --- kernels --------------------------------------------------------------------------------------------------------
#
# A tensor comes with its strides, as a tuple: (pointer, b, d, l) of a sequence, (pointer, b, g, n, l) of a varying and
# (pointer, d, n) of a constant B or C, (pointer, d) of a parameter. A place is a pointer, uniform over the program and
# found with 64 bits, and the offsets of a tile from it. SIGN is 1, or -1 to run from the last token to the first; WIDE
# tells that offsets along the tokens of one picture need 64 bits. Arithmetic that is not hoisted out of the loops saves
# more registers than it costs time, hence `disable_licm`.


@triton.jit
def _position(blocks, groups, width, BLOCK_D: tl.constexpr):
    """What the program works on: its block, group and picture; its first channel, the others after that one, and which
    of them exist.
    """
    program = tl.program_id(0)
    block = program % blocks
    group = (program // blocks) % groups
    own = tl.arange(0, BLOCK_D)
    picture = (program // blocks // groups).to(tl.int64)
    start = (group * width + block * BLOCK_D).to(tl.int64)
    return block.to(tl.int64), group.to(tl.int64), picture, start, own, own < width - block * BLOCK_D


@triton.jit
def _sequence(view, picture, start, own, origin):
    """Where the token lies that is visited first: the pointer to the first channel, (1, channels) offsets from it."""
    return view[0] + (picture * view[1] + start * view[2] + origin * view[3]), (own * view[2])[None, :]


@triton.jit
def _parameter(view, start, own, mask, missing):
    """(1, channels) of a parameter (d,), or `missing` where it is None."""
    if view is None:
        return missing
    else:
        return tl.load(view[0] + start * view[1] + (own * view[1])[None, :], mask=mask[None, :], other=0.0).to(
            tl.float32
        )


@triton.jit
def _per_state(view, start, own, n, both):
    """(n, channels) of a parameter (d, n)."""
    offsets = own[None, :] * view[1] + n[:, None] * view[2]
    return tl.load(view[0] + start * view[1] + offsets, mask=both, other=0.0).to(tl.float32)


@triton.jit
def _projection(view, picture, group, start, own, n, both, origin, VARIES: tl.constexpr):
    """B or C: the pointer to its first state at the token that is visited first and (n, 1) offsets from it, or, of a
    constant one, the (n, channels) themselves.
    """
    if VARIES:
        return view[0] + (picture * view[1] + group * view[2] + origin * view[4]), (n * view[3])[:, None]
    else:
        return _per_state(view, start, own, n, both)


@triton.jit
def _read(place, stride, first, ends, SIGN: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr):
    """As many tokens from the `first` visited as a tuple, in fp32; zeros behind the ends."""
    values = ()
    for step in tl.static_range(COUNT):
        at = tl.cast(first + step, tl.int64 if WIDE else tl.int32) * SIGN * stride + place[1]
        values = values + (tl.load(place[0] + at, mask=ends > first + step, other=0.0).to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return values


@triton.jit
def _read_projection(
    place, view, first, ends, VARIES: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr, COUNT: tl.constexpr
):
    """As many tokens of B or C as a tuple: (n, 1) of each if it varies, else the same (n, channels)."""
    if VARIES:
        return _read(place, view[4], first, ends, SIGN, WIDE, COUNT)
    else:
        values = ()
        for _ in tl.static_range(COUNT):
            values = values + (place,)  # type: ignore[assignment]  # noqa: RUF005
        return values


@triton.jit
def _step_size(raw, present, SOFTPLUS: tl.constexpr):
    """dt of a token; 0 where there is none, which leaves the state as it is.

    Softplus is max(x, 0) + 2 atanh(e / (2 + e)) with e = exp(-|x|), as exact where it is small as elsewhere. Above 20
    it is x in fp32.
    """
    dt = raw
    if SOFTPLUS:
        e = tl.exp(-tl.abs(raw))
        s = e / (2.0 + e)
        q = s * s
        series = 1.0 / 9 + q * (1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15)))
        series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * series)))
        dt = tl.maximum(raw, 0.0) + 2.0 * s * series
    return tl.where(present, dt, 0.0)


@triton.jit(do_not_specialize=SIZES)
def scan_kernel(u, delta, A, B, C, D, bias, z, other, out, last, states,
                blocks, groups, width, n_states, length,
                SOFTPLUS: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr,
                VARIES_B: tl.constexpr, VARIES_C: tl.constexpr, CHUNK: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """One direction: out = (y + other) * silu(z), where `other` and z are given.

    `last` (b, d, n) and `states`, (pointer, b, chunk, g, n, k) with contiguous channels, are filled where given.
    """
    _, group, picture, start, own, mask = _position(blocks, groups, width, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    both = mask[None, :] & (n < n_states)[:, None]
    ends = tl.where(mask, length, 0)[None, :]
    state_ends = tl.where(n < n_states, length, 0)[:, None]
    origin = tl.cast(0 if SIGN == 1 else length - 1, tl.int64)
    none = tl.zeros((1, BLOCK_D), tl.float32)
    rates = _per_state(A, start, own, n, both) * LOG2_E
    skip = _parameter(D, start, own, mask, none)
    shift = _parameter(bias, start, own, mask, none)
    B_place = _projection(B, picture, group, start, own, n, both, origin, VARIES_B)
    C_place = _projection(C, picture, group, start, own, n, both, origin, VARIES_C)
    u_place = _sequence(u, picture, start, own, origin)
    delta_place = _sequence(delta, picture, start, own, origin)
    out_place = _sequence(out, picture, start, own, origin)
    if z is not None:
        z_place = _sequence(z, picture, start, own, origin)
    if other is not None:
        other_place = _sequence(other, picture, start, own, origin)
    if states is not None:
        border = states[0] + picture * states[1] + group * states[3]
        border += start - group * width
    state = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in tl.range(0, length, COUNT, disable_licm=True):
        if states is not None:
            at = tl.cast(first // CHUNK, tl.int64) * states[2]
            tl.store(border + at + (n[:, None] * states[4] + own[None, :]), state, mask=both & (first % CHUNK == 0))
        us = _read(u_place, u[3], first, ends, SIGN, WIDE, COUNT)
        raws = _read(delta_place, delta[3], first, ends, SIGN, WIDE, COUNT)
        Bs = _read_projection(B_place, B, first, state_ends, VARIES_B, SIGN, WIDE, COUNT)
        Cs = _read_projection(C_place, C, first, state_ends, VARIES_C, SIGN, WIDE, COUNT)
        for i in tl.static_range(COUNT):
            present = ends > first + i
            along = tl.cast(first + i, tl.int64 if WIDE else tl.int32) * SIGN
            dt = _step_size(raws[i] + shift, present, SOFTPLUS)
            state = tl.exp2(dt * rates) * state + (dt * us[i]) * Bs[i]
            y = tl.sum(state * Cs[i], 0, keep_dims=True) + skip * us[i]
            if other is not None:
                y += tl.load(other_place[0] + (along * other[3] + other_place[1]), mask=present, other=0.0)
            if z is not None:
                gate = tl.load(z_place[0] + (along * z[3] + z_place[1]), mask=present, other=0.0).to(tl.float32)
                y *= gate / (1.0 + tl.exp(-gate))
            tl.store(out_place[0] + (along * out[3] + out_place[1]), y, mask=present)
    if last is not None:
        tl.store(
            last + (picture * (groups * width) + start) * n_states + (own[None, :] * n_states + n[:, None]),
            state,
            mask=both,
        )


@triton.jit
def _advance(state, u, u_place, delta, delta_place, B, B_place, index, rates, shift, ends, state_ends,
             SOFTPLUS: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr, VARIES_B: tl.constexpr):  # fmt: skip
    """The state after the token that is visited at `index`."""
    present = ends > index
    along = tl.cast(index, tl.int64 if WIDE else tl.int32) * SIGN
    x = tl.load(u_place[0] + (along * u[3] + u_place[1]), mask=present, other=0.0).to(tl.float32)
    raw = tl.load(delta_place[0] + (along * delta[3] + delta_place[1]), mask=present, other=0.0).to(tl.float32)
    if VARIES_B:
        weight = tl.load(B_place[0] + (along * B[4] + B_place[1]), mask=state_ends > index, other=0.0).to(tl.float32)
    else:
        weight = B_place
    dt = _step_size(raw + shift, present, SOFTPLUS)
    return tl.exp2(dt * rates) * state + (dt * x) * weight


@triton.jit(do_not_specialize=SIZES)
def scan_backward_kernel(dout, dlast, states, u, delta, A, B, C, D, bias, z, other, y, du, ddelta, dz,
                         dA, dB, dC, dD, dbias, notes, blocks, groups, width, n_states, length, pictures,
                         SOFTPLUS: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr,
                         VARIES_B: tl.constexpr, VARIES_C: tl.constexpr, CHUNK: tl.constexpr,
                         BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, COUNT: tl.constexpr):  # fmt: skip
    """The gradients of one direction, given that of the gated output and, or None, that of the last state.

    The output before the gate is computed again where z is given: it goes to `y` for another direction, or, with what
    that one left in `other`, into dz. dA, dD, dbias and constant dB and dC are sums per picture, (b, d, n) or (b, d);
    varying dB and dC are sums per program, (blocks, b, g, l, n). `notes` has room for the states before each
    COUNT tokens of a chunk, and for those before each of as many tokens, per program.
    """
    block, group, picture, start, own, mask = _position(blocks, groups, width, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    both = mask[None, :] & (n < n_states)[:, None]
    present, existing = mask[None, :], (n < n_states)[:, None]
    ends = tl.where(mask, length, 0)[None, :]
    state_ends = tl.where(n < n_states, length, 0)[:, None]
    origin = tl.cast(0 if SIGN == 1 else length - 1, tl.int64)
    none = tl.zeros((1, BLOCK_D), tl.float32)
    rates = _per_state(A, start, own, n, both) * LOG2_E
    skip = _parameter(D, start, own, mask, none)
    shift = _parameter(bias, start, own, mask, none)
    B_place = _projection(B, picture, group, start, own, n, both, origin, VARIES_B)
    C_place = _projection(C, picture, group, start, own, n, both, origin, VARIES_C)
    u_place = _sequence(u, picture, start, own, origin)
    delta_place = _sequence(delta, picture, start, own, origin)
    dout_place = _sequence(dout, picture, start, own, origin)
    du_place = _sequence(du, picture, start, own, origin)
    ddelta_place = _sequence(ddelta, picture, start, own, origin)
    if z is not None:
        z_place = _sequence(z, picture, start, own, origin)
    if other is not None:
        other_place = _sequence(other, picture, start, own, origin)
    if y is not None:
        y_place = _sequence(y, picture, start, own, origin)
    if dz is not None:
        dz_place = _sequence(dz, picture, start, own, origin)
    border = states[0] + picture * states[1] + group * states[3]
    border += start - group * width
    borders = notes + tl.program_id(0).to(tl.int64) * ((CHUNK // COUNT + COUNT) * BLOCK_N * BLOCK_D)
    notes = borders + CHUNK // COUNT * BLOCK_N * BLOCK_D
    tile = n[:, None] * BLOCK_D + own[None, :]
    sums = (((block * pictures + picture) * groups + group) * length + origin) * n_states
    B_sums, C_sums = dB + sums, dC + sums
    parameter = picture * (groups * width) + start
    over_states = own[None, :] * n_states + n[:, None]
    carry = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)  # the gradient of the state after the tokens at hand
    sum_A, sum_B, sum_C = carry, carry, carry
    sum_D, sum_bias = none, none
    if dlast is not None:
        carry += tl.load(dlast + parameter * n_states + over_states, mask=both, other=0.0).to(tl.float32)
    chunks = (length + CHUNK - 1) // CHUNK
    for behind in tl.range(0, chunks, disable_licm=True):
        chunk = chunks - 1 - behind
        place = border + chunk.to(tl.int64) * states[2]
        state = tl.load(place + (n[:, None] * states[4] + own[None, :]), mask=both, other=0.0)
        parts = (tl.minimum(length - chunk * CHUNK, CHUNK) + COUNT - 1) // COUNT
        tl.store(borders + tile, state)
        for part in tl.range(1, parts, disable_licm=True):
            first = chunk * CHUNK + (part - 1) * COUNT
            for i in tl.range(0, tl.minimum(length - first, COUNT), disable_licm=True):
                state = _advance(state, u, u_place, delta, delta_place, B, B_place, first + i, rates, shift, ends,
                                 state_ends, SOFTPLUS, SIGN, WIDE, VARIES_B)  # fmt: skip
            tl.store(borders + (part * (BLOCK_N * BLOCK_D) + tile), state)
        tl.debug_barrier()
        for left in tl.range(0, parts, disable_licm=True):
            part = parts - 1 - left
            first = chunk * CHUNK + part * COUNT
            count = tl.minimum(length - first, COUNT)
            state = tl.load(borders + (part * (BLOCK_N * BLOCK_D) + tile))
            for i in tl.range(0, count, disable_licm=True):
                tl.store(notes + (i * (BLOCK_N * BLOCK_D) + tile), state)
                state = _advance(state, u, u_place, delta, delta_place, B, B_place, first + i, rates, shift, ends,
                                 state_ends, SOFTPLUS, SIGN, WIDE, VARIES_B)  # fmt: skip
            tl.debug_barrier()
            for back in tl.range(0, count, disable_licm=True):
                i = count - 1 - back
                along = tl.cast(first + i, tl.int64 if WIDE else tl.int32) * SIGN
                before = tl.load(notes + (i * (BLOCK_N * BLOCK_D) + tile))
                dy = tl.load(dout_place[0] + (along * dout[3] + dout_place[1]), mask=present, other=0.0).to(tl.float32)
                x = tl.load(u_place[0] + (along * u[3] + u_place[1]), mask=present, other=0.0).to(tl.float32)
                raw = tl.load(delta_place[0] + (along * delta[3] + delta_place[1]), mask=present, other=0.0)
                raw = raw.to(tl.float32) + shift
                if VARIES_B:
                    b = tl.load(B_place[0] + (along * B[4] + B_place[1]), mask=existing, other=0.0).to(tl.float32)
                else:
                    b = B_place
                if VARIES_C:
                    c = tl.load(C_place[0] + (along * C[4] + C_place[1]), mask=existing, other=0.0).to(tl.float32)
                else:
                    c = C_place
                dt = _step_size(raw, present, SOFTPLUS)
                if z is not None:
                    gate = tl.load(z_place[0] + (along * z[3] + z_place[1]), mask=present, other=0.0).to(tl.float32)
                    opening = 1.0 / (1.0 + tl.exp(-gate))
                    total = tl.sum(state * c, 0, keep_dims=True) + skip * x
                    if other is not None:
                        total += tl.load(other_place[0] + (along * other[3] + other_place[1]), mask=present, other=0.0)
                    if y is not None:
                        tl.store(y_place[0] + (along * y[3] + y_place[1]), total, mask=present)
                    if dz is not None:
                        slope = opening * (1.0 + gate * (1.0 - opening))
                        tl.store(dz_place[0] + (along * dz[3] + dz_place[1]), dy * total * slope, mask=present)
                    dy *= gate * opening
                grad = c * dy + carry
                if VARIES_C:
                    tl.store(
                        C_sums + (along * n_states + n[:, None]), tl.sum(state * dy, 1, keep_dims=True), mask=existing
                    )
                else:
                    sum_C += state * dy
                if VARIES_B:
                    from_B = tl.sum(grad * (dt * x), 1, keep_dims=True)
                    tl.store(B_sums + (along * n_states + n[:, None]), from_B, mask=existing)
                else:
                    sum_B += grad * (dt * x)
                through_input = tl.sum(grad * b, 0, keep_dims=True)
                carry = grad * tl.exp2(dt * rates)
                exponent = carry * before  # the gradient of dt * A
                sum_A += exponent * dt
                step = x * through_input + tl.sum(exponent * rates, 0, keep_dims=True) * LN_2
                if SOFTPLUS:
                    step = tl.where(raw > 20.0, step, step / (1.0 + tl.exp(-raw)))
                tl.store(du_place[0] + (along * du[3] + du_place[1]), dt * through_input + skip * dy, mask=present)
                tl.store(ddelta_place[0] + (along * ddelta[3] + ddelta_place[1]), step, mask=present)
                sum_bias += step
                sum_D += dy * x
                state = before
            tl.debug_barrier()
    tl.store(dA + parameter * n_states + over_states, sum_A, mask=both)
    if not VARIES_B:
        tl.store(dB + parameter * n_states + over_states, sum_B, mask=both)
    if not VARIES_C:
        tl.store(dC + parameter * n_states + over_states, sum_C, mask=both)
    tl.store(dD + parameter + own[None, :], sum_D, mask=mask[None, :])
    tl.store(dbias + parameter + own[None, :], sum_bias, mask=mask[None, :])


# --- launches -------------------------------------------------------------------------------------------------------


def scan(
    directions: list[Direction], z: Tensor | None, softplus: bool, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `selective_scan_torch.scan_forward`: a launch for each direction, which adds what those before it gave."""
    if not _fits(directions, z):
        return None
    u, A = directions[0].u, directions[0].A
    states = _borders(directions[0], len(directions), keep_states)
    last = u.new_empty((u.shape[0], *A.shape), dtype=torch.float32)
    out = torch.empty_like(u)
    total = None
    for index, direction in enumerate(directions):
        is_last = direction is directions[-1]
        into = out if is_last or out.dtype is torch.float32 else torch.empty_like(u, dtype=torch.float32)
        kept = states[:, :, index] if keep_states else None
        _run(direction, z if is_last else None, total, into, last if index == 0 else None, kept, softplus)
        total = into
    return out, last, states


def scan_backward(
    directions: list[Direction],
    z: Tensor | None,
    dout: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    softplus: bool,
) -> list[Tensor] | None:
    """The gradients of `scan`: of each direction's tensors, in their order, then of z; of those that were given."""
    if not _fits(directions, z, dout, states):
        return None
    dz = None if z is None else torch.empty_like(z)
    states = states.contiguous()
    gradients: list[Tensor] = []
    total = None  # of the outputs before the gate
    for index, direction in enumerate(directions):
        is_last = direction is directions[-1]
        y = None if z is None or is_last else torch.empty_like(z, dtype=torch.float32)
        of_last = dlast if index == 0 else None
        gradients += _run_back(
            direction, z, total, y, dz if is_last else None, dout, of_last, states[:, :, index], softplus
        )
        total = y
    return [*gradients, *([] if dz is None else [dz])]


def _fits(directions: list[Direction], z: Tensor | None, dout: Tensor | None = None, states: Any = None) -> bool:
    """Whether the kernels do it; what does not fit together is left to PyTorch, which says so."""
    if not all(map(runs, directions)) or (states is not None and states.dtype is not torch.float32):
        return False
    shape = directions[0].u.shape
    if len({(own.u.shape, own.A.shape, own.groups) for own in directions}) != 1:
        return False
    return all(value is None or value.shape == shape for value in (z, dout))


@dataclass(frozen=True)
class Plan:
    """How the kernels go about states of one size: numbers of states, channels and warps of a program."""

    states: int
    channels: int
    warps: int

    @staticmethod
    def of(states: int) -> Plan:
        """At most 16 states of a program fall to a thread; its loads of 16 channels fill whole sectors of memory."""
        padded = triton.next_power_of_2(max(1, states))
        channels = 32 if padded == 1 else 16 if padded <= 32 else 8
        warps = max(1, padded * channels // 512)
        return Plan(padded, channels, warps)


def _view(value: Tensor | None) -> tuple[Any, ...] | None:
    return None if value is None else (value, *value.stride())


def _borders(direction: Direction, directions: int, keep: bool) -> Tensor:
    """Room for the states before each chunk."""
    u, groups = direction.u, direction.groups
    chunks = triton.cdiv(u.shape[2], CHUNK)
    shape = (u.shape[0], chunks, directions, groups, direction.A.shape[1], u.shape[1] // groups) if keep else (0,)
    return u.new_empty(shape, dtype=torch.float32)


def _sizes(direction: Direction, plan: Plan) -> tuple[int, int, int, int, int]:
    """Blocks of channels of a group, groups, channels of a group, states, tokens."""
    width = direction.u.shape[1] // direction.groups
    return triton.cdiv(width, plan.channels), direction.groups, width, direction.A.shape[1], direction.u.shape[2]


def _options(direction: Direction, softplus: bool, plan: Plan, tokens: int, views: tuple[Any, ...]) -> dict[str, Any]:
    u = direction.u
    sequences = [view for view in views if view is not None and view[0].dim() in (3, 4)]
    return {
        "SOFTPLUS": softplus,
        "SIGN": -1 if direction.reverse else 1,
        "VARIES_B": direction.B.dim() == 4,
        "VARIES_C": direction.C.dim() == 4,
        "WIDE": any(_reach(view[0]) >= 2**31 for view in sequences) or u.shape[2] * direction.A.shape[1] >= 2**31,
        "CHUNK": CHUNK,
        "BLOCK_N": plan.states,
        "BLOCK_D": plan.channels,
        "COUNT": tokens,
        "num_warps": plan.warps,
        "enable_fp_fusion": True,
    }


def _reach(value: Tensor) -> int:
    """How many elements apart those of one picture and group may lie in memory, or a bound on it."""
    return sum((size - 1) * stride for size, stride in zip(value.shape[1:], value.stride()[1:], strict=True)) + 64


def _arguments(direction: Direction) -> tuple[Any, ...]:
    """Its tensors as views, in the schema's order; those of (d, n) with contiguous channels, as the states have."""
    own = direction
    A, B, C = (value.t().contiguous().t() if value.dim() == 2 else value for value in (own.A, own.B, own.C))
    return tuple(_view(value) for value in (own.u, own.delta, A, B, C, own.D, own.delta_bias))


NOTED = 8  # tokens whose states the backward notes at a time
FORWARD_TOKENS = 2  # of which the forward reads all before it computes


def _run(
    direction: Direction,
    z: Tensor | None,
    other: Tensor | None,
    out: Tensor,
    last: Tensor | None,
    states: Tensor | None,
    softplus: bool,
) -> None:
    """Launch `scan_kernel`. states: (b, chunks, g, n, k) of this direction."""
    plan = Plan.of(direction.A.shape[1])
    sizes = _sizes(direction, plan)
    programs = sizes[0] * sizes[1] * direction.u.shape[0]
    views = (*_arguments(direction), _view(z), _view(other), _view(out))
    if programs:
        options = _options(direction, softplus, plan, FORWARD_TOKENS, views)
        scan_kernel[(programs,)](*views, last, _view(states), *sizes, **options)


def _run_back(
    direction: Direction,
    z: Tensor | None,
    other: Tensor | None,
    y: Tensor | None,
    dz: Tensor | None,
    dout: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    softplus: bool,
) -> list[Tensor]:
    """Launch `scan_backward_kernel`; the gradients of those tensors of the direction that are given, in their order."""
    plan = Plan.of(direction.A.shape[1])
    sizes = _sizes(direction, plan)
    u, A = direction.u, direction.A
    batch, programs = u.shape[0], sizes[0] * sizes[1] * u.shape[0]
    per_channel = torch.zeros if programs == 0 else torch.empty
    room: dict[str, Any] = {"dtype": torch.float32, "device": u.device}
    per_state = (batch, *A.shape)
    varying = (sizes[0], batch, sizes[1], u.shape[2], A.shape[1])
    du, ddelta = torch.empty_like(u), torch.empty_like(direction.delta)
    dA = per_channel(per_state, **room)
    dB, dC = (per_channel(varying if v.dim() == 4 else per_state, **room) for v in (direction.B, direction.C))
    dD, dbias = (per_channel(per_state[:2], **room) for _ in range(2))
    notes = torch.empty(programs * (CHUNK // NOTED + NOTED) * plan.states * plan.channels, **room)
    views = (*_arguments(direction), *map(_view, (z, other, y, du, ddelta, dz)))
    if programs:
        options = _options(direction, softplus, plan, NOTED, (*views, _view(dout)))
        scan_backward_kernel[(programs,)](
            _view(dout), None if dlast is None else dlast.contiguous(), _view(states),
            *views, dA, dB, dC, dD, dbias, notes, *sizes, batch, **options,
        )  # fmt: skip
    found = [du, ddelta, dA.sum(0), _summed(dB), _summed(dC), dD.sum(0), dbias.sum(0)]
    tensors = (u, direction.delta, A, direction.B, direction.C, direction.D, direction.delta_bias)
    return [_as(like, value) for like, value in zip(tensors, found, strict=True) if like is not None]


def _summed(partial: Tensor) -> Tensor:
    """Sums per program (blocks, b, g, l, n) as (b, g, n, l), sums per picture (b, d, n) as (d, n)."""
    return partial.sum(0).transpose(2, 3) if partial.dim() == 5 else partial.sum(0)


def _as(like: Tensor, value: Tensor) -> Tensor:
    """A gradient in the dtype and layout of its argument; not a copy where it was made so."""
    if like.dim() == 3:
        return value
    return torch.empty_like(like).copy_(value)


def variants() -> list[tuple[Any, dict[str, Any], dict[Any, Any]]]:
    """The kernels of the calls that matter, as (kernel, signature, constants), to compile without a GPU.

    States of 16 numbers, launched with `num_warps=1`: sequences with contiguous channels and B and C with contiguous
    states, as a block has them, and all with contiguous tokens. A tensor with strides has a tuple of types; a stride of
    1 is a constant, by the path (argument, place in the tuple).
    """
    return [
        _variant(kernel, dtype, channel_last, gated, sign)
        for kernel in (scan_kernel, scan_backward_kernel)
        for dtype in ("fp32", "bf16")
        for channel_last, gated, sign in ((True, True, 1), (True, True, -1), (False, True, 1), (False, False, -1))
    ]


# Of each view: its strides, and which of them is 1 where channels or tokens are contiguous.
LAYOUTS = {"A": (2, 1, 1), "D": (1, 1, 1), "bias": (1, 1, 1), "B": (4, 3, 4), "C": (4, 3, 4), "states": (5, 5, 5)}
LAYOUTS |= dict.fromkeys(("u", "delta", "z", "other", "out", "dout", "y", "du", "ddelta", "dz"), (3, 2, 3))


def _variant(
    kernel: Any, dtype: str, channel_last: bool, gated: bool, sign: int
) -> tuple[Any, dict[str, Any], dict[Any, Any]]:
    plan = Plan.of(16)
    tokens = FORWARD_TOKENS if kernel is scan_kernel else NOTED
    constants: dict[Any, Any] = {"SOFTPLUS": True, "SIGN": sign, "VARIES_B": True, "VARIES_C": True, "WIDE": False}
    constants |= {"CHUNK": CHUNK, "BLOCK_N": plan.states, "BLOCK_D": plan.channels, "COUNT": tokens}
    missing = (
        ["dlast", "last"] + ([] if gated else ["z", "other", "y", "dz"]) + (["y"] if sign < 0 else ["other", "dz"])
    )
    constants |= {name: None for name in missing if name in kernel.arg_names}
    signature: dict[str, Any] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in LAYOUTS:
            strides, *ones = LAYOUTS[name]
            pointer = "*fp32" if name in ("A", "D", "bias", "other", "y", "states") else f"*{dtype}"
            one = ones[0 if channel_last else 1]
            signature[name] = (pointer, *("constexpr" if at == one else "i32" for at in range(1, strides + 1)))
            constants[index, one] = 1
        else:
            signature[name] = "i32" if name in SIZES else "*fp32"
    return kernel, signature, constants
