"""The recurrence of the selective scan in ONNX's own operators, by schemes whose numbers have no range limit.

    b batch, s streams (directions or groups, each with its own A), d channels of a stream, l length, n state

One ONNX `Scan` goes through the tokens of all streams at once: `steps` takes one a turn, for the smallest graph,
`chunks` STEPS_PER_TURN, so that decays and inputs are made by fewer and larger operators. Nothing here divides by a
product of decays, which a strong decay makes zero: every factor is at most one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnxscript import opset18 as op

from mamba_ssm.ops.export_graph import ints, loop, number, record

STEPS_PER_TURN = 4


@dataclass(frozen=True)
class Sequences:
    """What a scan takes, time first; l, s, n, d are fixed, b is not.

    Attributes:
        dt: (l, b, s, 1, d), step sizes, after bias and softplus. drive: the same shape, dt times the scan's input.
        B: (l, b, s, n, 1), or (1, s, n, d) if constant. C: (l, b, s, 1, n), or (1, s, n, d) if constant.
        A: (s, n, d), negative.
        length, streams, states, channels: l, s, n, d.
        constant_b, constant_c: whether B and C are constant.
    """

    dt: Any
    drive: Any
    B: Any
    C: Any
    A: Any
    length: int
    streams: int
    states: int
    channels: int
    constant_b: bool = False
    constant_c: bool = False

    @property
    def tails(self) -> dict[str, tuple[int, ...]]:
        """The sizes behind (l, b) of what the loop goes through."""
        found = {"dt": (1, self.channels), "drive": (1, self.channels)}
        found |= {} if self.constant_b else {"B": (self.states, 1)}
        found |= {} if self.constant_c else {"C": (1, self.states)}
        return {name: (self.streams, *tail) for name, tail in found.items()}


def run(inputs: Sequences, scheme: str) -> tuple[Any, Any]:
    """Record the scan's nodes: <C, h> at every token, (l, b, s, 1, d), and the last state, (b, s, n, d).

    Args:
        scheme: one of `export.SCHEMES`.
    """
    turn = 1 if scheme == "steps" else min(STEPS_PER_TURN, inputs.length)
    turns = math.ceil(inputs.length / turn)
    tails = inputs.tails
    cut = {name: _cut(getattr(inputs, name), tails[name], inputs.length, turns, turn) for name in tails}
    axis = 1 if turn == 1 else 2
    state = (inputs.streams, inputs.states, inputs.channels)
    start = op.Expand(number(0.0), op.Concat(op.Shape(cut["dt"], start=axis, end=axis + 1), ints(*state), axis=0))
    lead: tuple[int | None, ...] = (None,) if turn == 1 else (turn, None)

    def one(h: Any, **taken: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        return _turn(inputs, turn, h, **taken)

    shapes = {name: (*lead, *tail) for name, tail in tails.items()}
    last, y = loop([start], cut, one, shapes, (None, *state))
    if turn > 1:
        y = op.Reshape(y, ints(turns * turn, -1, *tails["dt"]))
    if turns * turn > inputs.length:
        y = op.Slice(y, ints(0), ints(inputs.length), ints(0))
    return y, last


def _cut(value: Any, tail: tuple[int, ...], length: int, turns: int, turn: int) -> Any:
    """(l, b, *tail) as (turns, [t], b, *tail), zeros at the end: with a step size of zero they leave the state."""
    if turns * turn > length:
        value = op.Pad(value, ints(*[0] * 5, turns * turn - length, *[0] * 4))
    return value if turn == 1 else op.Reshape(value, ints(turns, turn, -1, *tail))


def _turn(inputs: Sequences, turn: int, h: Any, dt: Any, drive: Any, B: Any = None, C: Any = None) -> Any:
    """The state after some tokens, and <C, h> of each."""
    decay = op.Exp(op.Mul(dt, inputs.A))
    added = op.Mul(inputs.B if B is None else B, drive)
    C = inputs.C if C is None else C
    if turn == 1:
        h = op.Add(op.Mul(decay, h), added)
        return [h], [_read(inputs, C, h)]
    rows = []
    each = (record("Split", [value], turn, axis=0, num_outputs=turn) for value in (decay, added))
    for own_decay, inflow in zip(*each, strict=True):
        h = op.Add(op.Mul(own_decay, h), inflow)
        rows.append(h)
    return [op.Squeeze(h, ints(0))], [_read(inputs, C, op.Concat(*rows, axis=0))]


def _read(inputs: Sequences, C: Any, states: Any) -> Any:
    """<C, h> of (..., n, d): (..., 1, d)."""
    if inputs.constant_c:
        return op.ReduceSum(op.Mul(states, C), ints(-2), keepdims=1)
    return op.Mul(C, states) if inputs.states == 1 else op.MatMul(C, states)
