"""The scan of a picture in four directions on the compiled CPU kernels of `csrc/cpu`.

    b batch, h height, w width, d channels, l = h w pixels, n state, r dt rank

Each function takes what its op takes and returns what that returns, or None for what the kernels do not do: fp64, and
arguments that do not fit together. fp16 and bf16 are computed in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from causal_conv1d.backend.call import Call
from mamba_ssm.ops.reference import ROUTES, scan_dtype
from mamba_ssm.ops.selective_scan_native import LIBRARY
from mamba_ssm.ops.selective_scan_torch import CHUNK


def _fits(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    directions: str,
) -> bool:
    if A.dim() != 3 or dt_weight.dim() != 3 or x.dim() != 4 or scan_dtype(x, projected, A) is not torch.float32:
        return False
    count, channels, states = A.shape
    rank = dt_weight.shape[2]
    return (
        len(ROUTES.get(directions, ())) == count
        and min(channels, rank) > 0
        and x.shape[3] == channels
        and dt_weight.shape == (count, channels, rank)
        and projected.shape == (*x.shape[:3], count, rank + 2 * states)
        and all(value is None or value.shape == (count, channels) for value in (D, dt_bias))
    )


def _call(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    directions: str,
) -> Call:
    """A call with the inputs of the scan; the first two contiguous and in fp32."""
    call = Call(torch.float32)
    call.integers(*x.shape, A.shape[2], dt_weight.shape[2]).address(x).address(projected)
    call.parameters((dt_weight, A, D, dt_bias))
    for route in ROUTES[directions]:
        call.integers(*route)
    return call


def kept_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    """The shape of the states before each chunk, (b, chunks, 4, 1, n, d)."""
    batch, height, width, channels = x.shape
    return batch, (height * width + CHUNK - 1) // CHUNK, A.shape[0], 1, A.shape[2], channels


def _wide(value: Tensor) -> Tensor:
    """In fp32, contiguous."""
    return value.detach().to(torch.float32).contiguous()


def scan(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    directions: str,
    keep_states: bool,
) -> tuple[Tensor, Tensor] | None:
    """The op `mamba_ssm::selective_scan_2d`."""
    if not _fits(x, projected, dt_weight, A, D, dt_bias, directions):
        return None
    out = torch.empty(x.shape)
    states = torch.empty(kept_shape(x, A) if keep_states else 0)
    x, projected = _wide(x), _wide(projected)
    call = _call(x, projected, dt_weight, A, D, dt_bias, directions)
    call.address(out).address(states if keep_states else None).run(LIBRARY, "selective_scan_2d")
    return out, states


def scan_backward(
    dout: Tensor,
    states: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    directions: str,
) -> list[Tensor] | None:
    """The op `mamba_ssm::selective_scan_2d_backward`."""
    if not _fits(x, projected, dt_weight, A, D, dt_bias, directions) or dout.shape != x.shape:
        return None
    if dout.dtype is not torch.float32 or states.dtype is not torch.float32 or states.shape != kept_shape(x, A):
        return None
    (count, channels, n), rank = A.shape, dt_weight.shape[2]
    u, columns, weight = _wide(x), _wide(projected), _wide(dt_weight)
    du, dcolumns = torch.empty_like(u), torch.empty_like(columns)
    ddelta = u.new_empty(count, u.numel() // channels, channels)
    records = u.new_empty(count, channels * (n + 2))
    call = _call(u, columns, weight, A, D, dt_bias, directions)
    dout, states = call.kept(dout.contiguous()), call.kept(states.contiguous())
    call.address(dout).address(states).address(du).address(ddelta).address(dcolumns).address(records)
    call.run(LIBRARY, "selective_scan_2d_backward")
    r = columns.view(-1, count, columns.shape[4])[:, :, :rank].transpose(0, 1)
    dcolumns.view(-1, count, columns.shape[4])[:, :, :rank] = (ddelta @ weight).transpose(0, 1)
    dweight = ddelta.transpose(1, 2) @ r
    dA, dD, dbias = records.split([channels * n, channels, channels], dim=1)
    found = (du, dcolumns, dweight, dA.reshape(A.shape), dD, dbias)
    likes = (x, projected, dt_weight, A, D, dt_bias)
    return [value.to(like.dtype).contiguous() for value, like in zip(found, likes, strict=True) if like is not None]
