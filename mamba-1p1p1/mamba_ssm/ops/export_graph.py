"""Nodes of an ONNX graph while torch records it: constants, nodes with several outputs, graphs within the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import evaluator
from onnxscript import opset18 as op

FLOAT = ir.TensorType(ir.DataType.FLOAT)


def ints(*values: int) -> Any:
    """A constant (k,) of 64-bit integers, as shapes and axes must be."""
    return _constant(np.array(values, dtype=np.int64))


def number(value: float) -> Any:
    """A constant in fp32, what all scans are computed in here."""
    return _constant(np.array(value, dtype=np.float32))


def _constant(value: NDArray[Any]) -> Any:
    """As a tensor: ONNX Runtime up to 1.23 cannot read numbers in the other attributes of a function's constants."""
    return op.Constant(value=ir.serde.serialize_tensor(ir.tensor(value)))


def _recorded() -> list[ir.Node]:
    recorder: Any = evaluator.default()  # torch's, while it exports
    nodes: list[ir.Node] = recorder.nodes
    return nodes


def add_node(node: ir.Node) -> Sequence[ir.Value]:
    """Add a node to the graph; its outputs."""
    _recorded().append(node)
    return node.outputs


def record(operator: str, inputs: Sequence[Any], count: int, **attributes: Any) -> list[Any]:
    """Record a node with `count` outputs, which onnxscript's functions cannot know for `Scan` and `Split`."""
    made = ir.convenience.convert_attributes(attributes)
    return list(add_node(ir.Node("", operator, inputs, made, num_outputs=count, version=18)))


def softplus(value: Any) -> Any:
    """max(x, 0) + log(1 + e), e = exp(-|x|): several times as fast as the runtime's own operator, and as exact.

    What 1 + e rounds away of e is added again, divided by it: that is all of a very small step size.
    """
    e = op.Exp(op.Neg(op.Abs(value)))
    one = number(1.0)
    rounded = op.Add(e, one)
    lost = op.Div(op.Sub(e, op.Sub(rounded, one)), rounded)
    return op.Add(op.Relu(value), op.Add(op.Log(rounded), lost))


def graph_of(name: str, parameters: Sequence[ir.Value], define: Callable[[], Sequence[Any]]) -> ir.Graph:
    """A graph of its own, of what `define` records; it may read values of the graph that it stands in."""
    nodes = _recorded()
    before = len(nodes)
    outputs = define()
    own = nodes[before:]
    del nodes[before:]
    for place, value in enumerate(outputs):
        value.name = f"{name}_{place}"
        value.type = value.type or FLOAT
    return ir.Graph(parameters, outputs, nodes=own, opset_imports={"": 18}, name=name)


def loop(
    states: Sequence[Any],
    sequences: Mapping[str, Any],
    turn: Callable[..., tuple[Sequence[Any], Sequence[Any]]],
    shapes: Mapping[str, Sequence[int | None]],
    state_shape: Sequence[int | None],
    backward: tuple[Sequence[bool], Sequence[bool]] = ((), ()),
) -> list[Any]:
    """An ONNX `Scan`: the last states, then what each turn gives, stacked along a new first axis.

    Args:
        states: at the start, all of one shape.
        sequences: what the turns go through, along the first axis.
        turn: takes the states, then an element of each sequence by its name; gives states and outputs.
        shapes: of an element of each sequence. state_shape: of a state; None where a size is dynamic.
        backward: which sequences are gone through from the last element to the first, and which outputs are stacked
            so; none if empty.
    """
    held = [ir.Value(name=f"state_{place}", type=FLOAT, shape=ir.Shape(state_shape)) for place in range(len(states))]
    taken = {name: ir.Value(name=name, type=FLOAT, shape=ir.Shape(shapes[name])) for name in sequences}

    def define() -> Sequence[Any]:
        after, outputs = turn(*held, **taken)
        for value in after:
            value.shape = ir.Shape(state_shape)
        return [*after, *outputs]

    body = graph_of("turn", [*held, *taken.values()], define)
    names = ("scan_input_directions", "scan_output_directions")
    ways = {name: [int(way) for way in some] for name, some in zip(names, backward, strict=True) if any(some)}
    inputs = [*states, *sequences.values()]
    return record("Scan", inputs, len(body.outputs), body=body, num_scan_inputs=len(taken), **ways)
