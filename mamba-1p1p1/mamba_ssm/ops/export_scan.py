"""The recurrence of the selective scan in ONNX's own operators, by schemes whose numbers have no range limit.

    b batch, s streams (directions or groups, each with its own A), d channels of a stream, l length, n state
    m lanes: equal parts of the sequence that are scanned side by side; t steps that one turn of a loop takes

Nothing here divides by a product of decays, which a strong decay makes zero: every factor is at most one.

`steps` is one ONNX `Scan` with one turn per token, for all streams at once: the smallest graph. `chunks` takes t tokens
per turn, so that decays and inputs are made by few large operators, and with few states cuts the sequence into m lanes:
each is scanned from zero, and the state that its predecessor leaves is added afterwards, times the product of the
decays since: h[t] = h0[t] + a[t] ... a[1] h_in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import evaluator
from onnxscript import opset18 as op

STEPS_PER_TURN = 4
LANE_ELEMENTS = 16384  # of the state of all lanes together: enough for an operator to outweigh the cost of its call
MOST_LANES = 64


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


def ints(*values: int) -> Any:
    """A constant (k,) of 64-bit integers, as shapes and axes must be."""
    return op.Constant(value_ints=list(values))


def number(value: float) -> Any:
    """A constant in fp32, what all scans are computed in here."""
    return op.Constant(value_float=value)


def record(operator: str, inputs: list[Any], count: int, **attributes: Any) -> list[Any]:
    """Record a node with `count` outputs, which onnxscript's functions cannot know for `Scan` and `Split`."""
    made = ir.convenience.convert_attributes(attributes)
    node = ir.Node("", operator, inputs, attributes=made, num_outputs=count, version=18)
    recorder: Any = evaluator.default()  # torch's, while it exports
    recorder.nodes.append(node)
    return list(node.outputs)


def run(inputs: Sequences, scheme: str) -> tuple[Any, Any]:
    """Record the scan's nodes: <C, h> at every token, (l, b, s, 1, d), and the last state, (b, s, n, d).

    Args:
        scheme: one of `export.SCHEMES`.
    """
    turn = 1 if scheme == "steps" else min(STEPS_PER_TURN, inputs.length)
    lanes = _lanes(inputs, turn) if scheme == "chunks" else 1
    turns = math.ceil(inputs.length / (lanes * turn))
    tails = inputs.tails
    cut = {name: _cut(getattr(inputs, name), tails[name], inputs.length, lanes, turns, turn) for name in tails}
    outputs = _loop(inputs, cut, turn, with_products=lanes > 1)
    if lanes == 1:
        last, y = outputs[0], _joined(outputs[1], tails["dt"], 1, turns * turn)
    else:
        y, last = _connected(inputs, outputs, lanes, turns * turn)
    if lanes * turns * turn > inputs.length:
        y = op.Slice(y, ints(0), ints(inputs.length), ints(0))
    return y, last


def _lanes(inputs: Sequences, turn: int) -> int:
    """How many lanes: one if the state is large, or if it has many numbers for one of the output."""
    if inputs.states > 1 or inputs.constant_c:
        return 1
    fitting = LANE_ELEMENTS // (inputs.streams * inputs.channels)
    return max(1, min(fitting, MOST_LANES, inputs.length // (2 * turn)))


def _cut(value: Any, tail: tuple[int, ...], length: int, lanes: int, turns: int, turn: int) -> Any:
    """(l, b, *tail) as (turns, [t], m b, *tail), zeros at the end: with a step size of zero they leave the state."""
    missing = lanes * turns * turn - length
    if missing:
        value = op.Pad(value, ints(*[0] * 5, missing, *[0] * 4))
    if lanes > 1:
        apart = op.Reshape(value, ints(lanes, turns * turn, -1, *tail))
        value = op.Transpose(apart, perm=[1, 0, 2, 3, 4, 5])
    return value if turn == 1 and lanes == 1 else op.Reshape(value, ints(turns, turn, -1, *tail))


def _joined(value: Any, tail: tuple[int, ...], lanes: int, steps: int) -> Any:
    """(turns, [t], m b, *tail) as (m steps, b, *tail)."""
    if lanes > 1:
        apart = op.Reshape(value, ints(steps, lanes, -1, *tail))
        value = op.Transpose(apart, perm=[1, 0, 2, 3, 4, 5])
    return op.Reshape(value, ints(lanes * steps, -1, *tail))


def _loop(inputs: Sequences, cut: dict[str, Any], turn: int, *, with_products: bool) -> list[Any]:
    """The `Scan` node: the last state, with lanes the product of all decays, and what each turn gives.

    The latter are <C, h> and, before it, with lanes, C times the product of the decays since the start.
    """
    axis = 1 if turn == 1 else 2
    batch = op.Shape(cut["dt"], start=axis, end=axis + 1)
    shape = op.Concat(batch, ints(inputs.streams, inputs.states, inputs.channels), axis=0)
    start = [op.Expand(number(0.0), shape)]
    if with_products:
        start.append(op.Expand(number(1.0), shape))
    body = _body(inputs, turn, with_products, ir.DataType(inputs.A.dtype or ir.DataType.FLOAT))
    return record("Scan", [*start, *cut.values()], len(body.outputs), body=body, num_scan_inputs=len(cut))


def _body(inputs: Sequences, turn: int, with_products: bool, dtype: ir.DataType) -> ir.Graph:
    """One turn of the loop: (h, [p], dt, drive, ...) to (h, [p], [C p], <C, h>)."""
    tape = ir.tape.Tape()
    kind = ir.TensorType(dtype)
    lead: tuple[Any, ...] = (None,) if turn == 1 else (turn, None)
    tails = inputs.tails
    taken = {name: ir.Value(name=name, type=kind, shape=ir.Shape((*lead, *tail))) for name, tail in tails.items()}
    state_shape = ir.Shape((None, inputs.streams, inputs.states, inputs.channels))
    states = [ir.Value(name="state", type=kind, shape=state_shape)]
    if with_products:
        states.append(ir.Value(name="product", type=kind, shape=state_shape))

    decay = tape.op("Exp", [tape.op("Mul", [taken["dt"], inputs.A])])
    added = tape.op("Mul", [taken.get("B", inputs.B), taken["drive"]])
    decays, inflows = ([value] if turn == 1 else _unstack(tape, value, turn) for value in (decay, added))
    h, rows = states[0], []
    p, products = states[-1], []
    for own_decay, inflow in zip(decays, inflows, strict=True):
        h = tape.op("Add", [tape.op("Mul", [own_decay, h]), inflow])
        rows.append(h)
        if with_products:
            p = tape.op("Mul", [own_decay, p])
            products.append(p)
    outputs = [_plain(tape, h, turn), *([_plain(tape, p, turn)] if with_products else [])]
    for kept in (products, rows) if with_products else (rows,):
        whole = kept[0] if turn == 1 else tape.op("Concat", kept, {"axis": 0})
        outputs.append(_read(tape, inputs, taken.get("C", inputs.C), whole))
    for value, like in zip(outputs, states, strict=False):
        value.shape = like.shape
    for position, value in enumerate(outputs):
        value.name, value.type = f"given_{position}", kind
    return ir.Graph([*states, *taken.values()], outputs, nodes=tape.nodes, name="turn", opset_imports={"": 18})


def _unstack(tape: Any, value: Any, count: int) -> list[Any]:
    """The (1, b, s, n, d) of each step."""
    return list(tape.op_multi_out("Split", [value], {"axis": 0, "num_outputs": count}, num_outputs=count))


def _plain(tape: Any, value: Any, turn: int) -> Any:
    """The state (1, b, s, n, d) without its first axis."""
    if turn == 1:
        return value
    return tape.op("Squeeze", [value, tape.op("Constant", [], {"value": ir.tensor([0])})])


def _read(tape: Any, inputs: Sequences, C: Any, states: Any) -> Any:
    """<C, h> of (..., n, d): (..., 1, d)."""
    if inputs.constant_c:
        axes = tape.op("Constant", [], {"value": ir.tensor([-2])})
        return tape.op("ReduceSum", [tape.op("Mul", [states, C]), axes], {"keepdims": 1})
    return tape.op("Mul" if inputs.states == 1 else "MatMul", [C, states])


def _connected(inputs: Sequences, outputs: list[Any], lanes: int, steps: int) -> tuple[Any, Any]:
    """Add to every lane what the state before it comes to; n is 1."""
    ends, decays, products, y = outputs
    tail = [inputs.streams, inputs.states, inputs.channels]
    ends, decays = (op.Reshape(value, ints(lanes, -1, *tail)) for value in (ends, decays))
    first = op.Expand(number(0.0), op.Shape(ends, start=1))
    last, before = record("Scan", [first, decays, ends], 2, body=_carry(inputs), num_scan_inputs=2)
    incoming = op.Reshape(before, ints(-1, *tail))  # (m b, s, 1, d)
    return _joined(op.Add(y, op.Mul(products, incoming)), inputs.tails["dt"], lanes, steps), last


def _carry(inputs: Sequences) -> ir.Graph:
    """(h, decay of a lane, its end from zero) to (the state at its end, the state before it)."""
    tape = ir.tape.Tape()
    kind = ir.TensorType(ir.DataType(inputs.A.dtype or ir.DataType.FLOAT))
    shape = ir.Shape((None, inputs.streams, inputs.states, inputs.channels))
    h, decay, end = (ir.Value(name=name, type=kind, shape=shape) for name in ("state", "decay", "end"))
    after, before = tape.op("Add", [tape.op("Mul", [decay, h]), end]), tape.op("Identity", [h])
    for name, value in (("after", after), ("before", before)):
        value.name, value.type, value.shape = name, kind, shape
    return ir.Graph([h, decay, end], [after, before], nodes=tape.nodes, name="carry", opset_imports={"": 18})
