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

Route = tuple[bool, bool]


def scan_lines(
    x: Any, projected: Any, dt_weight: Any, A: Any, dt_bias: Any | None, routes: Sequence[Route], sides: tuple[int, int]
) -> Any:
    """The sum of all directions, (b, h, w, d), without the skip.

    Args:
        x: (b, h, w, d). projected: (b, h, w, k, r + 2).
        dt_weight: (k, d, r). A: (k, d, 1), negative. dt_bias: (k, d) or None.
        routes: of each direction, whether it goes by columns and whether in reverse.
        sides: h and w.
    """
    _, channels, rank = dt_weight.shape
    rows = record("Split", [projected], len(routes), axis=3, num_outputs=len(routes))
    turned = [op.Transpose(dt_weight, perm=[0, 2, 1]), op.Transpose(A, perm=[0, 2, 1])]
    parameters = [op.Unsqueeze(value, ints(1)) for value in turned]
    parameters += [] if dt_bias is None else [op.Unsqueeze(dt_bias, ints(1, 2))]
    found: dict[bool, Any] = {}
    for group in _groups(routes, sides):
        own = [op.Gather(value, ints(*group), axis=0) for value in parameters]
        weight, rates, *bias = own
        lines = _Lines(weight, rates, bias[0] if bias else None, channels, rank, tuple(routes[k][1] for k in group))
        xs = [_along(x, routes[k][0], sides, channels) for k in group]
        ys = lines.scan(xs, [_along(rows[k], routes[k][0], sides, rank + 2) for k in group])
        for k, y in zip(group, ys, strict=True):
            by_columns = routes[k][0]
            found[by_columns] = op.Add(found[by_columns], y) if by_columns in found else y
    pictures = [op.Transpose(y, perm=[1, 0, 2, 3] if by_columns else [1, 2, 0, 3]) for by_columns, y in found.items()]
    return pictures[0] if len(pictures) == 1 else op.Add(*pictures)


def _groups(routes: Sequence[Route], sides: tuple[int, int]) -> list[list[int]]:
    """The directions that one loop can do: all if the picture is a square, else those along lines of one length."""
    if sides[0] == sides[1]:
        return [list(range(len(routes)))]
    apart = [[k for k, route in enumerate(routes) if route[0] == by_columns] for by_columns in (False, True)]
    return [group for group in apart if group]


def _along(value: Any, by_columns: bool, sides: tuple[int, int], width: int) -> Any:
    """(b, h, w, [1,] c) as (t, 1, b, m, c): the first of every line, then the second of every line, and so on.

    Through three axes, which keep ONNX Runtime from joining this with the transposition that a convolution needs: what
    would come out moves single numbers, and takes many times as long as both.
    """
    height, columns = sides
    if by_columns:
        lines = op.Transpose(op.Reshape(value, ints(-1, height, columns * width)), perm=[1, 0, 2])
        return op.Reshape(lines, ints(height, 1, -1, columns, width))
    lines = op.Transpose(op.Reshape(value, ints(-1, columns, width)), perm=[1, 0, 2])
    return op.Reshape(lines, ints(columns, 1, -1, height, width))


@dataclass(frozen=True)
class _Lines:
    """The directions of one loop, k of them.

    Attributes:
        weight: (k, 1, r, d). A: (k, 1, 1, d). bias: (k, 1, 1, d) or None.
        channels, rank: d, r.
        reverse: of each direction, whether lines and the steps along them are reversed.
    """

    weight: Any
    A: Any
    bias: Any | None
    channels: int
    rank: int
    reverse: tuple[bool, ...]

    def scan(self, xs: Sequence[Any], projected: Sequence[Any]) -> list[Any]:
        """The output of each direction's x (t, 1, b, m, d) and projected (t, 1, b, m, r + 2): (t, b, m, d)."""
        count, state = len(self.reverse), (len(self.reverse), None, None, self.channels)
        one = op.Shape(xs[0], start=2)
        start = [op.Expand(number(value), op.Concat(ints(count), one, axis=0)) for value in (0.0, 1.0)]
        sequences = {f"x{k}": value for k, value in enumerate(xs)}
        sequences |= {f"projected{k}": value for k, value in enumerate(projected)}
        shapes = {f"x{k}": (1, None, None, self.channels) for k in range(count)}
        shapes |= {f"projected{k}": (1, None, None, self.rank + 2) for k in range(count)}
        ways = (self.reverse * 2, self.reverse * 2)
        end, decay, *outputs = loop(start, sequences, self._step, shapes, state, ways)
        before = self._starts(end, decay)
        squeezed = [op.Squeeze(value, ints(1)) for value in outputs]
        each = zip(squeezed[:count], squeezed[count:], before, strict=True)
        return [op.Add(y, op.Mul(missing, g)) for y, missing, g in each]

    def _step(self, h: Any, product: Any, **taken: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """One step of all lines: the state from zero and the product of its decays, and what is read of both."""
        count = len(self.reverse)
        values = list(taken.values())
        x, projected = (_stacked(part) for part in (values[:count], values[count:]))
        r, B, C = record("Split", [projected, ints(self.rank, 1, 1)], 3, axis=-1)
        delta = op.MatMul(r, self.weight)
        dt = softplus(delta if self.bias is None else op.Add(delta, self.bias))
        decay = op.Exp(op.Mul(dt, self.A))
        h = op.Add(op.Mul(decay, h), op.Mul(B, op.Mul(dt, x)))
        product = op.Mul(decay, product)
        return [h, product], [*_apart(op.Mul(C, h), count), *_apart(op.Mul(C, product), count)]

    def _starts(self, end: Any, decay: Any) -> list[Any]:
        """The state before each line, (b, m, d) for each direction, of what the lines leave, both (k, b, m, d)."""
        count, line = len(self.reverse), (len(self.reverse), None, self.channels)
        ends, decays = (
            [op.Transpose(part, perm=[2, 0, 1, 3]) for part in _apart(each, count)] for each in (end, decay)
        )
        sequences = {f"end{k}": value for k, value in enumerate(ends)}
        sequences |= {f"decay{k}": value for k, value in enumerate(decays)}
        sizes = op.Shape(ends[0], start=2)  # of (m, 1, b, d)
        first = op.Expand(number(0.0), op.Concat(ints(count), sizes, axis=0))
        shapes = dict.fromkeys(sequences, (1, None, self.channels))
        _, *before = loop([first], sequences, self._next_line, shapes, line, (self.reverse * 2, self.reverse))
        return [op.Transpose(op.Squeeze(each, ints(1)), perm=[1, 0, 2]) for each in before]

    def _next_line(self, g: Any, **taken: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """The state after a line, and the one before it."""
        count = len(self.reverse)
        values = list(taken.values())
        end, decay = (_stacked(part) for part in (values[:count], values[count:]))
        return [op.Add(op.Mul(decay, g), end)], _apart(op.Identity(g), count)


def _stacked(values: Sequence[Any]) -> Any:
    return op.Concat(*values, axis=0) if len(values) > 1 else values[0]


def _apart(value: Any, count: int) -> list[Any]:
    """The parts of one along the first axis."""
    return record("Split", [value], count, axis=0, num_outputs=count) if count > 1 else [value]
