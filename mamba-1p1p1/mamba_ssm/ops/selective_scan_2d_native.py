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
from mamba_ssm.ops.selective_scan_native import Room, Routed, run_scan, scan_backward_into
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
        and x.shape[3] == channels
        and dt_weight.shape == (count, channels, rank)
        and projected.shape == (*x.shape[:3], count, rank + 2 * states)
        and all(value is None or value.shape == (count, channels) for value in (D, dt_bias))
    )


def _directions(
    u: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    directions: str,
    height: int,
) -> list[Routed]:
    """The directions over u (b, l, d) and projected (b, l, 4, r + 2 n)."""
    rank = dt_weight.shape[2]
    found = []
    for k, (by_columns, reverse) in enumerate(ROUTES[directions]):
        B, C = (value.transpose(2, 3) for value in _scan_inputs(projected, k, rank))
        r = projected[:, :, k, :rank].transpose(1, 2)
        skip, shift = (None if value is None else value[k] for value in (D, dt_bias))
        rows = height if by_columns else 1
        found.append(Routed(u.transpose(1, 2), r, A[k], B, C, skip, shift, reverse, dt_weight[k], rows))
    return found


def _scan_inputs(projected: Tensor, k: int, rank: int) -> tuple[Tensor, Tensor]:
    """B and C of a direction as (b, 1, l, n), views of (b, l, 4, r + 2 n)."""
    B, C = projected[:, None, :, k, rank:].chunk(2, dim=-1)
    return B, C


def _pixels(value: Tensor) -> Tensor:
    """(b, h, w, ...) as (b, l, ...) in fp32, contiguous."""
    return value.detach().to(torch.float32).contiguous().flatten(1, 2)


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
    batch, height, width, channels = x.shape
    out = torch.empty(x.shape)
    chunks = (height * width + CHUNK - 1) // CHUNK
    states = torch.empty((batch, chunks, A.shape[0], 1, A.shape[2], channels) if keep_states else 0)
    parts = _directions(_pixels(x), _pixels(projected), dt_weight, A, D, dt_bias, directions, height)
    run_scan(Call(torch.float32), parts, None, out.flatten(1, 2).transpose(1, 2), None, states, softplus=True)
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
    if dout.dtype is not torch.float32 or states.dtype is not torch.float32:
        return None
    channels, n, rank = *A.shape[1:], dt_weight.shape[2]
    u, columns, dy = _pixels(x), _pixels(projected), _pixels(dout)
    parts = _directions(u, columns, dt_weight, A, D, dt_bias, directions, x.shape[1])
    du, dcolumns = torch.empty_like(u), torch.empty_like(columns)
    ddelta = [torch.empty_like(u) for _ in parts]
    records = [torch.empty(channels * (n + 2)) for _ in parts]
    rooms = [
        Room(du.transpose(1, 2), own.transpose(1, 2), *_scan_inputs(dcolumns, k, rank), record, adds=k > 0)
        for k, (own, record) in enumerate(zip(ddelta, records, strict=True))
    ]
    scan_backward_into(Call(torch.float32), rooms, None, parts, None, dy.transpose(1, 2), None, states, softplus=True)
    slopes, weight = [own.flatten(0, 1) for own in ddelta], dt_weight.detach().float()
    for k, slope in enumerate(slopes):
        dcolumns.flatten(0, 1)[:, k, :rank] = slope @ weight[k]
    dweight = torch.stack([slope.t() @ columns.flatten(0, 1)[:, k, :rank] for k, slope in enumerate(slopes)])
    dA, dD, dbias = torch.stack(records).split([channels * n, channels, channels], dim=1)
    found = (du.view(x.shape), dcolumns.view(projected.shape), dweight, dA.reshape(A.shape), dD, dbias)
    likes = (x, projected, dt_weight, A, D, dt_bias)
    return [value.to(like.dtype).contiguous() for value, like in zip(found, likes, strict=True) if like is not None]
