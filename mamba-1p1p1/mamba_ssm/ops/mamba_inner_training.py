"""The inside of a "v2" block with its gradients, as one op each way on the compiled CPU kernels.

    b batch, e inner channels, l length, n state, r dt rank, w conv width, s = 2 directions

The forward keeps what the backward needs, both directions in one tensor. The backward writes every gradient where it
belongs: those of x and z into the halves of that of xz, those of B and C into columns of that of the projections.
Composed of the ops of its parts, a block copies and adds these one by one: a tenth of the time of a training step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from causal_conv1d import conv1d_native
from causal_conv1d.backend.call import Call
from mamba_ssm.ops import selective_scan_native as native
from mamba_ssm.ops.selective_scan_torch import Direction

DIRECTIONS = (False, True)  # whether reversed


class DirectionParameters(NamedTuple):
    """The parameters of one direction of a "v2" block; shapes as in `mamba_inner_fn`."""

    conv1d_weight: Tensor
    conv1d_bias: Tensor | None
    x_proj_weight: Tensor
    delta_proj_weight: Tensor
    A_log: Tensor  # log(-A)
    D: Tensor | None
    delta_bias: Tensor | None


class Kept(NamedTuple):
    """What the backward needs of the forward.

    Attributes:
        u: (s, b, l, e), after the convolution. projected: (s, b, l, r + 2 n). delta: (s, b, l, e), before the softplus.
        A: (s, e, n). states: those before each chunk, as `selective_scan` keeps them.
    """

    u: Tensor
    projected: Tensor
    delta: Tensor
    A: Tensor
    states: Tensor

    @property
    def n(self) -> int:
        return self.A.shape[2]

    @property
    def rank(self) -> int:
        return self.projected.shape[3] - 2 * self.n

    def rows(self, name: str, direction: int) -> Tensor:
        """(b l, columns) of one direction."""
        value: Tensor = getattr(self, name)
        return value[direction].flatten(0, 1)

    def scan_inputs(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """(b, 1, l, n) each, views of the projections (b, l, r + 2 n) of one direction."""
        B, C = projected[..., self.rank :].split(self.n, dim=-1)
        return B[:, None], C[:, None]

    def direction(self, index: int, own: DirectionParameters) -> Direction:
        B, C = (value.transpose(2, 3) for value in self.scan_inputs(self.projected[index]))
        u, delta = self.u[index].transpose(1, 2), self.delta[index].transpose(1, 2)
        return Direction(u, delta, self.A[index], B, C, own.D, own.delta_bias, DIRECTIONS[index])


def can_run(*tensors: Tensor | None) -> bool:
    """Whether all are in fp32 on a CPU."""
    return all(value is None or (value.dtype is torch.float32 and value.device.type == "cpu") for value in tensors)


def forward(xz: Tensor, parameters: tuple[DirectionParameters, ...], scale: float) -> tuple[Tensor, Kept]:
    """(b, e, l), the gated sum of both directions times `scale`, of xz (b, 2 e, l); and what to keep."""
    x, z = xz.chunk(2, dim=1)
    batch, channels, length = x.shape
    columns, states = parameters[0].x_proj_weight.shape[0], parameters[0].A_log.shape[1]
    sizes = (len(DIRECTIONS), batch, length)
    kept = Kept(
        xz.new_empty(*sizes, channels),
        xz.new_empty(*sizes, columns),
        xz.new_empty(*sizes, channels),
        torch.stack([own.A_log for own in parameters]).exp_().neg_(),
        xz.new_empty(0),
    )
    for index, (own, reverse) in enumerate(zip(parameters, DIRECTIONS, strict=True)):
        u, projected, delta = (kept.rows(name, index) for name in ("u", "projected", "delta"))
        taps = own.conv1d_weight.squeeze(1)
        conv1d_native.conv1d_into(kept.u[index].transpose(1, 2), x, taps, own.conv1d_bias, True, reverse)
        torch.mm(u, own.x_proj_weight.t(), out=projected)
        torch.mm(projected[:, : kept.rank], own.delta_proj_weight.t(), out=delta)
    assert columns == kept.rank + 2 * states
    directions = [kept.direction(index, own) for index, own in enumerate(parameters)]
    found = native.scan(directions, z, softplus=True, keep_states=True, scale=scale)
    assert found is not None
    return found[0], kept._replace(states=found[2])


def backward(
    dout: Tensor, xz: Tensor, kept: Kept, parameters: tuple[DirectionParameters, ...], scale: float
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """The gradients of xz (b, 2 e, l), channels contiguous, and of each direction's parameters by their names."""
    x, z = xz.chunk(2, dim=1)
    dxz = xz.new_empty(xz.shape[0], xz.shape[2], xz.shape[1]).transpose(1, 2)
    dx, dz = dxz.chunk(2, dim=1)
    u, projected, delta = (torch.empty_like(value) for value in kept[:3])
    grown = Kept(u, projected, delta, kept.A, kept.states)
    directions = [kept.direction(index, own) for index, own in enumerate(parameters)]
    rooms = [_room(grown, index, direction) for index, direction in enumerate(directions)]
    call = Call(torch.float32)
    native.scan_backward_into(call, rooms, dz, directions, z, dout, None, kept.states, softplus=True, scale=scale)
    found = []
    for index, (own, direction, room) in enumerate(zip(parameters, directions, rooms, strict=True)):
        du, dprojected, ddelta = (grown.rows(name, index) for name in ("u", "projected", "delta"))
        u, projected = kept.rows("u", index), kept.rows("projected", index)
        torch.mm(ddelta, own.delta_proj_weight, out=dprojected[:, : kept.rank])
        du.addmm_(dprojected, own.x_proj_weight)
        sums = conv1d_native.conv1d_backward_into(
            dx, grown.u[index].transpose(1, 2), x, own.conv1d_weight.squeeze(1), own.conv1d_bias, True,
            direction.reverse, accumulate=index > 0,
        )  # fmt: skip
        scan = room.named(direction)
        found.append(
            {
                "conv1d_weight": sums[:, None, :-1].clone(),
                "conv1d_bias": sums[:, -1].clone(),
                "x_proj_weight": dprojected.t() @ u,
                "delta_proj_weight": ddelta.t() @ projected[:, : kept.rank],
                "A_log": scan["A"] * direction.A,
                "D": scan["D"].clone(),
                "delta_bias": scan["delta_bias"].clone(),
            }
        )
    return dxz, found


def _room(grown: Kept, index: int, direction: Direction) -> native.Room:
    d, n = direction.A.shape
    u, delta = grown.u[index].transpose(1, 2), grown.delta[index].transpose(1, 2)
    return native.Room(u, delta, *grown.scan_inputs(grown.projected[index]), torch.empty(d * (n + 2)))


def of_both_directions(parameters: tuple[Any, ...]) -> tuple[DirectionParameters, DirectionParameters]:
    """The parameters of both directions, which follow each other."""
    count = len(DirectionParameters._fields)
    return DirectionParameters(*parameters[:count]), DirectionParameters(*parameters[count:])
