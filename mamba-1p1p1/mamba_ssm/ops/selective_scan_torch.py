"""The selective scan in pure PyTorch, forward and backward, for one or several directions at a time.

    b batch, d channels, l length, n state, g groups, k = d / g channels of a group, s directions, t tokens of a chunk

Directions that run together (the two of a bidirectional block) are stacked along s, each in the order in which it
visits the tokens, so one pass over time serves them all. Time is the first axis of every buffer: a step is then one
in-place multiply-add of contiguous memory, h[t] = x[t] + decay[t] * h[t-1], and everything else is done for a whole
chunk at once. Channels are the last axis, so B and C broadcast as scalars over contiguous memory.

Memory: two buffers of (t, s, b, g, n, k) for one chunk and one slice of the batch; the states at chunk borders,
(l / t) of them, are kept for the backward, which recomputes the states in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_conv1d.backend.memory import keep_freed_memory
from mamba_ssm.ops.reference import scan_dtype

CHUNK = 32  # tokens between kept states; with SLICE it keeps the buffers near the size of a core's cache
BUFFER = 5 << 17  # about how many numbers `even_chunk` wants a buffer to hold
LOG2_E = math.log2(math.e)
SLICE = 1 << 16  # elements of state that one step updates at most, where the batch can be split


@dataclass(frozen=True)
class Direction:
    """The arguments of one scan; see `selective_scan_fn`. `reverse` runs it from the last token to the first."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    reverse: bool

    @property
    def dtype(self) -> torch.dtype:
        return scan_dtype(self.u, self.delta, self.A)

    @property
    def groups(self) -> int:
        return next((value.shape[1] for value in (self.B, self.C) if value.dim() == 4), 1)

    def rows(self, value: Tensor) -> Tensor:
        """(b, ..., l) as (l, b, ...), in the order in which this direction visits the tokens."""
        moved = value.movedim(-1, 0)
        return moved.flip(0) if self.reverse else moved

    def columns(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return (rows.flip(0) if self.reverse else rows).movedim(0, -1)


@dataclass(frozen=True)
class Gradients:
    """The gradients of one direction's arguments, by their names; None for those not given."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


class Stacked:
    """The inputs of directions that run together, time-major, in the order in which each visits the tokens.

    Attributes, with their shapes:
        dt, u: (l, s, b, g, 1, k), any strides, the step sizes (after bias and softplus) and inputs.
        exponent: (s, 1, g, n, k), what dt is multiplied with: A log2 e for `exp2`, which is the faster exponential, or
            complex A for `exp`.
        B, C: (l, s, b, g, n, 1) where they vary over time, (1, s, 1, g, n, k) where they are constant.
        chunk: tokens of a chunk.
    """

    def __init__(self, dt: Tensor, u: Tensor, exponent: Tensor, B: Tensor, C: Tensor, chunk: int) -> None:
        self.dt, self.u, self.exponent, self.B, self.C, self.chunk = dt, u, exponent, B, C, chunk
        self.length = u.shape[0]
        count, batch, groups, _, channels = u.shape[1:]
        self.state_shape = (count, batch, groups, exponent.shape[-2], channels)

    def buffer(self) -> Tensor:
        return self.exponent.new_empty((min(self.chunk, self.length), *self.state_shape))

    def outputs(self) -> Tensor:
        """Room for the read-outs, (l, s, b, g, k)."""
        count, batch, groups, _, channels = self.state_shape
        return self.u.new_empty((self.length, count, batch, groups, channels))

    def chunks(self, value: Tensor) -> Sequence[Tensor]:
        """The views (t, ...) of (l, ...), or of a constant (1, ...), that belong to each chunk."""
        if value.shape[0] == self.length:
            return value.split(self.chunk) if self.length else ()
        return [value] * -(-self.length // self.chunk)


def even_chunk(length: int, per_token: int) -> int:
    """How many tokens a chunk takes whose states, so many of each token, need not be kept.

    Few enough that the buffers stay in a cache if they can, enough that the calls for a chunk do not weigh, and such
    that all chunks of a sequence are of nearly the same length.
    """
    wanted = min(max(BUFFER // per_token, 8), 64)
    return -(-length // max(1, round(length / wanted)))


class Stage(Stacked):
    """`Stacked` made of the arguments of scans, for one slice of the batch, in the dtype of the computation.

    `raw` is dt before softplus, A (s, 1, g, n, k); `varies` tells which of B and C vary over time.
    """

    def __init__(self, directions: list[Direction], batch: slice, softplus: bool) -> None:
        first = directions[0]
        self.directions = directions
        self.batch = batch
        self.softplus = softplus
        self.dtype = first.dtype
        self.state_dtype = self.dtype.to_complex() if first.A.is_complex() else self.dtype
        self.groups = first.groups
        self.raw = self._stack([d.delta for d in directions])
        bias = self.per_channel([d.delta_bias for d in directions])
        if bias is not None:
            self.raw = self.raw + bias
        self.A = torch.stack([self._constant(d.A) for d in directions])
        self.varies = {"B": first.B.dim() == 4, "C": first.C.dim() == 4}
        super().__init__(
            F.softplus(self.raw) if softplus else self.raw,
            self._stack([d.u for d in directions]),
            self.A if self.A.is_complex() else self.A * LOG2_E,
            self._projection([d.B for d in directions]),
            self._projection([d.C for d in directions]),
            CHUNK,
        )

    def _stack(self, values: list[Tensor]) -> Tensor:
        rows = [d.rows(v[self.batch].to(self.dtype)) for d, v in zip(self.directions, values, strict=True)]
        return _side_by_side(rows).unflatten(-1, (self.groups, 1, -1))

    def per_channel(self, values: list[Tensor | None]) -> Tensor | None:
        """(d,) of each direction, zeros of one that has none, as (s, 1, g, 1, k); None if none has any."""
        given = next((v for v in values if v is not None), None)
        if given is None:
            return None
        none = torch.zeros_like(given)
        stacked = torch.stack([(none if v is None else v).to(self.dtype) for v in values])
        return stacked.reshape(len(values), 1, self.groups, 1, -1)

    def _constant(self, value: Tensor) -> Tensor:
        """(d, n) as (1, g, n, k)."""
        return value.to(self.state_dtype).unflatten(0, (self.groups, -1)).transpose(1, 2)[None].contiguous()

    def _projection(self, values: list[Tensor]) -> Tensor:
        if values[0].dim() == 2:
            return torch.stack([self._constant(v) for v in values])[None]
        rows = []
        for direction, value in zip(self.directions, values, strict=True):
            part = value[self.batch].to(self.dtype)
            if self.state_dtype.is_complex:
                part = torch.view_as_complex(part.unflatten(-1, (-1, 2)).contiguous())
            rows.append(direction.rows(part))
        return _side_by_side(rows)[..., None]


def _side_by_side(rows: list[Tensor]) -> Tensor:
    """(l, ...) of each direction as (l, s, ...), without a copy of the only one."""
    return rows[0][:, None] if len(rows) == 1 else torch.stack(rows, 1)


class Recurrence:
    """Runs the states of `Stacked` inputs through one chunk after the other, in buffers that are reused."""

    def __init__(self, stage: Stacked) -> None:
        self._exponent = stage.exponent
        self._dt = stage.chunks(stage.dt)
        self._weighted = stage.chunks(stage.dt * stage.u)
        self._B = stage.chunks(stage.B)
        self._decay, self._states = stage.buffer(), stage.buffer()
        self._steps = list(zip(self._decay.unbind(0), self._states.unbind(0), strict=True))

    def run(self, index: int, before: Tensor) -> tuple[Tensor, Tensor]:
        """The decays and the states (t, s, b, g, n, k) of a chunk, given the state before it.

        Both are buffers that the next call overwrites.
        """
        dt = self._dt[index]
        count = dt.shape[0]
        decay, states, steps = self._decay, self._states, self._steps
        if count < len(steps):
            decay, states, steps = decay[:count], states[:count], steps[:count]
        torch.mul(dt, self._exponent, out=decay)
        decay.exp_() if decay.is_complex() else decay.exp2_()
        torch.mul(self._weighted[index], self._B[index], out=states)
        previous = before
        for factor, state in steps:
            previous = state.addcmul_(factor, previous)
        return decay, states


def batch_slices(batch: int, per_sample: int) -> Iterator[slice]:
    """Slices of the batch whose states, so many of each picture, stay in a cache; at least one picture each."""
    size = max(1, SLICE // per_sample)
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


def _batch_slices(directions: list[Direction]) -> Iterator[slice]:
    batch, channels, _ = directions[0].u.shape
    return batch_slices(batch, len(directions) * channels * directions[0].A.shape[1])


def _sum_over_states(values: Tensor, weights: Tensor, scratch: Tensor, out: Tensor) -> Tensor:
    """out (t, s, b, g, k) = the real part of the sum over n of weights * values (t, s, b, g, n, k).

    A matrix product does it in one pass where the weights vary over time and not over channels.
    """
    count, channels = values.shape[-2:]
    if count == 1 and not values.is_complex():
        return torch.mul(values.squeeze(-2), weights.squeeze(-2), out=out)
    if weights.shape[:-2] == values.shape[:-2] and weights.shape[-1] == 1 and not values.is_complex():
        rows = weights.reshape(-1, 1, count)
        torch.bmm(rows, values.view(-1, count, channels), out=out.view(-1, 1, channels))
        return out
    return torch.sum(torch.mul(values, weights, out=scratch).real, -2, out=out)


def _read_out(states: Tensor, C: Tensor, scratch: Tensor, out: Tensor) -> None:
    """out (t, s, b, g, k) = sum over n of C * states; twice the real part for complex states."""
    _sum_over_states(states, C, scratch, out)
    if states.is_complex():
        out.mul_(2)


def _to_public(state: Tensor, index: int) -> Tensor:
    """A state (s, b, g, n, k), one direction of it, as (b, d, n)."""
    return state[index].transpose(-1, -2).flatten(1, 2)


def _from_public(state: Tensor, stage: Stage) -> Tensor:
    """(b, d, n) as a state (1, b, g, n, k) of the stage's only direction."""
    part = state[stage.batch].to(stage.state_dtype)
    return part.unflatten(1, (stage.groups, -1)).transpose(-1, -2)[None]


def scan_forward(
    directions: list[Direction], z: Tensor | None, softplus: bool, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the scans of all directions, gated by silu(z) if z is given.

    Returns:
        out: (b, d, l), dtype and layout of the first direction's u.
        last state of the first direction: (b, d, n).
        the states before each chunk: (b, chunks, s, g, n, k), empty unless `keep_states`.
    """
    keep_freed_memory()
    first = directions[0]
    out = torch.empty_like(first.u)
    kept, last = [], []
    for batch in _batch_slices(directions):
        stage = Stage(directions, batch, softplus)
        y, state, borders = read_outs(stage, keep_states)
        skip = stage.per_channel([d.D for d in directions])
        if skip is not None:
            y.addcmul_(stage.u.squeeze(-2), skip.squeeze(-2))
        total = _sum_directions(stage, y)
        if z is not None:
            total = total * F.silu(z[batch].to(stage.dtype))
        out[batch] = total
        last.append(_to_public(state, 0))
        kept.extend(borders)
    states = torch.cat(kept) if keep_states else last[0].new_empty(0)
    return out, torch.cat(last) if len(last) > 1 else last[0].contiguous(), states


def read_outs(stage: Stacked, keep_states: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The read-outs y (l, s, b, g, k), the last state, and [the states before each chunk] if they are kept."""
    recurrence = Recurrence(stage)
    y = stage.outputs()
    state = stage.exponent.new_zeros(stage.state_shape)
    borders = []
    for index, (C, out) in enumerate(zip(stage.chunks(stage.C), stage.chunks(y), strict=True)):
        if keep_states:
            borders.append(state)
        decay, states = recurrence.run(index, state)
        state = states[-1].clone() if keep_states else state.copy_(states[-1])
        _read_out(states, C, scratch=decay, out=out)
    if not keep_states:
        return y, state, []
    return y, state, [torch.stack(borders).permute(2, 0, 1, 3, 4, 5)]


def _sum_directions(stage: Stage, y: Tensor) -> Tensor:
    """(l, s, b, g, k) in visiting order, summed over directions, as (b, d, l)."""
    parts = [d.columns(y[:, index].flatten(-2)) for index, d in enumerate(stage.directions)]
    return sum(parts[1:], start=parts[0])


def scan_backward(
    directions: list[Direction],
    z: Tensor | None,
    dout: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    softplus: bool,
) -> tuple[list[Gradients], Tensor | None]:
    """Gradients of `scan_forward`, given those of its output and (one direction only) of its last state.

    With dy = dout * silu(z):    g[t] = conj(C[t]) dy[t] + conj(decay[t+1]) g[t+1],
    and from g, the states and the inputs all others follow; twice the real part for complex states.
    """
    dz = None if z is None else torch.empty_like(z)
    parts = []
    for batch in _batch_slices(directions):
        stage = Stage(directions, batch, softplus)
        grad = dout[batch].to(stage.dtype)
        gate = None if z is None else z[batch].to(stage.dtype)
        backward = Backward(stage, grad if gate is None else grad * F.silu(gate))
        borders = states[batch].permute(1, 2, 0, 3, 4, 5)
        backward.run(borders, None if dlast is None else _from_public(dlast, stage))
        parts.append(backward.gradients())
        if dz is not None and gate is not None:
            dz[batch] = torch.ops.aten.silu_backward(grad * _sum_directions(stage, backward.y), gate)
    return [_join([part[index] for part in parts], d) for index, d in enumerate(directions)], dz


class Backward:
    """The backward of one slice of the batch, chunk by chunk from the last to the first.

    Args:
        stage: the inputs.
        dy: (b, d, l), the gradient of the sum of the directions before the gate.

    After `run`, `y` (l, s, b, g, k) holds the recomputed outputs before the gate, the skip D * u included.
    """

    def __init__(self, stage: Stage, dy: Tensor) -> None:
        self.stage = stage
        self.dy = torch.stack([d.rows(dy) for d in stage.directions], 1).unflatten(-1, (stage.groups, 1, -1))
        self.y = stage.outputs()
        self.du = torch.empty_like(stage.u)
        self.ddt = torch.empty_like(stage.u)
        self.dA = torch.zeros_like(stage.A)
        self.projections = {"B": torch.zeros_like(stage.B), "C": torch.zeros_like(stage.C)}
        self.skip = stage.per_channel([d.D for d in stage.directions])

    def run(self, borders: Tensor, dlast: Tensor | None) -> None:
        """Fill the gradients, given the states before each chunk (chunks, s, b, g, n, k) and that of the last."""
        recurrence = Recurrence(self.stage)
        scratch, grad = self.stage.buffer(), self.stage.buffer()
        B, C = self.stage.chunks(self.stage.B), self.stage.chunks(self.stage.C)
        carry = dlast
        for index, before in reversed(list(enumerate(borders.unbind(0)))):
            decay, states = recurrence.run(index, before)
            count = states.shape[0]
            chunk = slice(index * CHUNK, index * CHUNK + count)
            carry = self._chunk(chunk, B[index], C[index], before, decay, states, scratch[:count], grad[:count], carry)
        if self.skip is not None:
            self.y.addcmul_(self.stage.u.squeeze(-2), self.skip.squeeze(-2))
            self.du.addcmul_(self.dy, self.skip)

    def _chunk(
        self,
        chunk: slice,
        B: Tensor,
        C: Tensor,
        before: Tensor,
        decay: Tensor,
        states: Tensor,
        scratch: Tensor,
        grad: Tensor,
        carry: Tensor | None,
    ) -> Tensor:
        """One chunk; returns the gradient of the state before it. `carry` is that of the state after it."""
        stage, dy = self.stage, self.dy[chunk]
        dt, u = stage.dt[chunk], stage.u[chunk]
        _read_out(states, C, scratch, self.y[chunk])
        # The read-out of complex states is twice the real part, so their gradient carries the factor.
        weight = 2 * dy if states.is_complex() else dy
        self._accumulate("C", chunk, torch.mul(states.conj(), weight, out=scratch))
        torch.mul(C.conj(), weight, out=grad)
        if carry is not None:
            grad[-1].add_(carry)
        steps, factors = grad.unbind(0), decay.conj().unbind(0)
        for t in range(len(steps) - 2, -1, -1):
            steps[t].addcmul_(factors[t + 1], steps[t + 1])
        self._accumulate("B", chunk, torch.mul(grad, dt * u, out=scratch))
        through_input = _sum_over_states(grad, B.conj(), scratch, torch.empty_like(self.y[chunk])).unsqueeze(-2)
        torch.mul(through_input, dt, out=self.du[chunk])
        # From here on `grad` is the gradient of the exponent dt * A: g * conj(decay * previous state).
        carry = factors[0] * steps[0]
        grad.mul_(decay.conj())
        grad[1:].mul_(states[:-1].conj())
        grad[0].mul_(before.conj())
        self.dA += torch.mul(grad, dt, out=scratch).sum((0, 2))[:, None]
        through_decay = torch.mul(grad, stage.A.conj(), out=scratch).real.sum(-2, keepdim=True)
        torch.addcmul(through_decay, through_input, u, out=self.ddt[chunk])
        return carry

    def _accumulate(self, name: str, chunk: slice, product: Tensor) -> None:
        """Add a chunk's product (t, s, b, g, n, k) to the gradient of B or C, summed to its shape."""
        target = self.projections[name]
        if self.stage.varies[name]:
            torch.sum(product, -1, keepdim=True, out=target[chunk])
        else:
            target += product.sum((0, 2), keepdim=True)

    def gradients(self) -> list[Gradients]:
        """Per direction, for this slice of the batch: sequences (b, ...), parameters summed over the slice."""
        stage = self.stage
        ddelta = torch.ops.aten.softplus_backward(self.ddt, stage.raw, 1, 20) if stage.softplus else self.ddt
        found = []
        for index, direction in enumerate(stage.directions):
            ddelta_rows = ddelta[:, index].flatten(-3)
            skip = None if direction.D is None else (self.dy[:, index] * stage.u[:, index]).sum((0, 1)).flatten()
            found.append(
                Gradients(
                    u=direction.columns(self.du[:, index].flatten(-3)),
                    delta=direction.columns(ddelta_rows),
                    A=_channels_first(self.dA[index, 0]),
                    B=self._projection_gradient("B", index),
                    C=self._projection_gradient("C", index),
                    D=skip,
                    delta_bias=None if direction.delta_bias is None else ddelta_rows.sum((0, 1)),
                )
            )
        return found

    def _projection_gradient(self, name: str, index: int) -> Tensor:
        """The gradient of B or C of one direction in its public form: (b, g, n, l) or (d, n)."""
        gradient = self.projections[name][:, index]
        if not self.stage.varies[name]:
            return _channels_first(gradient[0, 0])
        columns = self.stage.directions[index].columns(gradient.squeeze(-1))
        return torch.view_as_real(columns).flatten(-2) if columns.is_complex() else columns


def _channels_first(parameter: Tensor) -> Tensor:
    """(g, n, k) as (d, n)."""
    return parameter.transpose(1, 2).flatten(0, 1)


def _join(parts: list[Gradients], direction: Direction) -> Gradients:
    """The gradients of all slices of the batch as one, in the arguments' dtypes."""

    def sequence(name: str) -> Tensor:
        like = getattr(direction, name)
        values = [getattr(part, name) for part in parts]
        if like.dim() == 2:
            return torch.stack(values).sum(0).to(like.dtype)
        return torch.cat(values).to(like.dtype)

    def parameter(name: str) -> Tensor | None:
        like = getattr(direction, name)
        return None if like is None else torch.stack([getattr(part, name) for part in parts]).sum(0).to(like.dtype)

    dA = parameter("A")
    assert dA is not None
    return Gradients(
        sequence("u"),
        sequence("delta"),
        dA,
        sequence("B"),
        sequence("C"),
        parameter("D"),
        parameter("delta_bias"),
    )
