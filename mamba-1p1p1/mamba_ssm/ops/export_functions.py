"""Functions of an ONNX model: an op of this project as one node, with what it means beside it.

ONNX lets a model define an operator by a graph of others. A runtime that has a kernel for that operator, as ONNX
Runtime has with this project's library of custom operators, runs the kernel; any other puts the definition in its
place. So one file is fast where the library is, and right everywhere.

The operators are those of the domain "mamba_ssm", version 1; all tensors are fp32, `?` marks what may be absent:

    BidirectionalInner(xz, 2 x [conv_weight, conv_bias?, x_proj, dt_proj, A_log, D?, dt_bias?]) -> y
        xz (l, b, 2 e), conv_weight (e, 1, w), x_proj (r + 2 n, e), dt_proj (e, r), A_log (e, n), the others (e,), for
        each of two directions; y (l, b, e), the gated sum of both directions times the attribute `scale`
    SelectiveScan2D(x, projected, dt_weight, A, D?, dt_bias?) -> y
        as `selective_scan_2d`, with its argument `directions` as an attribute
    SelectiveScan(u, delta, A, B, C, D?, delta_bias?, z?) -> out, last_state
        as `selective_scan`, with `softplus` and `reverse` as attributes of 0 or 1

A definition holds the sizes that it is for. Of an operator that is used with several, the second is called NAME_2, the
next NAME_3 and so on: overloads, which ONNX has for that, are confused by ONNX Runtime up to 1.24 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from mamba_ssm.ops.export_graph import FLOAT, add_node, graph_of

DOMAIN = "mamba_ssm"
VERSION = 1
MOST_FORMS = 32  # of one operator that the library knows; what goes beyond is written in its place


class Functions:
    """The functions that a model turns out to need, one for each operator and the sizes that it is used with."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], ir.Function] = {}

    def call(
        self,
        name: str,
        inputs: Sequence[Any],
        sizes: tuple[Any, ...],
        define: Callable[[list[Any]], Sequence[Any]],
        **attributes: Any,
    ) -> Sequence[Any]:
        """Record one node of the operator `name`, and its definition if there is none yet.

        Args:
            inputs: values of the graph, None for those that are absent.
            sizes: what the definition depends on beside the shapes of the inputs.
            define: makes the outputs of its inputs; what it records becomes the definition.
        """
        key = (name, *sizes, *map(_form, inputs), *sorted(attributes.items()))
        if key not in self._known:
            form = 1 + sum(known[0] == name for known in self._known)
            if form > MOST_FORMS:
                return define(list(inputs))
            self._known[key] = _define(name if form == 1 else f"{name}_{form}", inputs, define)
        function = self._known[key]
        given = ir.convenience.convert_attributes(attributes)
        count = len(function.outputs)
        node = ir.Node(DOMAIN, function.name, inputs, given, num_outputs=count, version=VERSION)
        for value, like in zip(node.outputs, function.outputs, strict=True):
            value.type, value.shape = FLOAT, like.shape
        return add_node(node)

    def attach(self, model: ir.Model) -> None:
        """Add the definitions to a model that calls them."""
        for function in self._known.values():
            function.opset_imports[""] = model.opset_imports[""]  # all that they use is alike in every later one
            model.functions[function.identifier()] = function
        if self._known:
            model.opset_imports[DOMAIN] = VERSION
            NameFixPass()(model)  # a loop's body may not hide names of the definition that it stands in


def _form(value: Any) -> Any:
    """What a definition depends on of an input: its sizes, with those that are dynamic alike."""
    if value is None or value.shape is None:
        return "absent" if value is None else "of any size"
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _define(name: str, inputs: Sequence[Any], define: Callable[[list[Any]], Sequence[Any]]) -> ir.Function:
    parameters = [ir.Value(name=f"input_{place}") for place in range(len(inputs))]
    given: list[Any] = []
    for parameter, value in zip(parameters, inputs, strict=True):
        if value is not None:
            parameter.type, parameter.shape = value.type, value.shape
        given.append(None if value is None else parameter)
    graph = graph_of("output", parameters, lambda: define(given))
    return ir.Function(DOMAIN, name, graph=graph, attributes=())
