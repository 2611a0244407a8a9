"""The selective scan by the names that VMamba's code calls, and what SS2D does between its projections.

    b batch, h w height and width, l length, d channels of one direction, k directions (4), n state, r dt rank

Everything here is `mamba_ssm.ops`: what runs, on which backend, is chosen there.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from causal_conv1d.backend import use_backend
from mamba_ssm.ops.mamba_inner import decay_rates
from mamba_ssm.ops.selective_scan import selective_scan_fn as scan
from mamba_ssm.ops.selective_scan_2d import selective_scan_2d
from vmamba.cross_scan import PATTERNS
from vmamba.forward_types import nearest, refuse_unknown
from vmamba.layers import at_least_fp32

__all__ = [
    "SelectiveScanCore",
    "SelectiveScanCuda",
    "SelectiveScanMamba",
    "SelectiveScanOflex",
    "cross_selective_scan",
    "selective_scan_fn",
]

BACKENDS = ("oflex", "core", "mamba", "torch")


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    oflex: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Run the scans of all directions, stacked along the channels, over the last axis.

        h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * B[t] * u[t],     h[-1] = 0
        y[t] = <C[t], h[t]> + D * u[t]
    where dt = delta + delta_bias, through softplus if `delta_softplus`.

    Args:
        u: (b, k d, l), any strides. fp64, fp32, fp16 or bf16.
        delta: (b, k d, l), or of fewer channels that divide those of `u`: each then serves as many neighbours.
        A: (k d, n).
        B, C: (b, k, n, l); d channels of `u` share each of the k groups. (b, n, l) for one group.
        D: (k d,).
        delta_bias: as many numbers as `delta` has channels.
        oflex: return at least fp32, whatever the dtype of `u`; else that dtype.
        backend: "torch" for pure PyTorch; None, "oflex", "core" and "mamba" for the best that is there, as all of
            them compute the same. A gradient runs on what is chosen where `backward()` is called.

    Returns:
        (b, k d, l). Differentiable in every tensor.

    Raises:
        ValueError: a shape above does not hold, or there is no such backend; names the argument and what it got.
    Accumulates in at least fp32. Source: arXiv 2401.10166, section 4.2; arXiv 2312.00752, Algorithm 2.
    """
    _check_backend(backend)
    if delta.dim() == u.dim() == 3 and delta.shape[1] != u.shape[1]:
        delta, delta_bias = _for_every_channel(u.shape[1], delta, delta_bias)
    if oflex:
        u = at_least_fp32(u)
    with use_backend("torch") if backend == "torch" else nullcontext():
        y: Any = scan(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return y


def _check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        near = nearest(backend, BACKENDS)
        raise ValueError(f"`backend` must be None, {known}, got {backend!r}; the nearest is {near!r}")


def _for_every_channel(channels: int, delta: Tensor, delta_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`delta` and its bias with each channel repeated, so that there are as many as `channels`."""
    own = delta.shape[1]
    if own == 0 or channels % own:
        raise ValueError(f"`delta` has {own} channels, which do not divide the {channels} channels of `u`")
    if delta_bias is not None and tuple(delta_bias.shape) != (own,):
        raise ValueError(
            f"`delta_bias` must have shape ({own},), a number for each channel of `delta`, got "
            f"{tuple(delta_bias.shape)}"
        )
    repeats = channels // own
    bias = None if delta_bias is None else delta_bias.repeat_interleave(repeats)
    return delta.repeat_interleave(repeats, dim=1), bias


def cross_selective_scan(
    x: Tensor,
    x_proj_weight: Tensor,
    x_proj_bias: Tensor | None,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor | None,
    A_logs: Tensor,
    Ds: Tensor | None,
    out_norm: nn.Module | None = None,
    *,
    delta_softplus: bool = True,
    channel_first: bool = False,
    to_dtype: bool = True,
    force_fp32: bool = False,
    scans: int = 0,
    nrows: int = 1,
    backnrows: int = 1,
    **options: Any,
) -> Tensor:
    """Do what SS2D does between its convolution and its gate: project, scan in four directions, merge, normalise.

    Args:
        x: (b, d, h, w), after the convolution and its activation; any strides.
        x_proj_weight: (4, r + 2 n, d): for each direction the rows of dt, of B and of C.
        x_proj_bias: (4, r + 2 n).
        dt_projs_weight: (4, d, r).
        dt_projs_bias: (4, d).
        A_logs: (4 d, n); A = -exp(A_logs).
        Ds: (4 d,).
        out_norm: applied to the merged output, in the layout that is returned.
        delta_softplus: must be True.
        channel_first: return (b, d, h, w) instead of (b, h, w, d).
        to_dtype: return the dtype of `x` instead of the scan's, at least fp32, or what `out_norm` makes of it.
        force_fp32: project in fp32 also where `x` or autocast is narrower; the scan computes in fp32 in any case.
        scans: 0 cross; 1 four times row by row; 2 twice row by row, and twice from the end.
        nrows, backnrows: without effect.
        options: none; the classes and switches by which some copies of this function choose what computes it are not
            taken, as that is chosen in any case.

    Returns:
        (b, h, w, d), or (b, d, h, w) with `channel_first`. Differentiable in every tensor.

    Raises:
        ValueError: a shape above does not hold, or an option has no such value.
        TypeError: another option; names the nearest.
    Source: arXiv 2401.10166, section 4.2.
    """
    del nrows, backnrows
    if options:
        refuse_unknown("cross_selective_scan", options, list(inspect.signature(cross_selective_scan).parameters)[:-1])
    if not delta_softplus:
        raise ValueError("`delta_softplus` must be True, got False; `selective_scan_fn` also scans without softplus")
    if scans not in PATTERNS:
        raise ValueError(f"`scans` must be 0 (cross), 1 (rows) or 2 (rows from both ends), got {scans!r}")
    channels = _check_parameters(x, x_proj_weight, x_proj_bias, A_logs, Ds)
    pixels = x.permute(0, 2, 3, 1)
    y = selective_scan_2d(
        pixels,
        project(pixels, x_proj_weight, x_proj_bias, force_fp32),
        dt_projs_weight,
        decay_rates(A_logs).unflatten(0, (4, channels)),
        D=None if Ds is None else Ds.unflatten(0, (4, channels)),
        dt_bias=dt_projs_bias,
        directions=PATTERNS[scans],
    )
    if channel_first:
        y = y.permute(0, 3, 1, 2)
    if out_norm is not None:
        y = out_norm(y)
    return y.to(x.dtype) if to_dtype else y


def _check_parameters(x: Tensor, weight: Tensor, bias: Tensor | None, A_logs: Tensor, Ds: Tensor | None) -> int:
    """The channels of `x`; the op itself looks at the parameters that it takes as they are."""
    if x.dim() != 4:
        raise ValueError(f"`x` must have shape (b, d, h, w), got {tuple(x.shape)}")
    channels = x.shape[1]
    if weight.dim() != 3 or (weight.shape[0], weight.shape[2]) != (4, channels):
        raise ValueError(
            f"`x_proj_weight` must have shape (4, r + 2 n, d) with d = {channels}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:2]:
        raise ValueError(
            f"`x_proj_bias` must have shape (4, r + 2 n) = {tuple(weight.shape[:2])}, got {tuple(bias.shape)}"
        )
    if A_logs.dim() != 2 or A_logs.shape[0] != 4 * channels:
        raise ValueError(f"`A_logs` must have shape (4 d, n) with d = {channels}, got {tuple(A_logs.shape)}")
    if Ds is not None and tuple(Ds.shape) != (4 * channels,):
        raise ValueError(f"`Ds` must have shape (4 d,) = ({4 * channels},), got {tuple(Ds.shape)}")
    return channels


def project(pixels: Tensor, weight: Tensor, bias: Tensor | None, force_fp32: bool = False) -> Tensor:
    """(dt, B, C) of every pixel of (b, h, w, d) and direction, (b, h, w, 4, r + 2 n), by one product for all four.

    Args:
        weight: (4, r + 2 n, d).
        bias: (4, r + 2 n).
        force_fp32: compute in at least fp32, whatever autocast says.
    """
    rows, shift = weight.flatten(0, 1), None if bias is None else bias.flatten()
    if force_fp32:
        with torch.autocast(pixels.device.type, enabled=False):
            projected = nn.functional.linear(
                at_least_fp32(pixels), at_least_fp32(rows), None if shift is None else at_least_fp32(shift)
            )
    else:
        projected = nn.functional.linear(pixels, rows, shift)
    return projected.unflatten(3, (4, weight.shape[1]))


# --- names that other code calls --------------------------------------------------------------------------------------


def _apply(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    oflex: bool = True,
    backend: str | None = None,
) -> Tensor:
    return selective_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus, oflex, backend)


def _apply_oflex(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
    backnrows: int = 1,
    oflex: bool = True,
) -> Tensor:
    del nrows, backnrows
    return selective_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus, oflex)


def _apply_core(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
    backnrows: int = 1,
    oflex: bool = True,
) -> Tensor:
    del nrows, backnrows, oflex
    return selective_scan_fn(u, delta, A, B, C, D, delta_bias, delta_softplus, False)


class SelectiveScanCuda(torch.autograd.Function):
    """`apply` takes the positional arguments of `selective_scan_fn`, without softplus unless it is asked for."""

    apply = staticmethod(_apply)


class SelectiveScanOflex(torch.autograd.Function):
    """`apply(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, backnrows, oflex)`, on any device.

    nrows and backnrows are without effect; without `oflex` the result has the dtype of u.
    """

    apply = staticmethod(_apply_oflex)


class SelectiveScanCore(torch.autograd.Function):
    """As `SelectiveScanOflex`, with the dtype of u in any case."""

    apply = staticmethod(_apply_core)


SelectiveScanMamba = SelectiveScanCore
