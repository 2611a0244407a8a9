"""The selective scan on the compiled CUDA kernels of `csrc/selective_scan/cuda`.

    b batch, d channels, l length, n state, g groups, k = d / g, s directions

The functions take what their ops take and return what those return, or None for what the kernels do not do: fp64. A
kernel runs one direction and as many states as one launch holds; what several launches give is summed up in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causal_conv1d.backend.cuda import ELEMENTS, CudaCall, CudaLibrary
from mamba_ssm.ops.selective_scan_torch import CHUNK, Direction

LIBRARY = CudaLibrary("mamba_ssm")
MAX_BATCH = 65535


@dataclass(frozen=True)
class Cut:
    """How a launch is cut, as in cuts.cuh: the states that it holds, and the channels of a block."""

    states: int
    channels: int


def cut_for(states: int, is_complex: bool) -> Cut:
    """The one that the library takes."""
    if is_complex:
        return Cut(16, 16) if states <= 16 else Cut(32, 8)
    if states == 1:
        return Cut(1, 64)
    return Cut(16, 32) if states <= 16 else Cut(64, 8)


def runs(direction: Direction) -> bool:
    """Whether the kernels do such a scan; what does not fit together is left to PyTorch, which says so."""
    u, A = direction.u, direction.A
    if direction.dtype is not torch.float32 or u.dim() != 3 or A.dim() != 2 or u.shape[0] > MAX_BATCH:
        return False
    batch, channels, length = u.shape
    states, groups = A.shape[1], direction.groups
    varying = (batch, groups, states, length * (2 if A.is_complex() else 1))
    return (
        states > 0
        and u.dtype in ELEMENTS
        and direction.delta.dtype in ELEMENTS
        and direction.delta.shape == u.shape
        and A.shape[0] == channels
        and channels % groups == 0
        and all(_projects(value, (channels, states), varying) for value in (direction.B, direction.C))
        and all(value is None or value.shape == (channels,) for value in (direction.D, direction.delta_bias))
    )


def _projects(value: Tensor, constant: tuple[int, ...], varying: tuple[int, ...]) -> bool:
    return value.shape == constant or (value.shape == varying and value.dtype in ELEMENTS)


def _fits(directions: Sequence[Direction], *others: Tensor | None) -> bool:
    first = directions[0]
    alike = len({(own.u.shape, own.A.shape, own.groups, own.A.is_complex()) for own in directions}) == 1
    same = all(value is None or (value.shape == first.u.shape and value.dtype in ELEMENTS) for value in others)
    return alike and same and bool(first.u.numel()) and all(map(runs, directions))


@dataclass(frozen=True)
class Launch:
    """One of the launches whose results are summed up: a direction, and its states from `first_state` on."""

    index: int
    direction: Direction
    first_state: int
    is_first: bool
    is_last: bool


def _launches(directions: Sequence[Direction]) -> Iterator[Launch]:
    states = directions[0].A.shape[1]
    step = cut_for(states, directions[0].A.is_complex()).states
    starts = range(0, states, step)
    for index, direction in enumerate(directions):
        for start in starts:
            is_last = index == len(directions) - 1 and start == starts[-1]
            yield Launch(index, direction, start, index == 0 and start == 0, is_last)


def scan(
    directions: Sequence[Direction],
    z: Tensor | None,
    softplus: bool,
    keep_states: bool,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `selective_scan_torch.scan_forward`, the output in `dtype` (default: that of u)."""
    if not _fits(directions, z):
        return None
    first = directions[0]
    batch, channels, _ = first.u.shape
    states, kind = first.A.shape[1], torch.complex64 if first.A.is_complex() else torch.float32
    out = torch.empty_like(first.u, dtype=dtype)
    last = first.u.new_empty((batch, channels, states), dtype=kind)
    borders = first.u.new_empty(_borders_shape(directions) if keep_states else 0, dtype=kind)
    total = None  # of the read-outs so far
    for launch in _launches(directions):
        call = _call(launch, softplus)
        call.sequence(z if launch.is_last else None)
        into = out if launch.is_last else torch.empty_like(out, dtype=torch.float32) if total is None else total
        call.sequence(into).sequence(total).integers(launch.first_state == 0)
        call.address(last if launch.index == 0 else None)
        _borders(call, borders if keep_states else None, launch)
        call.run(LIBRARY, "scan_forward")
        total = into
    return out, last, borders


def scan_backward(
    directions: Sequence[Direction],
    z: Tensor | None,
    dout: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    softplus: bool,
) -> list[Tensor] | None:
    """The gradients of `scan`: of each direction's tensors, in their order, then of z; of those that were given."""
    kind = torch.complex64 if directions[0].A.is_complex() else torch.float32
    if not _fits(directions, z, dout) or states.dtype is not kind or states.shape != _borders_shape(directions):
        return None
    if dlast is not None and dlast.shape != (dout.shape[0], *directions[0].A.shape):
        return None
    dz = None if z is None else torch.empty_like(z)
    total = None
    rooms = [_Room(direction) for direction in directions]
    states = states.contiguous()
    for launch in _launches(directions):
        room = rooms[launch.index]
        adds = launch.first_state > 0
        call = _call(launch, softplus)
        into = total
        if z is not None and not launch.is_last and total is None:
            into = torch.empty_like(launch.direction.u, dtype=torch.float32)
        call.sequence(z).sequence(dout).sequence(total if z is not None else None)
        call.sequence(None if launch.is_last else into).sequence(dz if launch.is_last else None)
        call.sequence(room.du).sequence(room.ddelta).integers(adds, not adds)
        _borders(call, states, launch)
        call.address(None if dlast is None else dlast.to(kind).contiguous())
        call.address(room.dA).address(room.dB).address(room.dC).address(room.dD).address(room.dbias)
        call.run(LIBRARY, "scan_backward")
        total = into
    return [gradient for room in rooms for gradient in room.gradients()] + ([] if dz is None else [dz])


class _Room:
    """What the kernel fills with the gradients of one direction: shares of blocks and pictures, still to be summed."""

    def __init__(self, direction: Direction) -> None:
        u, A = direction.u, direction.A
        batch, channels, length = u.shape
        states, groups = A.shape[1], direction.groups
        kind = torch.complex64 if A.is_complex() else torch.float32
        cut = cut_for(states, A.is_complex())
        blocks = -(-(channels // groups) // cut.channels)
        once = states <= cut.states

        def shares(value: Tensor) -> Tensor:
            shape = (batch, channels, states) if value.dim() == 2 else (batch, groups, blocks, length, states)
            return u.new_empty(shape, dtype=kind)

        self.direction = direction
        self.du = torch.empty_like(u, dtype=u.dtype if once else torch.float32)
        self.ddelta = torch.empty_like(direction.delta, dtype=direction.delta.dtype if once else torch.float32)
        self.dA = u.new_empty((batch, channels, states), dtype=kind)
        self.dB, self.dC = shares(direction.B), shares(direction.C)
        self.dD = None if direction.D is None else u.new_empty((batch, channels), dtype=torch.float32)
        self.dbias = u.new_empty((batch, channels), dtype=torch.float32)

    def gradients(self) -> list[Tensor]:
        """Summed, in the arguments' dtypes and layouts, without those of arguments that were not given."""
        own = self.direction
        found: list[tuple[Tensor | None, Tensor | None]] = [
            (own.u, self.du),
            (own.delta, self.ddelta),
            (own.A, self.dA.sum(0)),
            (own.B, _projection_gradient(own.B, self.dB)),
            (own.C, _projection_gradient(own.C, self.dC)),
            (own.D, None if self.dD is None else self.dD.sum(0)),
            (own.delta_bias, self.dbias.sum(0)),
        ]
        return [
            value if value.dtype is like.dtype and value.stride() == like.stride() else _as(like, value)
            for like, value in found
            if like is not None and value is not None
        ]


def _as(like: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(value)


def _projection_gradient(like: Tensor, shares: Tensor) -> Tensor:
    """(d, n) of a constant one; (b, g, n, l) of a varying one, (re, im) pairs of complex values along l."""
    if like.dim() == 2:
        return shares.sum(0)
    columns = shares.sum(2).transpose(2, 3)
    return torch.view_as_real(columns).flatten(-2) if columns.is_complex() else columns


def _borders_shape(directions: Sequence[Direction]) -> tuple[int, ...]:
    first = directions[0]
    batch, channels, length = first.u.shape
    groups = first.groups
    return batch, -(-length // CHUNK), len(directions), groups, first.A.shape[1], channels // groups


def _call(launch: Launch, softplus: bool) -> CudaCall:
    """What both kernels begin with: the sizes and the inputs of a direction."""
    own = launch.direction
    call = CudaCall(own.u)
    call.integers(own.A.is_complex(), *own.u.shape, own.groups, own.A.shape[1], launch.first_state)
    call.integers(softplus, own.reverse).sequence(own.u).sequence(own.delta).parameter(own.A)
    _projection(call, own.B, own.A.is_complex())
    _projection(call, own.C, own.A.is_complex())
    return call.parameter(own.D).parameter(own.delta_bias)


def _projection(call: CudaCall, value: Tensor, is_complex: bool) -> None:
    """B or C: (b, g, n, l), or constant (d, n)."""
    if value.dim() == 4:
        call.address(value).integers(*value.stride(), ELEMENTS[value.dtype], True)
    else:
        call.parameter(value.to(torch.complex64) if is_complex else value).integers(0, 0, 0, 0, 0, False)


def _borders(call: CudaCall, borders: Tensor | None, launch: Launch) -> None:
    """The kept states of the launch's direction: where they are, and the strides of the batch and the chunks."""
    if borders is None:
        call.integers(0, 0, 0)
    else:
        call.address(borders[:, :, launch.index]).integers(*borders.stride()[:2])
