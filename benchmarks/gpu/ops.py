"""The ops against what the card can do at best: their bytes at the speed of a copy, their exponentials in registers.

b batch, d channels, l length, n state, w conv width, f features
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.ceilings import Ceilings
from benchmarks.gpu.findings import Bound, Findings, Rows
from benchmarks.gpu.timing import Device, as_json, interleave, milliseconds, times
from benchmarks.runner import Spread
from causal_conv1d.backend import BACKENDS, DEVICE_OF, families, use_backend

AGREEMENT = 2e-2  # bf16 results of two backends: the norm of the difference over the norm
TITLE = "Ops"
HEADER = ["op", "backend", "time", "its bytes need", "its exps need", "over the larger", "with Python", "error"]
LARGEST_SCAN = 1.5  # times the larger of its floors
MOST_SETS = 32


class Sizes(NamedTuple):
    """Those of a scan, and of the width of a convolution."""

    batch: int = 64
    channels: int = 384
    length: int = 197
    state: int = 16
    width: int = 4

    @property
    def elements(self) -> int:
        return self.batch * self.channels * self.length


@dataclass(frozen=True)
class Op:
    """One op to be timed.

    Attributes:
        draw: makes its inputs. prepare: makes what the op is called with, of the inputs, on the backend that is timed.
        run: the op. ignored: how many of the first arguments, after the gradient, no implementation has to read.
        exps: exponentials per call. must: the largest time over the larger floor that was asked for.
    """

    draw: Callable[[Sizes, Device], tuple[Any, ...]]
    run: Callable[..., Any]
    exps: Callable[[Sizes], int] = lambda sizes: 0
    prepare: Callable[..., tuple[Any, ...]] = lambda *inputs: inputs
    own: Callable[..., Any] = lambda *arguments: arguments
    must: float | None = None


def _sequence(sizes: Sizes, device: Device, rows: int, last: bool = True) -> Tensor:
    """(b, rows, l) in bf16: channels contiguous, as the projections of a block leave it, or tokens (`last` False)."""
    wide, long = (sizes.length, rows) if last else (rows, sizes.length)
    value = torch.randn(sizes.batch, wide, long, device=device.device).bfloat16()
    return value.transpose(1, 2) if last else value


def _direction(sizes: Sizes, device: Device, last: bool = True) -> tuple[Tensor, ...]:
    """(u, delta, A, B, C, D, delta_bias) with steps of the size that Vim starts with, 0.001 to 0.1."""
    draw = partial(_sequence, sizes, device, last=last)
    A = -torch.arange(1.0, sizes.state + 1, device=device.device).repeat(sizes.channels, 1)
    B, C = draw(sizes.state)[:, None], draw(sizes.state)[:, None]
    step = torch.logspace(-3, -1, sizes.channels, device=device.device)
    skip = torch.ones(sizes.channels, device=device.device)
    return draw(sizes.channels), draw(sizes.channels) / 10, A, B, C, skip, step + torch.log(-torch.expm1(-step))


def _scan_inputs(sizes: Sizes, device: Device, last: bool = True) -> tuple[Any, ...]:
    return *_direction(sizes, device, last), _sequence(sizes, device, sizes.channels, last), True, False, False


def _both_inputs(sizes: Sizes, device: Device) -> tuple[Any, ...]:
    both = (*_direction(sizes, device), *_direction(sizes, device))
    return *both, _sequence(sizes, device, sizes.channels), True, False


def _scan_backward(*inputs: Any) -> tuple[Any, ...]:
    *rest, _ = inputs
    out, _, states = torch.ops.mamba_ssm.selective_scan(*rest, True)
    return torch.randn_like(out), None, states, *rest


def _both_backward(*inputs: Any) -> tuple[Any, ...]:
    *rest, _ = inputs
    out, states = torch.ops.mamba_ssm.bidirectional_scan(*rest, True)
    return torch.randn_like(out), states, *rest


def _conv_inputs(sizes: Sizes, device: Device) -> tuple[Any, ...]:
    weight = torch.randn(sizes.channels, sizes.width, device=device.device)
    bias = torch.randn(sizes.channels, device=device.device)
    return _sequence(sizes, device, sizes.channels), weight, bias, None, True, False


def _norm_inputs(sizes: Sizes, device: Device) -> tuple[Any, ...]:
    features = sizes.channels // 2
    x = torch.randn(sizes.batch, sizes.length, features, device=device.device)
    return x.bfloat16(), torch.randn_like(x), torch.ones_like(x[0, 0]), None, 1e-5, True, torch.float32


def _without_states(first: Tensor, *rest: Any) -> tuple[Any, ...]:
    """What every implementation of a backward has to read: not what this one kept of its forward."""
    return first, rest[2:] if rest[0] is None else rest[1:]


def _exps(directions: int, sizes: Sizes) -> int:
    """Of the recurrence alone: one per state."""
    return directions * sizes.elements * sizes.state


_scan = torch.ops.mamba_ssm.selective_scan
_gradients = torch.ops.mamba_ssm.selective_scan_backward
OPS = {
    "scan": Op(_scan_inputs, _scan, partial(_exps, 1), must=LARGEST_SCAN),
    "scan, channel-first": Op(partial(_scan_inputs, last=False), _scan, partial(_exps, 1), must=LARGEST_SCAN),
    "scan backward": Op(_scan_inputs, _gradients, partial(_exps, 1), _scan_backward, _without_states),
    "both scans": Op(_both_inputs, torch.ops.mamba_ssm.bidirectional_scan, partial(_exps, 2)),
    "both scans backward": Op(
        _both_inputs,
        torch.ops.mamba_ssm.bidirectional_scan_backward,
        partial(_exps, 2),
        _both_backward,
        _without_states,
    ),
    "convolution": Op(_conv_inputs, torch.ops.causal_conv1d.conv1d),
    "convolution backward": Op(
        _conv_inputs, torch.ops.causal_conv1d.conv1d_backward, prepare=lambda x, *rest: (torch.randn_like(x), x, *rest)
    ),
    "add and norm": Op(_norm_inputs, torch.ops.mamba_ssm.add_norm),
}


def size_of(*values: Any) -> int:
    """The bytes of all tensors in there."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def backends_for(device: Device) -> list[str]:
    """Those that every family of ops has for this device, best first."""
    kind = device.device.type
    names = [name for name in BACKENDS if DEVICE_OF.get(name, kind) == kind]
    return [name for name in names if all(family.missing(name) is None for family in families())]


@contextmanager
def on(backend: str, op: Op) -> Iterator[None]:
    """Run on this backend; the norm, which not every one has, on what it steps down to."""
    if op.run is torch.ops.mamba_ssm.add_norm and backend == "cuda":
        yield
        return
    with use_backend(backend):
        yield


class Timed(NamedTuple):
    """A backend's way to run an op: recorded over several sets of inputs, and one plain call."""

    call: Callable[[], Any]
    plain: Callable[[], Any]
    sets: int
    is_graph: bool
    moved: int
    result: list[Tensor]


def _timed(op: Op, backend: str, sizes: Sizes, device: Device) -> Timed:
    with on(backend, op):
        torch.manual_seed(0)
        first = op.prepare(*op.draw(sizes, device))
        result = op.run(*first)
        moved = size_of(op.own(*first), result)
        count = 1 if backend == "torch" else min(MOST_SETS, 1 + 4 * device.cache_bytes() // moved)
        sets = [first, *(op.prepare(*op.draw(sizes, device)) for _ in range(count - 1))]
        call, is_graph = device.recorded(partial(_within, backend, op), sets) if count > 1 else (None, False)
    plain = partial(_within, backend, op, *first)
    tensors = [leaf.double() for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()]
    return Timed(call or plain, plain, len(sets), is_graph, moved, tensors)


def _within(backend: str, op: Op, *arguments: Any) -> Any:
    with on(backend, op):
        return op.run(*arguments)


def error_of(result: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, over the tensors, of the norm of the difference over the norm; infinite where one is not finite."""
    errors = [((one - other).norm() / other.norm()).item() for one, other in zip(result, expected, strict=True)]
    return max((error if error == error else float("inf") for error in errors), default=0.0)


def measure_op(name: str, device: Device, ceilings: Ceilings, sizes: Sizes, rounds: int) -> Findings:
    """Time one op on every backend, interleaved, after their results were compared."""
    op, findings = OPS[name], Findings()
    entries = {backend: _timed(op, backend, sizes, device) for backend in backends_for(device)}
    expected = entries["torch"].result
    errors = {backend: error_of(entry.result, expected) for backend, entry in entries.items()}
    for backend, error in errors.items():
        if not error <= AGREEMENT:
            findings.failures.append(f"{name}: {backend} is {error:.1e} away from torch: it was not timed.")
            del entries[backend]
    calls = {backend: entry.call for backend, entry in entries.items()}
    seconds = interleave(device, calls, rounds, {backend: entry.sets for backend, entry in entries.items()})
    plain = interleave(device, {backend: entry.plain for backend, entry in entries.items()}, rounds)
    lines: Rows = [HEADER]
    for backend, entry in entries.items():
        spread = Spread.of(seconds[backend])
        floors = ceilings.floors(entry.moved, op.exps(sizes))
        over = Spread(*(value / max(floors) for value in (spread.median, spread.low, spread.high)))
        lines.append(
            [
                name,
                backend,
                milliseconds(spread) + ("" if entry.is_graph or not device.is_gpu else ", no graph"),
                f"{1000 * floors[0]:.4f} ms",
                f"{1000 * floors[1]:.4f} ms" if floors[1] else "",
                times(over),
                milliseconds(Spread.of(plain[backend])),
                "" if backend == "torch" else f"{errors[backend]:.1e}",
            ]
        )
        findings.measured[f"{name} on {backend}"] = {
            **as_json(seconds[backend]),
            "with_python": as_json(plain[backend]),
            "graph": entry.is_graph,
            "bytes": entry.moved,
            "exponentials": op.exps(sizes),
            "floors_seconds": list(floors),
            "over_larger_floor": over.median,
            "error": errors[backend],
        }
        if op.must is not None and backend != "torch":
            what = f"{name} {tuple(sizes[:4])} bf16 by {backend} over the larger of its floors"
            findings.bounds.append(Bound(what, op.must, over.median))
    findings.tables[TITLE] = lines
    return findings
