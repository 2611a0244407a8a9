"""The scan of a picture with one state, in ONNX's own operators: all lines side by side.

    b batch, h height, w width, d channels, r dt rank, k directions
    t steps along a line, m lines: the rows of a picture, or its columns

A direction reads a picture line after line. Each line is scanned from a state of zero, all of them at once: one ONNX
`Scan` with a turn for each step along a line, whose body holds everything from the step sizes to the output, so that
what it works on stays in a cache. A second, small `Scan` then finds the state at the start of each line, g, which the
output still lacks: h[t] = h0[t] + a[t] ... a[1] g. Every factor is at most one, so there is no range limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnxscript import opset18 as op

from mamba_ssm.ops.export_graph import ints, loop, number, record, softplus


def scan_lines(
    x: Any, projected: Any, dt_weight: Any, A: Any, dt_bias: Any | None, routes: Sequence[tuple[bool, bool]]
) -> Any:
    """The sum of all directions, (b, h, w, d), without the skip.

    Args:
        x: (b, h, w, d). projected: (b, h, w, k, r + 2).
        dt_weight: (k, d, r). A: (k, d, 1), negative. dt_bias: (k, d) or None.
        routes: of each direction, whether it goes by columns and whether in reverse.
    """
    count = len(routes)
    rows, weights, rates = (_each(value, axis, count) for value, axis in ((projected, 3), (dt_weight, 0), (A, 0)))
    biases = [None] * count if dt_bias is None else _each(dt_bias, 0, count)
    _, channels, rank = dt_weight.shape
    found: dict[bool, Any] = {}
    for k, (by_columns, reverse) in enumerate(routes):
        order = [1, 0, 2, 3] if by_columns else [2, 0, 1, 3]
        turned = [op.Transpose(value, perm=[1, 0]) for value in (weights[k], rates[k])]
        direction = _Direction(turned[0], turned[1], biases[k], channels, rank, reverse)
        y = direction.scan(op.Transpose(x, perm=order), op.Transpose(rows[k], perm=order))
        found[by_columns] = op.Add(found[by_columns], y) if by_columns in found else y
    pictures = [op.Transpose(y, perm=[1, 0, 2, 3] if by_columns else [1, 2, 0, 3]) for by_columns, y in found.items()]
    return pictures[0] if len(pictures) == 1 else op.Add(*pictures)


def _each(value: Any, axis: int, count: int) -> list[Any]:
    """The elements along an axis."""
    return [op.Squeeze(part, ints(axis)) for part in record("Split", [value], count, axis=axis, num_outputs=count)]


@dataclass(frozen=True)
class _Direction:
    """One direction: weight (r, d), A (1, d), bias (d,) or None; d, r; whether lines and their steps are reversed."""

    weight: Any
    A: Any
    bias: Any | None
    channels: int
    rank: int
    reverse: bool

    def scan(self, x: Any, projected: Any) -> Any:
        """The output of x (t, b, m, d) and projected (t, b, m, r + 2), in the order of x."""
        state, flags = (None, None, self.channels), self.reverse
        shape = op.Shape(x, start=1)
        start = [op.Expand(number(value), shape) for value in (0.0, 1.0)]
        shapes = {"x": state, "projected": (None, None, self.rank + 2)}
        sequences = {"x": x, "projected": projected}
        end, decay, y, missing = loop(start, sequences, self._step, shapes, state, flags)
        ends, decays = (op.Transpose(value, perm=[1, 0, 2]) for value in (end, decay))
        first = [op.Expand(number(0.0), op.Shape(ends, start=1))]
        line = (None, self.channels)
        _, before = loop(first, {"end": ends, "decay": decays}, _next_line, {"end": line, "decay": line}, line, flags)
        return op.Add(y, op.Mul(missing, op.Transpose(before, perm=[1, 0, 2])))

    def _step(self, h: Any, product: Any, x: Any, projected: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """One step of all lines: the state from zero and the product of its decays, and what is read of both."""
        r, B, C = record("Split", [projected, ints(self.rank, 1, 1)], 3, axis=-1)
        delta = op.MatMul(r, self.weight)
        dt = softplus(delta if self.bias is None else op.Add(delta, self.bias))
        decay = op.Exp(op.Mul(dt, self.A))
        h = op.Add(op.Mul(decay, h), op.Mul(B, op.Mul(dt, x)))
        product = op.Mul(decay, product)
        return [h, product], [op.Mul(C, h), op.Mul(C, product)]


def _next_line(g: Any, end: Any, decay: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """The state after a line, and the one before it."""
    return [op.Add(op.Mul(decay, g), end)], [op.Identity(g)]
