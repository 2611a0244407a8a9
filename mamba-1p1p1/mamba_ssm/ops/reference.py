"""The definition of the selective scan: what every kernel is held to.

b batch, d channels, l length, n state, g groups (d is divisible by g; channel c belongs to group c // (d / g))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_dtype(u: Tensor, delta: Tensor, A: Tensor) -> torch.dtype:
    """The real dtype a scan computes in: at least fp32, never narrower than an input."""
    real = A.real.dtype if A.is_complex() else A.dtype
    return torch.promote_types(torch.promote_types(u.dtype, delta.dtype), torch.promote_types(real, torch.float32))


def over_time(value: Tensor, length: int, state: torch.dtype) -> list[Tensor]:
    """B or C in any accepted form, as one tensor per token, (b, g, n) or, if constant, (1, d, n).

    Args:
        value: (d, n) constant; (b, n, l) or (b, g, n, l) varying. Varying and complex: real, with (re, im) pairs
            interleaved along the last axis of length 2 l.
        length: l.
        state: the dtype of the state, complex or real; the result has it.
    """
    if value.dim() == 2:
        return [value.to(state)[None]] * length
    if value.dim() == 3:
        value = value[:, None]
    if state.is_complex:
        value = torch.view_as_complex(value.to(state.to_real()).unflatten(-1, (-1, 2)).contiguous())
    return list(value.to(state).unbind(-1))


def scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The input-dependent linear recurrence of arXiv 2312.00752 (Algorithm 2), one step at a time.

        dt[t] = delta[t] + delta_bias, through softplus if asked
        h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * B[t] * u[t],     h[-1] = 0
        y[t] = <C[t], h[t]> + D * u[t];  2 * Re<C[t], h[t]> for complex A;  y *= silu(z) if z is given
    `reverse` runs t from the end to the start.

    Args: as `selective_scan_fn`.

    Returns:
        y (b, d, l) in the dtype of `u`, and the last state (b, d, n) in the dtype of the computation.
    Holds one state at a time; gradients come from autograd.
    """
    dtype = scan_dtype(u, delta, A)
    state = dtype.to_complex() if A.is_complex() else dtype
    dt = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    x, decay = u.to(dtype), A.to(state)
    channels, length = u.shape[1:]
    B_steps, C_steps = (over_time(value, length, state) for value in (B, C))
    dt_steps, x_steps = dt.unbind(-1), x.unbind(-1)
    h = torch.zeros(*u.shape[:2], A.shape[1], dtype=state, device=u.device)
    outputs: list[Tensor] = [x] * length
    for t in reversed(range(length)) if reverse else range(length):
        step = dt_steps[t][..., None]
        b, c = (steps[t].repeat_interleave(channels // steps[t].shape[1], dim=1) for steps in (B_steps, C_steps))
        h = torch.exp(step * decay) * h + b * (step * x_steps[t][..., None])
        y = (h * c).sum(-1)
        outputs[t] = 2 * y.real if state.is_complex else y
    out = torch.stack(outputs, dim=-1)
    if D is not None:
        out = out + D.to(dtype)[:, None] * x
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(u.dtype), h


# The orders in which four directions visit the pixels of a picture: (by columns, from the end) for each.
ROUTES = {
    "cross": ((False, False), (True, False), (False, True), (True, True)),
    "rows": ((False, False),) * 4,
    "both": ((False, False), (False, False), (False, True), (False, True)),
}


def take_route(value: Tensor, by_columns: bool, reverse: bool) -> Tensor:
    """The pixels of (b, h, w, c) in the order in which a direction visits them, (b, l, c)."""
    pixels = (value.transpose(1, 2) if by_columns else value).flatten(1, 2)
    return pixels.flip(1) if reverse else pixels


def undo_route(value: Tensor, by_columns: bool, reverse: bool, height: int) -> Tensor:
    """The inverse of `take_route`, for a picture of this height."""
    pixels = value.flip(1) if reverse else value
    return pixels.unflatten(1, (-1, height)).transpose(1, 2) if by_columns else pixels.unflatten(1, (height, -1))


def scan_2d_reference(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    directions: str,
) -> Tensor:
    """The sum of the scans of a picture in several directions (arXiv 2401.10166), one after the other.

    Args: as `selective_scan_2d`.

    Returns:
        (b, h, w, d) in the dtype of the computation.
    """
    dtype = scan_dtype(x, projected, A)
    states, rank = A.shape[2], dt_weight.shape[2]
    total = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for k, route in enumerate(ROUTES[directions]):
        u, own = (take_route(value.to(dtype), *route) for value in (x, projected[..., k, :]))
        r, B, C = own.split([rank, states, states], -1)
        delta = F.linear(r, dt_weight[k].to(dtype))
        y, _ = scan_reference(
            *(u.transpose(1, 2), delta.transpose(1, 2), A[k], B.transpose(1, 2), C.transpose(1, 2)),
            *(None if D is None else D[k], None, None if dt_bias is None else dt_bias[k]),
            delta_softplus=True,
        )
        total = total + undo_route(y.transpose(1, 2), *route, x.shape[1])
    return total
