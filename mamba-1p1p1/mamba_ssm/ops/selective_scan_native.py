"""The selective scan, and the inside of a bidirectional block, on the compiled CPU kernels of `csrc/cpu`.

    b batch, d (in a block: e) channels, l length, n state, g groups, k = d / g, s directions, r dt rank, w conv width

Each function takes what its op takes and returns what that returns, or None for what the kernels do not do: fp64 and
complex numbers. fp16 is computed in fp32, bf16 is read and written as it is; states are in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causal_conv1d.backend.call import Call
from causal_conv1d.backend.native import Library
from mamba_ssm.ops.selective_scan_torch import CHUNK, Direction

LIBRARY = Library("mamba_ssm")


def runs(direction: Direction) -> bool:
    """Whether the kernels do such a scan."""
    return direction.dtype == torch.float32 and not direction.A.is_complex()


def scan(
    directions: Sequence[Direction], z: Tensor | None, softplus: bool, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `selective_scan_torch.scan_forward`."""
    first = directions[0]
    if not all(map(runs, directions)):
        return None
    sequences = [z] if z is not None else []
    for direction in directions:
        sequences += [direction.u, direction.delta, direction.B, direction.C]
    narrow = all(value.dtype == torch.bfloat16 for value in sequences)
    call = Call(torch.bfloat16 if narrow else torch.float32)
    batch, channels, length = first.u.shape
    states, groups = first.A.shape[1], first.groups
    out = torch.empty_like(first.u, dtype=call.dtype)
    last = torch.empty((batch, channels, states), dtype=torch.float32)
    chunks = (length + CHUNK - 1) // CHUNK
    shape = (batch, chunks, len(directions), groups, states, channels // groups) if keep_states else (0,)
    borders = torch.empty(shape, dtype=torch.float32)

    call.integers(batch, channels, length, states, groups, len(directions))
    _output(call, out, z, len(directions), 1.0)
    call.address(last).address(borders if keep_states else None)
    for direction in directions:
        call.sequence(direction.u).sequence(direction.delta).parameter(direction.A)
        _projection(call, direction.B)
        _projection(call, direction.C)
        call.parameter(direction.D).parameter(direction.delta_bias).integers(softplus, direction.reverse)
    call.run(LIBRARY, "selective_scan")
    return out.to(first.u.dtype), last, borders


def _output(call: Call, out: Tensor, z: Tensor | None, directions: int, scale: float) -> None:
    """The output, the gate, and where the directions' outputs meet, in fp32."""
    call.sequence(out).sequence(z)
    meeting = out if directions == 1 or out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    call.integers(call.kept(meeting).data_ptr(), *meeting.stride()).number(scale)


def _projection(call: Call, value: Tensor) -> None:
    """B or C: (b, g, n, l), or constant (d, n)."""
    converted = call.converted(value)
    if converted.dim() == 4:
        call.integers(converted.data_ptr(), *converted.stride(), False)
    else:
        channel, state = converted.stride()
        call.integers(converted.data_ptr(), channel, 0, state, 0, True)


def bidirectional_inner(xz: Tensor, *arguments: Tensor | float | None) -> Tensor | None:
    """The op `mamba_ssm::bidirectional_inner`."""
    *parameters, scale = arguments
    directions = [parameters[:7], parameters[7:]]
    if torch.float64 in {value.dtype for value in (xz, *parameters) if isinstance(value, Tensor)}:
        return None
    batch, doubled, length = xz.shape
    channels = doubled // 2
    call = Call(torch.bfloat16 if xz.dtype == torch.bfloat16 else torch.float32)
    x, z = call.converted(xz).chunk(2, dim=1)
    conv_weight, dt_proj, A_log = parameters[0], parameters[3], parameters[4]
    assert isinstance(conv_weight, Tensor)
    assert isinstance(dt_proj, Tensor)
    assert isinstance(A_log, Tensor)
    states, rank = A_log.shape[1], dt_proj.shape[1]
    out = torch.empty((batch, length, channels), dtype=call.dtype).transpose(1, 2)
    projected = torch.empty((2, batch, length, rank + 2 * states), dtype=torch.float32)

    call.integers(batch, channels, length, states, 1, 2)
    assert isinstance(scale, float)
    _output(call, out, z, 2, scale)
    call.sequence(x).integers(conv_weight.shape[-1], rank)
    for index, direction in enumerate(directions):
        for value in direction:
            assert value is None or isinstance(value, Tensor)
            call.parameter(value)
        call.address(projected[index]).integers(index == 1)
    call.run(LIBRARY, "bidirectional_inner")
    return out.to(xz.dtype)
