"""Rewrite the graph of an ONNX file of vim/export_onnx.py in int8; needs onnx. What becomes int8 is in onnx_int8.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from command_line import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Ranges = dict[str, tuple[float, float]]

_X_PROJ = {"BidirectionalInner": (3, 10)}  # inputs of this project's nodes; see mamba_ssm/ops/export_functions.py
_LOW_RANK = 16  # a matrix with at least this many columns for each row is dt_proj: its rank is a 16th of the model's


def _names_in(graph: Any) -> Iterator[str]:
    """Yield every name that the nodes of a graph, and of the subgraphs in it, read or make."""
    for node in graph.node:
        yield from (*node.input, *node.output)
        for attribute in node.attribute:
            for body in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _names_in(body)
    for value in graph.output:
        yield value.name


def _int8(weight: Array, over: tuple[int, ...], least: Array | float = 0.0) -> tuple[Array, Array]:
    """Return `weight` as int8 and its fp32 scales, no smaller than `least`, one for all places along the axes `over`.

    The scales have as many axes as the weight.
    """
    largest = np.abs(weight.astype(np.float64)).max(axis=over, keepdims=True)
    scale = np.maximum(largest / 127, np.maximum(least, np.finfo(np.float32).tiny)).astype(np.float32)
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale


def _taps(weight: Array) -> tuple[int, ...]:
    """The axes that a convolution's weight is summed over."""
    return tuple(range(1, weight.ndim))


def _uint8(low: float, high: float) -> tuple[Array, Array]:
    """Return scale (fp32) and zero point (uint8) by which 0 to 255 cover `low` (<= 0) to `high` (>= 0)."""
    scale = max((high - low) / 255, float(np.finfo(np.float32).tiny))
    return np.array(scale, np.float32), np.array(round(-low / scale), np.uint8)


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _operator(node: Any) -> str:
    """The operator of a node, of this project's own whatever form of it: NAME_2 is NAME for another size."""
    return str(node.op_type.partition("_")[0] if node.domain else node.op_type)


class Rewriting:
    """The main graph of a model on the way from fp32 to int8.

    Attributes:
        ranges: smallest and largest value of each activation, zero among them; None where every call measures them.
    """

    def __init__(self, graph: Any) -> None:
        self.ranges: Ranges | None = None
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._nodes: list[Any] = []
        self._made: dict[tuple[str, str], tuple[str, ...]] = {}
        self._names = {*_names_in(graph), *self._constants}

    def kind(self, node: Any) -> str:
        """What becomes of a node: "product", "convolution", "stored" (its weights alone), or "" (nothing)."""
        if _operator(node) in _X_PROJ:
            return "stored"
        if node.domain or node.op_type not in ("MatMul", "Gemm", "Conv") or not self._are_weights(node.input[1:]):
            return ""
        sizes, said = list(self._constants[node.input[1]].dims), _attributes(node)
        if node.op_type == "Conv":
            return "convolution" if said.get("group", 1) == 1 else ""
        if said.get("alpha", 1) != 1 or said.get("beta", 1) != 1 or said.get("transA", 0) or len(sizes) < 2:
            return ""
        rows, columns = sizes[:-3:-1] if said.get("transB", 0) else sizes[-2:]
        if columns >= _LOW_RANK * rows:
            return ""
        return "product" if len(sizes) == 2 else "stored"  # of several streams at once: x_proj, its scan written out

    def _are_weights(self, names: Sequence[str]) -> bool:
        """Whether the first is a constant fp32 weight, and any other the bias that goes with it."""
        from onnx import TensorProto

        known = [self._constants[name] for name in names if name in self._constants]
        fp32 = all(tensor.data_type == TensorProto.FLOAT for tensor in known)
        return fp32 and len(known) == len(names) and all(len(tensor.dims) == 1 for tensor in known[1:])

    def run(self) -> None:
        """Rewrite every node that has a kind, and leave out the constants that nobody needs any more."""
        rewrite = {"product": self._product, "convolution": self._convolution, "stored": self._stored}
        for node in self._graph.node:
            kind = self.kind(node)
            if kind:
                rewrite[kind](node)
            else:
                self._nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        needed = set(_names_in(self._graph))
        tensors = [tensor for name, tensor in self._constants.items() if name in needed]
        del self._graph.initializer[:]
        self._graph.initializer.extend(tensors)

    def _stored(self, node: Any) -> None:
        """Keep the operator in fp32, and its weights as int8."""
        for place in _X_PROJ.get(_operator(node), (1,)):
            if self._are_weights(node.input[place : place + 1]):
                node.input[place] = self._stored_weight(node.input[place], node.op_type == "Conv")
        self._nodes.append(node)

    def _stored_weight(self, name: str, convolution: bool) -> str:
        """The fp32 values of a weight; onnxruntime folds Cast and Mul, but runs a DequantizeLinear at every call."""

        def make() -> tuple[str, ...]:
            value = self._array(name)
            quantized, scale = self._pair(name, *_int8(value, _taps(value) if convolution else (1,)))
            return (self._add("Mul", [self._add("Cast", [quantized], f"{name}_real", to=1), scale], f"{name}_fp32"),)

        return self._once("stored", name, make)[0]

    def _product(self, node: Any) -> None:
        """Rewrite `activation @ matrix`, a Gemm as it stands where the ranges are known."""
        if node.op_type == "Gemm" and self.ranges is not None:
            self._between_roundings(node, axis=0 if _attributes(node).get("transB", 0) else 1)
            return
        (activation, weight), biases = node.input[:2], [name for name in node.input[2:] if name]
        matrix = self._array(weight).T if _attributes(node).get("transB", 0) else self._array(weight)
        quantized, scale = _int8(matrix, (0,))
        pair = self._once("product", weight, lambda: self._pair(weight, quantized, scale[0]))
        product = self._free(f"{node.output[0]}_product") if biases else node.output[0]
        if self.ranges is None:
            self._dynamic_product(activation, pair, product)
        else:
            self._write("MatMul", [self._rounded(activation), self._real(weight, pair, axis=1)], [product])
        for bias in biases:
            self._write("Add", [product, bias], [node.output[0]])

    def _dynamic_product(self, activation: str, pair: tuple[str, ...], product: str) -> None:
        """Multiply with scales that are measured at every call; onnxruntime makes one operator of these."""

        def make() -> tuple[str, ...]:
            names = [self._free(f"{activation}_{what}") for what in ("uint8", "scale", "zero")]
            self._write("DynamicQuantizeLinear", [activation], names)
            return tuple(names)

        rounded, step, zero = self._once("measured", activation, make)
        sums = self._add("MatMulInteger", [rounded, pair[0], zero], f"{product}_int32")
        scales = self._add("Mul", [step, pair[1]], f"{product}_scale")
        self._write("Mul", [self._add("Cast", [sums], f"{product}_real", to=1), scales], [product])

    def _convolution(self, node: Any) -> None:
        if self.ranges is None:
            self._stored(node)
            return
        result = node.output[0]
        node.output[0] = self._free(f"{result}_sums")
        self._between_roundings(node, axis=0)
        self._round(node.output[0], result, self._point(result))

    def _between_roundings(self, node: Any, axis: int) -> None:
        """Keep an operator, with all that goes in rounded; `axis` of its weight is that of the outputs."""
        assert self.ranges is not None
        activation, weight, *biases = node.input
        value, bias = self._array(weight), [self._array(name) for name in biases]
        step = _uint8(*self.ranges[activation])[0].item()
        shape = [-1 if place == axis else 1 for place in range(value.ndim)]
        # Where the weights of a channel are tiny and its bias is not, the scale must let the bias fit into int32.
        least = np.abs(bias[0].astype(np.float64)) / step / 2**30 if bias else np.zeros(value.shape[axis])
        quantized, wide = _int8(
            value, tuple(place for place, size in enumerate(shape) if size == 1), least.reshape(shape)
        )
        scale = wide.ravel()
        node.input[:] = [self._rounded(activation), self._real(weight, self._pair(weight, quantized, scale), axis)]
        if bias:
            sums = scale * np.float32(step)
            rounded = np.rint(bias[0] / sums.astype(np.float64)).astype(np.int32)
            pair = self._pair(biases[0], rounded, sums)
            node.input.append(self._add("DequantizeLinear", pair, f"{biases[0]}_fp32", axis=0))
        self._nodes.append(node)

    def _real(self, name: str, pair: tuple[str, ...], axis: int) -> str:
        """The fp32 values of an int8 weight, in the operator that quantized ones are recognized by."""
        # Zero points that are left away, or that weights share, are what session.x64quantprecision stumbles over.
        zeros = self._constant(f"{name}_zeros", np.zeros(self._array(pair[1]).size, np.int8))
        return self._add("DequantizeLinear", [*pair, zeros], f"{name}_fp32", axis=axis)

    def _rounded(self, activation: str) -> str:
        """An activation as 256 values cover its range."""

        def make() -> tuple[str, ...]:
            result = self._free(f"{activation}_rounded")
            self._round(activation, result, self._point(activation))
            return (result,)

        return self._once("rounded", activation, make)[0]

    def _round(self, activation: str, result: str, point: tuple[str, ...]) -> None:
        uint8 = self._add("QuantizeLinear", [activation, *point], f"{activation}_uint8")
        self._write("DequantizeLinear", [uint8, *point], [result])

    def _point(self, activation: str) -> tuple[str, ...]:
        assert self.ranges is not None
        scale, zero = _uint8(*self.ranges[activation])
        return self._constant(f"{activation}_scale", scale), self._constant(f"{activation}_zero", zero)

    def _array(self, name: str) -> Array:
        from onnx import numpy_helper

        array: Array = numpy_helper.to_array(self._constants[name])
        if not np.isfinite(array).all():
            raise UsageError(f"the weights {name} are not finite numbers: the model cannot be quantized")
        return array

    def _pair(self, name: str, quantized: Array, scale: Array) -> tuple[str, ...]:
        return self._constant(f"{name}_{quantized.dtype}", quantized), self._constant(f"{name}_scale", scale)

    def _constant(self, name: str, value: Array) -> str:
        from onnx import numpy_helper

        name = self._free(name)
        self._constants[name] = numpy_helper.from_array(value, name)
        return name

    def _once(self, what: str, of: str, make: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
        """What `make` returned the first time: weights and activations may have several users."""
        if (what, of) not in self._made:
            self._made[what, of] = make()
        return self._made[what, of]

    def _free(self, name: str) -> str:
        """`name`, or one like it if it is taken."""
        free, count = name, 1
        while free in self._names:
            free, count = f"{name}_{count}", count + 1
        self._names.add(free)
        return free

    def _add(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node, and return the value that it makes, called `name` or like it."""
        name = self._free(name)
        self._write(op, inputs, [name], **attributes)
        return name

    def _write(self, op: str, inputs: Sequence[str], results: Sequence[str], **attributes: Any) -> None:
        from onnx import helper

        self._nodes.append(helper.make_node(op, inputs, results, **attributes))
