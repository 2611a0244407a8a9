"""A "v2" mixer and its gradients on the compiled CPU kernels, with or without its outer projections.

    b batch, m model channels, e inner channels, l length, n state, r dt rank, w conv width, s = 2 directions

The forward keeps the small (r, B, C) and the states between chunks; the backward convolves again and expands r to the
steps again, which takes less time than to write all that to memory and to read it. It writes every gradient where it
belongs: those of x and z into the halves of that of xz, those of B and C into columns of that of the projections.
Composed of the ops of its parts, a block copies and adds these one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from causal_conv1d import conv1d_native
from causal_conv1d.backend.call import Call
from mamba_ssm.ops import selective_scan_native as native
from mamba_ssm.ops.int8 import Int8Weight
from mamba_ssm.ops.selective_scan_torch import CHUNK

DIRECTIONS = (False, True)  # whether reversed


class DirectionParameters(NamedTuple):
    """The parameters of one direction of a "v2" block; shapes as in `mamba_inner_fn`."""

    conv1d_weight: Tensor
    conv1d_bias: Tensor | None
    x_proj_weight: Tensor | Int8Weight
    delta_proj_weight: Tensor
    A_log: Tensor  # log(-A)
    D: Tensor | None
    delta_bias: Tensor | None


class OuterProjections(NamedTuple):
    """The projections around the inside of a block: weights (2 e, m) and (m, e), biases or None."""

    in_weight: Tensor | None
    in_bias: Tensor | None
    out_weight: Tensor | None
    out_bias: Tensor | None


NO_PROJECTIONS = OuterProjections(None, None, None, None)


def can_run(*tensors: Tensor | None) -> bool:
    """Whether all are in fp32 on a CPU, and nothing transforms them (`torch.func`)."""
    plain = all(value is None or (value.dtype is torch.float32 and value.is_cpu) for value in tensors)
    return plain and not torch._C._are_functorch_transforms_active()


class BidirectionalMixer(torch.autograd.Function):
    """Takes x, a scale, `OuterProjections` and both `DirectionParameters`, these two unpacked; all in fp32.

    x is (b, l, m), which gives (b, l, m), or with `NO_PROJECTIONS` xz (b, 2 e, l), which gives (b, e, l).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *parameters: Tensor | None) -> Tensor:
        """See the class."""
        outer, inner = OuterProjections(*parameters[:4]), parameters[4:]
        xz = x if outer.in_weight is None else F.linear(x, outer.in_weight, outer.in_bias).transpose(1, 2)
        y, kept = forward(xz, inner, scale)
        ctx.scale = scale
        if outer.out_weight is None:
            ctx.save_for_backward(xz, None, None, *kept, *parameters)
            return y
        ctx.save_for_backward(xz, x, y, *kept, *parameters)
        return F.linear(y.transpose(1, 2), outer.out_weight, outer.out_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x and of every parameter."""
        xz, x, y, projected, states, *parameters = ctx.saved_tensors
        outer, inner = OuterProjections(*parameters[:4]), parameters[4:]
        kept, around = Kept(projected.contiguous(), states), NO_PROJECTIONS
        if outer.in_weight is None or outer.out_weight is None:
            dx, gradients = backward(dout, xz, kept, inner, ctx.scale)
        else:
            slope, hidden, y = dout.flatten(0, 1), x.flatten(0, 1), y.transpose(1, 2)
            dy = (slope @ outer.out_weight).view(y.shape).transpose(1, 2)
            dxz, gradients = backward(dy, xz, kept, inner, ctx.scale)
            rows = dxz.transpose(1, 2).flatten(0, 1)
            dx = (rows @ outer.in_weight).view(x.shape)
            around = OuterProjections(
                rows.t() @ hidden,
                None if outer.in_bias is None else rows.sum(0),
                slope.t() @ y.flatten(0, 1),
                None if outer.out_bias is None else slope.sum(0),
            )
        given = [None if value is None else own for value, own in zip(inner, gradients, strict=True)]
        return dx, None, *around, *given


class Kept(NamedTuple):
    """What the backward needs of the inside's forward.

    Attributes:
        projected: (s, b, l, r + 2 n), (r, B, C) of each token. states: those before each chunk, as `selective_scan`
            keeps them.
    """

    projected: Tensor
    states: Tensor


def forward(xz: Tensor, parameters: tuple[Tensor | None, ...], scale: float) -> tuple[Tensor, Kept]:
    """(b, e, l), the gated sum of both directions times `scale`, of xz (b, 2 e, l); and what to keep."""
    own = of_both_directions(parameters)[0]
    batch, doubled, length = xz.shape
    chunks = (length + CHUNK - 1) // CHUNK
    kept = Kept(
        xz.new_empty(len(DIRECTIONS), batch, length, own.x_proj_weight.shape[0]),
        xz.new_empty(batch, chunks, len(DIRECTIONS), 1, own.A_log.shape[1], doubled // 2),
    )
    return native.run_inner(xz, parameters, scale, *kept), kept


def backward(
    dout: Tensor, xz: Tensor, kept: Kept, parameters: tuple[Tensor | None, ...], scale: float
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of xz (b, 2 e, l), channels contiguous, and of each parameter, in their order."""
    x, z = xz.chunk(2, dim=1)
    batch, channels, length = x.shape
    dxz = xz.new_empty(batch, length, 2 * channels).transpose(1, 2)
    dx, dz = dxz.chunk(2, dim=1)
    sides = [
        _Side(x, kept.projected[index], own, reverse)
        for index, (own, reverse) in enumerate(zip(of_both_directions(parameters), DIRECTIONS, strict=True))
    ]
    rooms, directions = [side.room for side in sides], [side.direction for side in sides]
    call = Call(torch.float32)
    native.scan_backward_into(call, rooms, dz, directions, z, dout, None, kept.states, softplus=True, scale=scale)
    return dxz, [*sides[0].finish(dx, x, add=False), *sides[1].finish(dx, x, add=True)]


class _Side:
    """One direction in the backward.

    Attributes:
        u: (b, l, e), after the convolution. projected: (b, l, r + 2 n). du, dprojected, ddelta: their gradients.
        direction: what was scanned. room: where the gradients of that go.
    """

    def __init__(self, x: Tensor, projected: Tensor, own: DirectionParameters, reverse: bool) -> None:
        batch, channels, length = x.shape
        states = own.A_log.shape[1]
        self.own, self.projected, self.rank = own, projected, projected.shape[2] - 2 * states
        self.u, self.du, self.ddelta = (x.new_empty(batch, length, channels) for _ in range(3))
        self.dprojected = torch.empty_like(projected)
        self.taps = own.conv1d_weight.squeeze(1)
        conv1d_native.conv1d_into(self.u.transpose(1, 2), x, self.taps, own.conv1d_bias, True, reverse)
        B, C = (value.transpose(2, 3) for value in self._scan_inputs(projected))
        A = own.A_log.exp().neg_()
        r = projected[..., : self.rank].transpose(1, 2)
        self.direction = native.LowRank(
            self.u.transpose(1, 2), r, A, B, C, own.D, own.delta_bias, reverse, own.delta_proj_weight
        )
        du, ddelta = self.du.transpose(1, 2), self.ddelta.transpose(1, 2)
        record = x.new_empty(channels * (states + 2))
        inputs = self._scan_inputs(self.dprojected)
        self.room = native.Room(du, ddelta, *inputs, record)

    def _low_rank(self, projected: Tensor) -> Tensor:
        """(b l, r), a view."""
        return projected.flatten(0, 1)[:, : self.rank]

    def _scan_inputs(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """B and C as (b, 1, l, n), views."""
        rank, states = self.rank, self.own.A_log.shape[1]
        return projected[:, None, :, rank : rank + states], projected[:, None, :, rank + states :]

    def finish(self, dx: Tensor, x: Tensor, add: bool) -> tuple[Tensor, ...]:
        """With the scan's gradients there: write or add that of x (b, e, l); the parameters' gradients, in order."""
        own, du, ddelta, dprojected = self.own, *(v.flatten(0, 1) for v in (self.du, self.ddelta, self.dprojected))
        torch.mm(ddelta, own.delta_proj_weight, out=dprojected[:, : self.rank])
        assert isinstance(own.x_proj_weight, Tensor)  # a weight in int8 has no gradient
        du.addmm_(dprojected, own.x_proj_weight)
        sums = conv1d_native.conv1d_backward_into(
            dx, self.room.u, x, self.taps, own.conv1d_bias, True, self.direction.reverse, accumulate=add
        )
        A, D, bias = self.room.record.split([own.A_log.numel(), *[x.shape[1]] * 2])
        return (
            sums[:, None, :-1].clone(),
            sums[:, -1].clone(),
            dprojected.t() @ self.u.flatten(0, 1),
            ddelta.t() @ self._low_rank(self.projected),
            A.view_as(own.A_log) * self.direction.A,
            D.clone(),
            bias.clone(),
        )


def of_both_directions(parameters: tuple[Any, ...]) -> tuple[DirectionParameters, DirectionParameters]:
    """The parameters of both directions, which follow each other."""
    count = len(DirectionParameters._fields)
    return DirectionParameters(*parameters[:count]), DirectionParameters(*parameters[count:])
