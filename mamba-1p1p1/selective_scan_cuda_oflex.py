"""The module by which VMamba's code calls the CUDA kernels of the selective scan, under upstream's names.

    b batch, d channels, l length, n state, g groups

Every argument is positional and must be given, None where there is nothing. B and C have four axes, (b, g, n, l).
`delta`, and `delta_bias` with it, may have fewer channels than u, which divide those of u: each then serves as many
neighbours. `nrows` is without effect. Tensors are on a GPU. Importing it raises ImportError where the kernels cannot
run.
"""

from __future__ import annotations

import torch
from torch import Tensor

import selective_scan_cuda as scan  # raises the ImportError


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    nrows: int,
    out_float: bool,
    /,
) -> list[Tensor]:
    """Scan; the arguments mean what those of `selective_scan_fn` mean.

    Returns:
        [out, x]: the output, laid out as delta, in fp32 if `out_float` and else in the dtype of delta; x as that of
        `selective_scan_cuda.fwd`.
    """
    del nrows
    wide, bias = _for_every_channel(u, delta, delta_bias)
    return scan.fwd(u, wide.float() if out_float else wide, A, B, C, D, None, bias, delta_softplus)


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    delta_softplus: bool,
    nrows: int,
    /,
) -> list[Tensor | None]:
    """The gradients of `fwd`: [du, ddelta, dA, dB, dC, dD, ddelta_bias], None of what was not given.

    Args:
        x: what `fwd` returned; not needed, as the states are computed again.
    """
    del nrows
    wide, bias = _for_every_channel(u, delta, delta_bias)
    found = scan.bwd(u, wide, A, B, C, D, None, bias, dout, x, None, None, delta_softplus, False)
    du, ddelta, dA, dB, dC, dD, dbias = found
    return [du, _sum_of_served(ddelta, delta), dA, dB, dC, dD, _sum_of_served(dbias, delta_bias)]


def _for_every_channel(u: Tensor, delta: Tensor, delta_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`delta` and its bias with as many channels as u."""
    channels, own = u.shape[1], delta.shape[1]
    if own == channels:
        return delta, delta_bias
    if own == 0 or channels % own:
        raise ValueError(f"`delta` has {own} channels, which do not divide the {channels} channels of `u`")
    bias = None if delta_bias is None else delta_bias.repeat_interleave(channels // own, dim=0)
    return delta.repeat_interleave(channels // own, dim=1), bias


def _sum_of_served(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient of what served several channels: (b, d, l) or (d,), in the shape and the dtype of `like`."""
    if gradient is None or like is None or gradient.shape == like.shape:
        return gradient
    axis = like.dim() // 2  # 1 of a sequence, 0 of a bias
    shares = gradient.unflatten(axis, (like.shape[axis], -1))
    return shares.sum(axis + 1, dtype=torch.float32).to(like.dtype)
