"""The selective scan, and the inside of a bidirectional block, on the compiled CPU kernels of `csrc/cpu`.

    b batch, d (in a block: e) channels, l length, n state, g groups, k = d / g, s directions, r dt rank, w conv width

Each function takes what its op takes and returns what that returns, or None for what the kernels do not do: fp64 and
complex numbers. fp16 is computed in fp32, bf16 is read and written as it is; states are in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from causal_conv1d.backend.call import Call, pointer
from causal_conv1d.backend.native import Library
from mamba_ssm.ops.selective_scan_torch import CHUNK, Direction, Gradients

LIBRARY = Library("mamba_ssm")


@dataclass(frozen=True)
class LowRank(Direction):
    """A direction whose `delta` holds r (b, r, l): `delta_weight` (d, r) times it are the step sizes."""

    delta_weight: Tensor | None = None


def runs(direction: Direction) -> bool:
    """Whether the kernels do such a scan; what does not fit together is left to PyTorch, which says so."""
    u, A = direction.u, direction.A
    if direction.dtype is not torch.float32 or A.is_complex() or u.dim() != 3 or A.dim() != 2:
        return False
    channels, states, groups = u.shape[1], A.shape[1], direction.groups
    varying = (u.shape[0], groups, states, u.shape[2])
    return (
        direction.delta.shape == u.shape
        and A.shape[0] == channels
        and channels % groups == 0
        and all(value.shape in ((channels, states), varying) for value in (direction.B, direction.C))
        and all(value is None or value.shape == (channels,) for value in (direction.D, direction.delta_bias))
    )


def scan(
    directions: Sequence[Direction], z: Tensor | None, softplus: bool, keep_states: bool, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `selective_scan_torch.scan_forward`, the output multiplied with `scale`."""
    first = directions[0]
    if not all(map(runs, directions)) or not _alike(directions) or (z is not None and z.shape != first.u.shape):
        return None
    call = _call_for(directions, [z])
    batch, channels, length = first.u.shape
    states, groups = first.A.shape[1], first.groups
    out = _empty_like(first.u, call.dtype)
    last = torch.empty((batch, channels, states), dtype=torch.float32)
    chunks = (length + CHUNK - 1) // CHUNK
    shape = (batch, chunks, len(directions), groups, states, channels // groups) if keep_states else (0,)
    borders = torch.empty(shape, dtype=torch.float32)

    call.integers(*_sizes(directions))
    _output(call, out, z, len(directions), scale)
    call.address(last).address(borders if keep_states else None)
    for direction in directions:
        _direction(call, direction, softplus)
    call.run(LIBRARY, "selective_scan")
    return out.to(first.u.dtype), last, borders


def _sizes(directions: Sequence[Direction]) -> tuple[int, ...]:
    """b, d, l, n, g and s, which the kernels read of the first direction."""
    first = directions[0]
    return *first.u.shape, first.A.shape[1], first.groups, len(directions)


def _alike(directions: Sequence[Direction]) -> bool:
    """Whether all are of the same sizes, which the kernels read of the first."""
    return len({(own.u.shape, own.A.shape, own.groups) for own in directions}) == 1


def _call_for(directions: Sequence[Direction], others: Sequence[Tensor | None]) -> Call:
    """A call in bf16 if everything that varies over time is, else in fp32."""
    sequences = [value for value in others if value is not None]
    for direction in directions:
        sequences += [direction.u, direction.delta, direction.B, direction.C]
    narrow = all(value.dtype == torch.bfloat16 for value in sequences)
    return Call(torch.bfloat16 if narrow else torch.float32)


def _direction(call: Call, direction: Direction, softplus: bool) -> None:
    call.sequence(direction.u).sequence(direction.delta).parameter(direction.A)
    _projection(call, direction.B)
    _projection(call, direction.C)
    call.parameter(direction.D).parameter(direction.delta_bias).integers(softplus, direction.reverse)
    weight = direction.delta_weight if isinstance(direction, LowRank) else None
    call.parameter(weight).integers(0 if weight is None else weight.shape[1])


def scan_backward(
    directions: Sequence[Direction],
    z: Tensor | None,
    dout: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    softplus: bool,
) -> list[Tensor] | None:
    """The gradients of `scan`: of each direction's tensors, in their order, then of z; of those that were given."""
    if not all(map(runs, directions)) or not _alike(directions) or states.dtype is not torch.float32:
        return None
    if any(value is not None and value.shape != directions[0].u.shape for value in (z, dout)):
        return None
    call = _call_for(directions, [z, dout])
    dz = None if z is None else _empty_like(z, call.dtype)
    found = [_gradients_of(direction, call.dtype) for direction in directions]
    scan_backward_into(call, found, dz, directions, z, dout, dlast, states, softplus)
    tensors: list[tuple[Tensor, Tensor | None]] = []
    for direction, own in zip(directions, found, strict=True):
        tensors += [(getattr(direction, name), value) for name, value in own.named(direction).items()]
    tensors += [] if z is None else [(z, dz)]
    return [_as(like, value) for like, value in tensors if like is not None and value is not None]


@dataclass(frozen=True)
class Room:
    """What the kernel fills with the gradients of one direction.

    Attributes:
        u, delta: (b, d, l), any strides.
        B, C: (b, g, l, n) of varying ones, alike in their strides, n contiguous; None of constant ones.
        record: A, then constant B and constant C, (d, n) each, then D and delta_bias, (d,) each.
    """

    u: Tensor
    delta: Tensor
    B: Tensor | None
    C: Tensor | None
    record: Tensor

    def named(self, direction: Direction) -> dict[str, Tensor]:
        """By the names of the arguments, in their order; also of D and delta_bias that are not there."""
        d, n = direction.A.shape
        count = 1 + (self.B is None) + (self.C is None)
        A, *fixed, D, bias = self.record.split([d * n] * count + [d] * 2)
        B, C = (fixed.pop(0).view(d, n) if value is None else value.transpose(2, 3) for value in (self.B, self.C))
        values = (self.u, self.delta, A.view(d, n), B, C, D, bias)
        return dict(zip(Gradients.__dataclass_fields__, values, strict=True))


def _gradients_of(direction: Direction, dtype: torch.dtype) -> Room:
    du, ddelta = (_empty_like(value, dtype) for value in (direction.u, direction.delta))
    (batch, channels, length), states = du.shape, direction.A.shape[1]
    B, C = (
        None if value.dim() == 2 else torch.empty((batch, direction.groups, length, states))
        for value in (direction.B, direction.C)
    )
    constant = (B is None) + (C is None)
    return Room(du, ddelta, B, C, torch.empty(channels * (states * (1 + constant) + 2)))


def scan_backward_into(
    call: Call,
    rooms: Sequence[Room],
    dz: Tensor | None,
    directions: Sequence[Direction],
    z: Tensor | None,
    dout: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    softplus: bool,
    scale: float = 1.0,
) -> None:
    """Fill the gradients of an output that was multiplied with `scale`.

    Of a `LowRank` direction, the gradient of delta is that of the product.
    """
    call.integers(*_sizes(directions))
    call.sequence(dout).sequence(z).sequence(dz)
    call.parameter(dlast).address(call.kept(states.contiguous())).number(scale)
    for direction, room in zip(directions, rooms, strict=True):
        _direction(call, direction, softplus)
        call.sequence(room.u).sequence(room.delta).address(room.B).address(room.C)
        varying = room.C if room.B is None else room.B
        row, outer = (0, 0) if varying is None else (varying.stride(2), varying.stride(0) // direction.groups)
        call.integers(row, outer).address(room.record)
    call.run(LIBRARY, "selective_scan_backward")


def _as(like: Tensor, value: Tensor) -> Tensor:
    """A gradient in the dtype, shape and layout of its argument; not a copy where it has them."""
    if value.dtype is like.dtype and value.dim() == 3 and like.dim() == 3:
        return value
    return torch.empty_like(like).copy_(value)


def _empty_like(value: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(value, dtype=dtype)


def _output(call: Call, out: Tensor, z: Tensor | None, directions: int, scale: float) -> None:
    """The output, the gate, and where the directions' outputs meet, in fp32."""
    call.sequence(out).sequence(z)
    meeting = out if directions == 1 or out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    call.integers(call.kept(meeting).data_ptr(), *meeting.stride()).number(scale)


def _projection(call: Call, value: Tensor) -> None:
    """B or C: (b, g, n, l), or constant (d, n)."""
    converted = call.converted(value)
    if converted.dim() == 4:
        call.integers(pointer(converted), *converted.stride(), False)
    else:
        channel, state = converted.stride()
        call.integers(pointer(converted), channel, 0, state, 0, True)


PER_DIRECTION = 7  # parameters of one direction of a block
PER_BLOCK = 6 + 2 * PER_DIRECTION  # and of a block: norm, input and output projection, both directions


def bidirectional_inner(xz: Tensor, *arguments: Any) -> Tensor | None:
    """The op `mamba_ssm::bidirectional_inner`."""
    *parameters, scale = arguments
    if _any_wide(xz, *parameters) or not fits(xz.shape[1] // 2, parameters) or xz.numel() == 0:
        return None
    return run_inner(xz, parameters, scale)


def fits(channels: int, parameters: Sequence[Tensor | None]) -> bool:
    """Whether the parameters of both directions have the shapes that the kernels take them to have."""
    first: list[Any] = list(parameters[:PER_DIRECTION])
    taps, projection, rates = first[0], first[3], first[4]
    if taps.dim() != 3 or projection.dim() != 2 or rates.dim() != 2:
        return False
    width, rank, states = taps.shape[2], projection.shape[1], rates.shape[1]
    own = ((channels,), (rank + 2 * states, channels), (channels, rank), (channels, states), (channels,), (channels,))
    shapes = ((channels, 1, width), *own)
    return width > 0 and all(
        value is None or value.shape == shape for value, shape in zip(parameters, shapes * 2, strict=True)
    )


def block_fits(features: int, channels: int, parameters: Sequence[Tensor | None]) -> bool:
    """The same for a block's norm and outer projections, its first parameters, and what is between them."""
    shapes = (
        (features,), (features,), (2 * channels, features), (2 * channels,), (features, channels), (features,),
    )  # fmt: skip
    outer = all(value is None or value.shape == shape for value, shape in zip(parameters[:6], shapes, strict=True))
    return outer and fits(channels, parameters[6:])


def run_inner(
    xz: Tensor,
    parameters: Sequence[Tensor | None],
    scale: float,
    projected: Tensor | None = None,
    states: Tensor | None = None,
) -> Tensor:
    """The gated sum of both directions (b, e, l), times `scale`, of xz (b, 2 e, l), channels contiguous.

    Args:
        parameters: those of both directions.
        projected: (2, b, l, r + 2 n), contiguous, filled with each direction's (r, B, C).
        states: (b, chunks, 2, 1, n, e), contiguous, filled with the states before each chunk.
    """
    batch, doubled, length = xz.shape
    channels = doubled // 2
    call = Call(torch.bfloat16 if xz.dtype == torch.bfloat16 else torch.float32)
    x, z = call.converted(xz).chunk(2, dim=1)
    out = torch.empty((batch, length, channels), dtype=call.dtype).transpose(1, 2)
    call.integers(batch, channels, length, _states(parameters), 1, 2)
    _output(call, out, z, 2, scale)
    call.sequence(x).integers(*_width_and_rank(parameters))
    for index in range(2):
        _one_direction(call, parameters, index)
        call.address(None if projected is None else projected[index])
    call.address(states)
    call.run(LIBRARY, "bidirectional_inner")
    return out.to(xz.dtype)


def bidirectional_blocks(
    x: Tensor, residual: Tensor | None, parameters: list[Tensor | None], eps: float, rms: bool, scale: float
) -> tuple[Tensor, Tensor] | None:
    """The op `mamba_ssm::bidirectional_blocks`: fp32, or bf16 that is computed in fp32."""
    dtype = x.dtype
    if dtype not in (torch.float32, torch.bfloat16) or _any_wide(*parameters):
        return None
    if residual is not None and residual.dtype is not torch.float32:
        return None
    x = x.to(torch.float32).contiguous()
    residual = None if residual is None else residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    batch, length, features = x.shape
    blocks: list[list[Any]] = [parameters[at : at + PER_BLOCK] for at in range(0, len(parameters), PER_BLOCK)]
    first, known = blocks[0], None
    channels, sizes = first[4].shape[1], (_width_and_rank(first[6:]), _states(first[6:]))
    for own in blocks:
        shapes = [None if value is None else value.shape for value in own]
        if shapes == known:
            continue
        if not block_fits(features, channels, own) or (_width_and_rank(own[6:]), _states(own[6:])) != sizes:
            return None
        known = shapes
    call = Call(x.dtype)
    call.integers(batch, channels, length, _states(first[6:]), 1, 2)
    call.address(x).address(residual).address(out).address(total).integers(features).number(eps).integers(rms)
    call.number(scale).integers(*_width_and_rank(first[6:]), len(blocks))
    for own in blocks:
        call.parameters(own[:6])
        for index in range(2):
            _one_direction(call, own[6:], index)
    call.run(LIBRARY, "bidirectional_blocks")
    return out.to(dtype), total


def _any_wide(*values: Any) -> bool:
    return torch.float64 in {value.dtype for value in values if value is not None}


def _states(parameters: Sequence[Any]) -> int:
    return parameters[4].shape[1]


def _width_and_rank(parameters: Sequence[Any]) -> tuple[int, int]:
    return parameters[0].shape[-1], parameters[3].shape[1]


def _one_direction(call: Call, parameters: Sequence[Any], index: int) -> None:
    """The parameters of a direction, and whether it is reversed."""
    call.parameters(parameters[index * PER_DIRECTION : (index + 1) * PER_DIRECTION]).integers(index)
