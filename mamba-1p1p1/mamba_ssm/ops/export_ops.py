"""The ops of this project in ONNX's own operators: what `torch.onnx.export` calls in place of each.

    b batch, h height, w width (of a picture, or taps of a convolution), l length, d channels, e inner channels,
    n state, r dt rank, s streams (directions or groups)

Each function takes an op's arguments in its schema's order: tensors as values of the graph, everything else as it is.
Sizes are those of the example that the model is exported with; only the batch may be dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch
from onnxscript import opset18 as op

from mamba_ssm.ops import export_scan, mamba_inner, selective_scan_2d  # noqa: F401  (importing an op registers it)
from mamba_ssm.ops.export_functions import Functions
from mamba_ssm.ops.export_graph import ints, number, record, softplus
from mamba_ssm.ops.export_lines import scan_lines
from mamba_ssm.ops.export_scan import Sequences
from mamba_ssm.ops.reference import ROUTES
from mamba_ssm.ops.selective_scan_native import PER_BLOCK, PER_DIRECTION

Translation = Callable[..., Any]


@dataclass(frozen=True)
class Writer:
    """How scans are written.

    Attributes:
        scheme: one of `export.SCHEMES`.
        functions: where an op becomes a node with its definition beside it; None writes the definition in its place.
    """

    scheme: str
    functions: Functions | None = None

    def scan(self, inputs: Sequences) -> tuple[Any, Any]:
        return export_scan.run(inputs, self.scheme)

    def write(
        self,
        name: str,
        inputs: Sequence[Any],
        sizes: tuple[Any, ...],
        define: Callable[[list[Any]], Sequence[Any]],
        **attributes: Any,
    ) -> Sequence[Any]:
        """The outputs of an op; see `Functions.call`."""
        if self.functions is None:
            return define(list(inputs))
        return self.functions.call(name, inputs, sizes, define, **attributes)


def table(scheme: str, functions: Functions | None = None) -> dict[Any, Translation]:
    """The translation of every op, by op."""
    ops, writer = torch.ops.mamba_ssm, Writer(scheme, functions)
    scans: dict[Any, Translation] = {
        ops.selective_scan.default: _selective_scan,
        ops.bidirectional_scan.default: _bidirectional_scan,
        ops.bidirectional_inner.default: _bidirectional_inner,
        ops.bidirectional_blocks.default: _bidirectional_blocks,
        ops.selective_scan_2d.default: _selective_scan_2d,
    }
    # torch reads a translation's module and name, which a partial function lacks.
    translations = {op: update_wrapper(partial(scan, writer), scan) for op, scan in scans.items()}
    return {
        **translations,
        ops.add_norm.default: _add_norm,
        torch.ops.causal_conv1d.conv1d.default: _conv1d,
        torch.ops.aten.gelu.default: _gelu,
    }


# --- small parts ----------------------------------------------------------------------------------------------------


def _sizes(value: Any) -> list[Any]:
    """The sizes of a value of the graph: numbers, and symbols where they are dynamic."""
    return [size if isinstance(size, int) else None for size in value.shape]


def _fixed(name: str, size: Any) -> int:
    if not isinstance(size, int):
        raise ValueError(f"only the batch may be dynamic in an exported scan, but its {name} is not fixed")
    return size


def _require_fp32(*values: Any) -> None:
    for value in values:
        if value is not None and value.dtype is not None and str(value.dtype) != "FLOAT":
            raise ValueError(f"only scans of fp32 can be exported, got {value.dtype}; call .float() on the model first")


def _require_real(u: Any, delta: Any, A: Any, *others: Any) -> None:
    if str(A.dtype).startswith("COMPLEX"):
        raise ValueError("a scan with complex A cannot be exported")
    _require_fp32(u, delta, A, *others)


def _silu(value: Any) -> Any:
    return op.Mul(value, op.Sigmoid(value))


def _reverse(value: Any, axis: int) -> Any:
    return op.Slice(value, ints(-1), ints(-(2**63) + 1), ints(axis), ints(-1))


def _stack(values: Sequence[Any]) -> Any:
    """Along a new first axis."""
    return op.Concat(*(op.Unsqueeze(value, ints(0)) for value in values), axis=0)


def _stack_given(values: Sequence[Any], like: Any) -> Any | None:
    """(s, d) of one (d,) per stream; zeros where there is none, None if there is none at all."""
    if all(value is None for value in values):
        return None
    return _stack([op.Mul(like, number(0.0)) if value is None else value for value in values])


def _columns(value: Any, *widths: int) -> list[Any]:
    """Parts of these widths along the last axis."""
    return record("Split", [value, ints(*widths)], len(widths), axis=-1)


def _with(y: Any, operator: Any, value: Any | None) -> Any:
    return y if value is None else operator(y, value)


def _taps(u: Any, weights: list[Any], bias: Any | None, length: int) -> Any:
    """The causal convolution of (s, l, b, e), a multiply-add per tap; each weight, and the bias, is (s, 1, 1, e)."""
    width = len(weights)
    padded = op.Pad(u, ints(0, width - 1, *[0] * 6)) if width > 1 else u
    total = bias
    for shift, weight in enumerate(weights):
        part = op.Slice(padded, ints(shift), ints(shift + length), ints(1)) if width > 1 else padded
        term = op.Mul(part, weight)
        total = term if total is None else op.Add(total, term)
    return total


# --- the convolution and the norm -----------------------------------------------------------------------------------


def _conv1d(x: Any, weight: Any, bias: Any, seq_idx: Any, silu: bool, reverse: bool) -> Any:
    """`causal_conv1d::conv1d` on (b, d, l)."""
    _require_fp32(x, weight, bias)
    if seq_idx is not None:
        raise ValueError("a convolution over packed sequences (`seq_idx`) cannot be exported")
    channels, width = _sizes(weight)
    out = op.Conv(
        x,
        op.Unsqueeze(_reverse(weight, 1) if reverse else weight, ints(1)),
        bias,
        group=channels,
        kernel_shape=[width],
        pads=[0, width - 1] if reverse else [width - 1, 0],
    )
    return _silu(out) if silu else out


def _add_norm(x: Any, residual: Any, weight: Any, bias: Any, eps: float, rms: bool, stored: Any) -> tuple[Any, Any]:
    """`mamba_ssm::add_norm`; the sum is empty where it is not asked for."""
    _require_fp32(x, residual, weight, bias)
    total = _with(x, op.Add, residual)
    y = _normalised(total, weight, bias, eps, rms)
    return y, (op.ConstantOfShape(ints(0)) if stored is None else total)


def _normalised(total: Any, weight: Any, bias: Any, eps: float, rms: bool) -> Any:
    if not rms:
        affine = [weight] if bias is None else [weight, bias]
        return record("LayerNormalization", [total, *affine], 1, axis=-1, epsilon=eps)[0]
    # In the form that runtimes recognise as one operator.
    mean = op.ReduceMean(op.Pow(total, number(2.0)), ints(-1))
    scaled = op.Div(total, op.Sqrt(op.Add(mean, number(eps))))
    return _with(op.Mul(scaled, weight), op.Add, bias)


def _gelu(x: Any, approximate: str = "none") -> Any:
    """torch's own GELU, in the order in which runtimes recognise it as one operator, as they do not torch's."""
    if approximate == "tanh":
        inner = op.Mul(op.Add(x, op.Mul(op.Pow(x, number(3.0)), number(0.044715))), number(math.sqrt(2 / math.pi)))
        return op.Mul(op.Mul(x, number(0.5)), op.Add(op.Tanh(inner), number(1.0)))
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, number(math.sqrt(2.0)))), number(1.0))), number(0.5))


# --- scans of sequences ---------------------------------------------------------------------------------------------


def _steps(delta: Any, bias: Any | None, positive: bool) -> Any:
    delta = _with(delta, op.Add, bias)
    return softplus(delta) if positive else delta


def _stream(u: Any, delta: Any, A: Any, B: Any, C: Any, bias: Any, softplus: bool, reverse: bool) -> Sequences:
    """One call's tensors, (b, d, l) and (b, g, n, l), as the sequences of its g streams."""
    _, channels, length = _sizes(u)
    states = _fixed("number of states", _sizes(A)[1])
    groups = next((_sizes(value)[1] for value in (B, C) if len(_sizes(value)) == 4), 1)
    inner = channels // groups
    dt = _steps(delta, None if bias is None else op.Unsqueeze(bias, ints(1)), softplus)

    def over_time(value: Any, *tail: int) -> Any:
        """(b, s x, l) as (l, b, s, *tail), where x is the product of the tail."""
        value = op.Reshape(op.Transpose(value, perm=[2, 0, 1]), ints(length, -1, groups, *tail))
        return _reverse(value, 0) if reverse else value

    def projection(value: Any, *tail: int) -> Any:
        if len(_sizes(value)) == 2:
            rows = op.Reshape(value, ints(groups, inner, states))
            return op.Unsqueeze(op.Transpose(rows, perm=[0, 2, 1]), ints(0))
        if len(_sizes(value)) == 4 and _sizes(value)[1] == groups:
            return over_time(op.Reshape(value, ints(-1, groups * states, length)), *tail)
        rows = op.Reshape(value, ints(-1, 1, states, length))
        spread = op.Concat(*([rows] * groups), axis=1) if groups > 1 else rows
        return over_time(op.Reshape(spread, ints(-1, groups * states, length)), *tail)

    return Sequences(
        dt=over_time(dt, 1, inner),
        drive=over_time(op.Mul(dt, u), 1, inner),
        B=projection(B, states, 1),
        C=projection(C, 1, states),
        A=op.Transpose(op.Reshape(A, ints(groups, inner, states)), perm=[0, 2, 1]),
        length=_fixed("length", length),
        streams=groups,
        states=states,
        channels=inner,
        constant_b=len(_sizes(B)) == 2,
        constant_c=len(_sizes(C)) == 2,
    )


def _undo(y: Any, inputs: Sequences, reverse: bool) -> Any:
    """(l, b, s, 1, d) as (b, s d, l)."""
    y = op.Transpose(op.Reshape(y, ints(inputs.length, -1, inputs.streams * inputs.channels)), perm=[1, 2, 0])
    return _reverse(y, 2) if reverse else y


def _column(value: Any) -> Any | None:
    return None if value is None else op.Unsqueeze(value, ints(1))


def _selective_scan(writer: Writer, *arguments: Any) -> tuple[Any, Any, Any]:
    """`mamba_ssm::selective_scan`."""
    *tensors, softplus, reverse, keep_states = arguments
    _refuse_training(keep_states)
    _require_real(*tensors)

    def define(tensors: list[Any]) -> Sequence[Any]:
        u, delta, A, B, C, D, bias, z = tensors
        part = _stream(u, delta, A, B, C, bias, softplus, reverse)
        y, last = writer.scan(part)
        out = _undo(y, part, reverse)
        if D is not None:
            out = op.Add(out, op.Mul(u, _column(D)))
        out = _with(out, op.Mul, None if z is None else _silu(z))
        return out, op.Reshape(
            op.Transpose(last, perm=[0, 1, 3, 2]), ints(-1, part.streams * part.channels, part.states)
        )

    switches = {"softplus": int(softplus), "reverse": int(reverse)}
    out, last = writer.write("SelectiveScan", tensors, (), define, **switches)
    return out, last, op.ConstantOfShape(ints(0))


def _bidirectional_scan(writer: Writer, *arguments: Any) -> tuple[Any, Any]:
    """`mamba_ssm::bidirectional_scan`: one call for each direction, whose arguments need not fit together."""
    *tensors, z, softplus, keep_states = arguments
    total = None
    for reverse in (False, True):
        one = tensors[PER_DIRECTION * reverse : PER_DIRECTION * (reverse + 1)]
        out, _, _ = _selective_scan(writer, *one, None, softplus, reverse, keep_states)
        total = out if total is None else op.Add(total, out)
    total = _with(total, op.Mul, None if z is None else _silu(z))
    return total, op.ConstantOfShape(ints(0))


def _refuse_training(keep_states: bool) -> None:
    if keep_states:
        raise ValueError("a scan that keeps its states for gradients cannot be exported; export under torch.no_grad()")


# --- a block with two directions ------------------------------------------------------------------------------------


def _bidirectional_inner(writer: Writer, xz: Any, *arguments: Any) -> Any:
    """`mamba_ssm::bidirectional_inner` on (b, 2 e, l)."""
    *parameters, scale = arguments
    _require_fp32(xz, *parameters)
    length = _fixed("length", _sizes(xz)[2])
    y = _gated(writer, op.Transpose(xz, perm=[2, 0, 1]), length, parameters, scale)
    return op.Transpose(y, perm=[1, 2, 0])


def _bidirectional_blocks(
    writer: Writer, x: Any, residual: Any, parameters: Sequence[Any], eps: float, rms: bool, scale: float
) -> tuple[Any, Any]:
    """`mamba_ssm::bidirectional_blocks` on (b, l, m), computed with the time first."""
    _require_fp32(x, residual, *parameters)
    length = _fixed("length", _sizes(x)[1])
    x = op.Transpose(x, perm=[1, 0, 2])
    residual = None if residual is None else op.Transpose(residual, perm=[1, 0, 2])
    for first in range(0, len(parameters), PER_BLOCK):
        norm_weight, norm_bias, *outer = parameters[first : first + 6]
        residual = _with(x, op.Add, residual)
        normed = _normalised(residual, norm_weight, norm_bias, eps, rms)
        xz = _linear(normed, outer[0], outer[1])
        y = _gated(writer, xz, length, parameters[first + 6 : first + PER_BLOCK], scale)
        x = _linear(y, outer[2], outer[3])
    return op.Transpose(x, perm=[1, 0, 2]), op.Transpose(residual, perm=[1, 0, 2])


def _linear(x: Any, weight: Any, bias: Any | None) -> Any:
    return _with(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), op.Add, bias)


def _gated(writer: Writer, xz: Any, length: int, parameters: Sequence[Any], scale: float) -> Any:
    """Both directions of (l, b, 2 e), and their gated sum, (l, b, e)."""

    def define(tensors: list[Any]) -> Sequence[Any]:
        xz, *parameters = tensors
        return [_both_directions(writer, xz, length, parameters, scale)]

    return writer.write("BidirectionalInner", [xz, *parameters], (length,), define, scale=float(scale))[0]


def _both_directions(writer: Writer, xz: Any, length: int, parameters: Sequence[Any], scale: float) -> Any:
    """`_gated`; the second direction runs over a reversed copy."""
    both = list(zip(parameters[:PER_DIRECTION], parameters[PER_DIRECTION:], strict=True))
    taps, conv_bias, x_proj, dt_proj, A_log, D, dt_bias = both
    inner, states = _sizes(A_log[0])
    rank, width = _sizes(dt_proj[0])[1], _sizes(taps[0])[2]
    x, z = op.Split(xz, num_outputs=2, axis=2)
    u = op.Unsqueeze(x, ints(0))
    u = op.Concat(u, _reverse(u, 1), axis=0)
    stacked = op.Reshape(op.Transpose(_stack(taps), perm=[3, 0, 2, 1]), ints(width, 2, 1, 1, inner))
    weights = [op.Squeeze(op.Slice(stacked, ints(k), ints(k + 1), ints(0)), ints(0)) for k in range(width)]
    zero = op.ReduceSum(dt_proj[0], ints(1), keepdims=0)
    bias = _stack_given(conv_bias, zero)
    u = _silu(_taps(u, weights, None if bias is None else op.Unsqueeze(bias, ints(1, 2)), length))
    rows = op.Reshape(u, ints(2, -1, inner))
    projected = op.MatMul(rows, op.Transpose(_stack(x_proj), perm=[0, 2, 1]))
    r, B, C = _columns(projected, rank, states, states)
    bias = _stack_given(dt_bias, zero)
    delta = op.MatMul(r, op.Transpose(_stack(dt_proj), perm=[0, 2, 1]))
    dt = _steps(delta, None if bias is None else op.Unsqueeze(bias, ints(1)), True)

    def over_time(value: Any, *tail: int) -> Any:
        """(2, l b, x) as (l, b, 2, *tail), where x is the product of the tail."""
        return op.Transpose(op.Reshape(value, ints(2, length, -1, *tail)), perm=[1, 2, 0, 3, 4])

    A = op.Neg(op.Exp(op.Transpose(_stack(A_log), perm=[0, 2, 1])))
    driven = over_time(dt, 1, inner), over_time(op.Mul(dt, rows), 1, inner)
    pairs = over_time(B, states, 1), over_time(C, 1, states)
    y, _ = writer.scan(Sequences(*driven, *pairs, A, length, 2, states, inner))
    y = op.Transpose(op.Reshape(y, ints(length, -1, 2, inner)), perm=[2, 0, 1, 3])
    skip = _stack_given(D, zero)
    if skip is not None:
        y = op.Add(y, op.Mul(u, op.Unsqueeze(skip, ints(1, 2))))
    ahead, back = (op.Squeeze(half, ints(0)) for half in op.Split(y, num_outputs=2, axis=0))
    total = op.Mul(op.Add(ahead, _reverse(back, 0)), _silu(z))
    return total if scale == 1.0 else op.Mul(total, number(scale))


# --- a picture in four directions -----------------------------------------------------------------------------------


def _selective_scan_2d(writer: Writer, *arguments: Any) -> tuple[Any, Any]:
    """`mamba_ssm::selective_scan_2d` on (b, h, w, d)."""
    *tensors, directions, keep_states = arguments
    _refuse_training(keep_states)
    _require_fp32(*tensors)
    _, height, width, _ = _sizes(tensors[0])
    sides = _fixed("height", height), _fixed("width", width)

    def define(tensors: list[Any]) -> Sequence[Any]:
        return [_over_picture(writer, tensors, sides, ROUTES[directions])]

    y = writer.write("SelectiveScan2D", tensors, sides, define, directions=directions)[0]
    return y, op.ConstantOfShape(ints(0))


def _over_picture(
    writer: Writer, tensors: Sequence[Any], sides: tuple[int, int], routes: Sequence[tuple[bool, bool]]
) -> Any:
    x, projected, dt_weight, A, D, dt_bias = tensors
    channels, states = _sizes(A)[1:]
    rank, count, length = _sizes(dt_weight)[2], len(routes), sides[0] * sides[1]
    if writer.scheme == "chunks" and states == 1:
        total = scan_lines(x, projected, dt_weight, A, dt_bias, routes, sides)
        return total if D is None else op.Add(total, op.Mul(x, op.ReduceSum(D, ints(0), keepdims=0)))
    rows = op.Reshape(op.Transpose(projected, perm=[3, 0, 1, 2, 4]), ints(count, -1, rank + 2 * states))
    r, B, C = _columns(rows, rank, states, states)
    delta = op.MatMul(r, op.Transpose(dt_weight, perm=[0, 2, 1]))
    dt = _steps(delta, None if dt_bias is None else op.Unsqueeze(dt_bias, ints(1)), True)
    drive = op.Mul(dt, op.Reshape(x, ints(1, -1, channels)))
    packed = op.Concat(dt, drive, B, C, axis=2)
    along = _routed(packed, routes, *sides, 2 * (channels + states))
    parts = _columns(along, channels, channels, states, states)
    shapes = ((1, channels), (1, channels), (states, 1), (1, states))
    cut = zip(parts, shapes, strict=True)
    dt, drive, B, C = (op.Reshape(part, ints(length, -1, count, *tail)) for part, tail in cut)
    A = op.Transpose(A, perm=[0, 2, 1])
    y, _ = writer.scan(Sequences(dt, drive, B, C, A, length, count, states, channels))
    total = _merged(y, routes, *sides, channels)
    return total if D is None else op.Add(total, op.Mul(x, op.ReduceSum(D, ints(0), keepdims=0)))


def _routed(packed: Any, routes: Sequence[tuple[bool, bool]], height: int, width: int, columns: int) -> Any:
    """(k, b h w, c) in image order as (l, b, k, c), each direction in its own."""
    taken = []
    for part, (by_columns, reverse) in zip(op.Split(packed, num_outputs=len(routes), axis=0), routes, strict=True):
        picture = op.Reshape(part, ints(-1, height, width, columns))
        pixels = op.Transpose(picture, perm=[2, 1, 0, 3] if by_columns else [1, 2, 0, 3])
        pixels = op.Reshape(pixels, ints(height * width, -1, 1, columns))
        taken.append(_reverse(pixels, 0) if reverse else pixels)
    return op.Concat(*taken, axis=2)


def _merged(y: Any, routes: Sequence[tuple[bool, bool]], height: int, width: int, channels: int) -> Any:
    """(l, b, k, 1, d), each direction in its own order, summed in image order: (b, h, w, d)."""
    total = None
    for part, (by_columns, reverse) in zip(op.Split(y, num_outputs=len(routes), axis=2), routes, strict=True):
        pixels = _reverse(part, 0) if reverse else part
        sides = (width, height) if by_columns else (height, width)
        picture = op.Reshape(pixels, ints(*sides, -1, channels))
        picture = op.Transpose(picture, perm=[2, 1, 0, 3] if by_columns else [2, 0, 1, 3])
        total = picture if total is None else op.Add(total, picture)
    return total
