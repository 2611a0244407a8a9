"""The inside of a "v2" block in pure PyTorch, both directions stacked from the convolution on.

    b batch, e inner channels, l length, n state, r dt rank, w conv width, s = 2 directions

Composed of the ops of its parts, a block copies what each direction made into the buffers of the scan that runs both.
Here the second direction is a flipped copy of the input from the start, so that every op serves both: half the calls,
and two flips in place of five copies. The arithmetic is the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_conv1d.backend import differentiates_forward
from causal_conv1d.backend.memory import keep_freed_memory
from causal_conv1d.conv1d import correlate
from mamba_ssm.ops.int8 import Int8Weight
from mamba_ssm.ops.mamba_inner_training import DirectionParameters
from mamba_ssm.ops.selective_scan_native import fits
from mamba_ssm.ops.selective_scan_torch import LOG2_E, Stacked, batch_slices, even_chunk, read_outs


def can_run(xz: Tensor, forward: DirectionParameters, backward: DirectionParameters) -> bool:
    """Whether shapes fit, both directions have the same parameters, and one of fp32 and fp64 is the dtype of all.

    And nothing asks for a derivative: buffers are written in place.
    """
    parameters: list[Any] = [*forward, *backward]
    if any(isinstance(value, Int8Weight) for value in parameters):
        return False
    given: list[Tensor] = [value for value in (xz, *parameters) if value is not None]
    if not xz.numel() or not forward.A_log.numel() or not fits(xz.shape[1] // 2, parameters):
        return False
    if any((own is None) != (other is None) for own, other in zip(forward, backward, strict=True)):
        return False
    if differentiates_forward() or (torch.is_grad_enabled() and any(value.requires_grad for value in given)):
        return False
    one_dtype = {value.dtype for value in given} in ({torch.float32}, {torch.float64})
    return one_dtype and not torch.is_autocast_enabled(xz.device.type)


def run_inner(xz: Tensor, forward: DirectionParameters, backward: DirectionParameters, scale: float) -> Tensor:
    """(b, e, l), channels contiguous: the gated sum of both directions times `scale`, of xz (b, 2 e, l)."""
    keep_freed_memory()
    batch, doubled, length = xz.shape
    parameters = _BothDirections(forward, backward)
    x, z = (half.permute(2, 0, 1) for half in xz.chunk(2, dim=1))
    out = xz.new_empty(batch, length, doubled // 2)
    for part in batch_slices(batch, parameters.exponent.numel()):
        total = torch.mul(parameters.scan(x[:, part]), F.silu(z[:, part]), out=out[part].transpose(0, 1))
        if scale != 1.0:
            total.mul_(scale)
    return out.transpose(1, 2)


class _BothDirections:
    """The parameters of both directions, stacked along s as the ops take them; those that are not given are None.

    Attributes, with their shapes:
        taps: (s, 1, e, w). x_proj: (s, e, r + 2 n). delta_proj: (s, r, e). exponent: (s, 1, 1, n, e).
        conv_bias, delta_bias, D: (s, 1, e).
    """

    def __init__(self, *directions: DirectionParameters) -> None:
        self.taps = torch.stack([own.conv1d_weight for own in directions]).transpose(1, 2)
        x_proj: list[Any] = [own.x_proj_weight for own in directions]  # not in int8, as `can_run` saw
        self.x_proj = torch.stack(x_proj).transpose(1, 2)
        self.delta_proj = torch.stack([own.delta_proj_weight for own in directions]).transpose(1, 2)
        A_log = torch.stack([own.A_log for own in directions]).transpose(1, 2)
        self.exponent = A_log.exp().mul_(-LOG2_E)[:, None, None].contiguous()
        self.conv_bias = _per_channel([own.conv1d_bias for own in directions])
        self.delta_bias = _per_channel([own.delta_bias for own in directions])
        self.D = _per_channel([own.D for own in directions])

    def scan(self, x: Tensor) -> Tensor:
        """Both directions of the input (l, b, e), summed, before the gate: (l, b, e)."""
        length, batch, channels = x.shape
        states = self.exponent.shape[-2]
        forth = torch.arange(length, device=x.device)
        back = forth.flip(0)
        visited = x.index_select(0, torch.cat([forth, back])).view(2, length, batch, channels)
        u = correlate(visited.permute(0, 2, 3, 1), self.taps, self.conv_bias, None, False).permute(0, 3, 1, 2)
        rows = F.silu(u, inplace=True).reshape(2, -1, channels)
        projected = torch.bmm(rows, self.x_proj)
        low_rank = projected[..., : -2 * states]
        if self.delta_bias is None:
            delta = torch.bmm(low_rank, self.delta_proj)
        else:
            delta = torch.baddbmm(self.delta_bias, low_rank, self.delta_proj)
        pairs = projected[..., -2 * states :].view(2, length, batch, 2, 1, states, 1)
        B, C = pairs.permute(3, 1, 0, 2, 4, 5, 6).contiguous()
        dt, u = F.softplus(delta).view(u.shape).transpose(0, 1), u.transpose(0, 1)
        chunk = even_chunk(length, self.exponent.numel() * batch)
        inputs = Stacked(dt[..., None, None, :], u[..., None, None, :], self.exponent, B, C, chunk)
        y = read_outs(inputs, keep_states=False)[0].squeeze(-2)
        if self.D is not None:
            y.addcmul_(u, self.D)
        return y[:, 1].index_select(0, back).add_(y[:, 0])


def _per_channel(values: list[Tensor | None]) -> Tensor | None:
    """(e,) of each direction as (s, 1, e)."""
    given = [value for value in values if value is not None]
    return torch.stack(given)[:, None] if given else None
