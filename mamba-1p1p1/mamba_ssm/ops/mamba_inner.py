"""Everything of a Mamba block between its two outer projections: convolution, inner projections, scan, gate.

    b batch, e inner channels, l length, m model channels, n state, r dt rank, w conv width
    n' = n for real A, 2 n for complex A ((re, im) pairs)

One core, `_project`, serves all: one direction, "v1" (one convolution and one set of projections, scanned from both
ends), "v2" (both directions with parameters of their own), with and without the output projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from causal_conv1d.backend import differentiates_forward
from causal_conv1d.conv1d import FAMILY as CONVOLUTIONS
from causal_conv1d.reference import conv1d_reference
from mamba_ssm.ops import mamba_inner_torch
from mamba_ssm.ops import mamba_inner_training as training
from mamba_ssm.ops import selective_scan_native as native
from mamba_ssm.ops.int8 import Int8Weight, linear
from mamba_ssm.ops.mamba_inner_training import NO_PROJECTIONS, DirectionParameters, OuterProjections
from mamba_ssm.ops.norm import layer_norm_fn
from mamba_ssm.ops.reference import scan_reference
from mamba_ssm.ops.selective_scan import FAMILY, bidirectional_scan, selective_scan_fn

_ONE = "Tensor conv1d_weight{0}, Tensor? conv1d_bias{0}, Tensor x_proj_weight{0}, Tensor delta_proj_weight{0}, "
_ONE += "Tensor A_log{0}, Tensor? D{0}, Tensor? delta_bias{0}"
LIBRARY = torch.library.Library("mamba_ssm", "FRAGMENT")
LIBRARY.define(f"bidirectional_inner(Tensor xz, {_ONE.format('')}, {_ONE.format('_b')}, float scale) -> Tensor")
LIBRARY.define(
    "bidirectional_blocks(Tensor x, Tensor? residual, Tensor?[] parameters, float eps, bool rms, float scale)"
    " -> (Tensor out, Tensor residual)"
)
FAMILY.implement(LIBRARY, "bidirectional_inner", "bidirectional_blocks")
FAMILY.join(CONVOLUTIONS, "bidirectional_inner", "bidirectional_blocks")
FAMILY.compose("bidirectional_inner", "bidirectional_blocks")


@torch.library.register_fake("mamba_ssm::bidirectional_blocks", lib=LIBRARY)
def _blocks_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out, dtype=torch.promote_types(x.dtype, torch.float32))


@FAMILY.kernel("torch", "bidirectional_blocks")
def _blocks_torch(
    x: Tensor, residual: Tensor | None, parameters: list[Tensor | None], eps: float, rms: bool, scale: float
) -> tuple[Tensor, Tensor]:
    inner = FAMILY.choose("bidirectional_inner", x.device.type)
    for first in range(0, len(parameters), native.PER_BLOCK):
        own: list[Any] = parameters[first : first + native.PER_BLOCK]
        normed, total = layer_norm_fn(
            x, own[0], own[1], residual, eps=eps, prenorm=True, residual_in_fp32=True, is_rms_norm=rms
        )
        y = inner(F.linear(normed, own[2], own[3]).transpose(1, 2), *own[6:], scale)
        x, residual = F.linear(y.transpose(1, 2), own[4], own[5]), total.clone() if total is x else total
    assert residual is not None
    return x, residual


@torch.library.register_fake("mamba_ssm::bidirectional_inner", lib=LIBRARY)
def _inner_fake(xz: Tensor, *arguments: Any) -> Tensor:
    batch, doubled, length = xz.shape
    return xz.new_empty((batch, length, doubled // 2)).transpose(1, 2)


@FAMILY.kernel("torch", "bidirectional_inner")
def _inner_torch(xz: Tensor, *arguments: Any) -> Tensor:
    *parameters, scale = arguments
    forward, backward = training.of_both_directions(tuple(parameters))
    device = xz.device.type
    parts = (CONVOLUTIONS.backend_for("conv1d", device), FAMILY.backend_for("bidirectional_scan", device))
    if parts == ("torch", "torch") and mamba_inner_torch.can_run(xz, forward, backward):
        return mamba_inner_torch.run_inner(xz, forward, backward, scale)
    return compose(xz, forward, backward, scale)


FAMILY.compiled_kernel("native", "bidirectional_inner", native.bidirectional_inner)
FAMILY.compiled_kernel("native", "bidirectional_blocks", native.bidirectional_blocks)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool = False) -> Tensor:
    """(b, e, l) through the depthwise convolution (weight (e, 1, w)) and SiLU."""
    return torch.ops.causal_conv1d.conv1d(x, weight.squeeze(1), bias, None, True, reverse)


def _varying(columns: Tensor, bias: Tensor | None, complex_pairs: bool) -> Tensor:
    """Projected B or C (b, l, n') as the scan takes it: (b, 1, n, l), or (b, 1, n, 2 l) for complex A."""
    if bias is not None:
        columns = columns + bias.to(columns.dtype)
    if not complex_pairs:
        return columns.transpose(1, 2)[:, None]
    return columns.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(-2)[:, None]


def _project(
    x: Tensor,
    x_proj_weight: Tensor | Int8Weight,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """delta (b, e, l), B and C from the convolved x (b, e, l); B and C that are given are passed through."""
    rank = delta_proj_weight.shape[1]
    columns = A.shape[1] * (2 if A.is_complex() else 1)
    projected = linear(x.transpose(1, 2), x_proj_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight).transpose(1, 2)
    if B is None:
        B = _varying(projected[..., rank : rank + columns], B_proj_bias, A.is_complex())
    if C is None:
        C = _varying(projected[..., projected.shape[-1] - columns :], C_proj_bias, A.is_complex())
    return delta, B, C


def _check_projection_rows(
    x_proj_weight: Tensor | Int8Weight, delta_proj_weight: Tensor, A: Tensor, B: Tensor | None, C: Tensor | None
) -> None:
    per_projection = A.shape[1] * (2 if A.is_complex() else 1)
    rows = delta_proj_weight.shape[1] + per_projection * ((B is None) + (C is None))
    if x_proj_weight.shape[0] != rows:
        raise ValueError(f"`x_proj_weight` must have {rows} rows (dt rank, B, C), got {x_proj_weight.shape[0]}")


def _split(xz: Tensor) -> tuple[Tensor, Tensor]:
    if xz.dim() != 3 or xz.shape[1] % 2:
        raise ValueError(f"`xz` must have shape (b, 2 e, l), got {tuple(xz.shape)}")
    x, z = xz.chunk(2, dim=1)
    return x, z


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor | Int8Weight,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` without its last projection: the gated scan, (b, e, l)."""
    _check_projection_rows(x_proj_weight, delta_proj_weight, A, B, C)
    x, z = _split(xz)
    x = _convolve(x, conv1d_weight, conv1d_bias)
    delta, B, C = _project(x, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    out = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(out, Tensor)
    return out


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor | Int8Weight,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | Int8Weight,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """A Mamba block between its input and its output projection, the latter included.

    Args:
        xz: (b, 2 e, l), any strides: the inner channels, then as many of the gate.
        conv1d_weight: (e, 1, w). conv1d_bias: (e,).
        x_proj_weight: (r + n' + n', e), n' once for each of B and C that is not given.
        delta_proj_weight: (e, r).
        out_proj_weight: (m, e). out_proj_bias: (m,).
        A: (e, n), real or complex, negative real part.
        B, C: None to compute them from the input, or as `selective_scan_fn` takes them.
        D, delta_bias: (e,).
        B_proj_bias, C_proj_bias: (n',), added to the computed B and C.

    Returns:
        (b, l, m). Differentiable in every tensor. Under autocast the projections run in its dtype.

    Raises:
        ValueError: a shape above does not hold; names the argument and what it got.
    Source: arXiv 2312.00752, Figure 3.
    """
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus,
    )  # fmt: skip
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor | Int8Weight,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor | Int8Weight,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """The "v1" bidirectional block: all as `mamba_inner_fn`, plus a scan from the last token with `A_b` (e, n).

    Both scans share the (forward) convolution, the projections, D and the gate; their sum is not halved.
    """
    if A_b.is_complex():
        raise ValueError(f"`A_b` must be real, got {A_b.dtype}")
    _check_projection_rows(x_proj_weight, delta_proj_weight, A, B, C)
    x, z = _split(xz)
    x = _convolve(x, conv1d_weight, conv1d_bias)
    delta, B, C = _project(x, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    y = bidirectional_scan((x, delta, A, B, C, D, delta_bias), (x, delta, A_b, B, C, D, delta_bias), z, delta_softplus)
    return linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bidirectional_inner(
    xz: Tensor, forward: DirectionParameters, backward: DirectionParameters, scale: float = 1.0
) -> Tensor:
    """The "v2" bidirectional block without its output projection: two directions that share only the gate.

    Args:
        xz: (b, 2 e, l), any strides. Neither it nor anything else is flipped: the second direction's convolution
            and scan run from the last token.
        forward, backward: the parameters of the two directions.
        scale: what the sum of the directions is multiplied with.

    Returns:
        (b, e, l), the gated sum. One op where no gradient is asked for: its intermediate results need no memory.
        Source: arXiv 2401.09417, Algorithm 1.
    """
    _split(xz)
    arguments: tuple[Any, ...] = (*forward, *backward)
    if _any_int8(arguments):
        return compose(xz, forward, backward, scale)
    refuse_meta(xz, *arguments)
    if not _needs_gradient(xz, *arguments) and not differentiates_forward():
        return torch.ops.mamba_ssm.bidirectional_inner(xz, *arguments, scale)
    if xz.numel() and native.fits(xz.shape[1] // 2, arguments) and _trains_at_once(xz, *arguments):
        y: Tensor = training.BidirectionalMixer.apply(xz, scale, *NO_PROJECTIONS, *arguments)
        return y
    return compose(xz, forward, backward, scale)


def trained_mixer(
    x: Tensor,
    outer: OuterProjections,
    forward: DirectionParameters,
    backward: DirectionParameters,
    scale: float = 1.0,
) -> Tensor | None:
    """`bidirectional_inner` between its outer projections, (b, l, m) to (b, l, m), where a gradient is asked for.

    None where the compiled kernels do not run it, or nothing needs a gradient.
    """
    arguments: tuple[Any, ...] = (x, *outer, *forward, *backward)
    if (
        _any_int8(arguments)
        or x.dim() != 3
        or not x.numel()
        or not _needs_gradient(*arguments)
        or not _trains_at_once(*arguments)
    ):
        return None
    if outer.in_weight is None or not native.fits(outer.in_weight.shape[0] // 2, arguments[5:]):
        return None
    found: Tensor = training.BidirectionalMixer.apply(x, scale, *arguments[1:])
    return found


def refuse_meta(x: Tensor, *parameters: Tensor | None) -> None:
    """Raise RuntimeError for a parameter without memory: an op would take it all for a question about shapes."""
    if not x.is_meta and any(value is not None and value.is_meta for value in parameters):
        raise RuntimeError(
            f"the input is on {x.device} and a parameter of the block on meta, where nothing has a value; load its "
            "weights first"
        )


def _any_int8(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Int8Weight) for value in arguments)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)


def _trains_at_once(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not training.can_run(*tensors):
        return False
    return FAMILY.backend_for("bidirectional_inner", "cpu") == "native"


def compose(xz: Tensor, forward: DirectionParameters, backward: DirectionParameters, scale: float) -> Tensor:
    """`bidirectional_inner`, composed of the ops of its parts."""
    x, z = _split(xz)
    scans = []
    for parameters, reverse in ((forward, False), (backward, True)):
        convolved = _convolve(x, parameters.conv1d_weight, parameters.conv1d_bias, reverse)
        A = decay_rates(parameters.A_log)
        delta, B, C = _project(convolved, parameters.x_proj_weight, parameters.delta_proj_weight, A)
        scans.append((convolved, delta, A, B, C, parameters.D, parameters.delta_bias))
    y = bidirectional_scan(scans[0], scans[1], z, delta_softplus=True)
    return y if scale == 1.0 else y * scale


def decay_rates(A_log: Tensor) -> Tensor:
    """A (e, n), negative and at least fp32, from its stored logarithm."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def mamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`mamba_inner_fn` composed of the definitions of its parts; see there for the arguments."""
    x, z = _split(xz)
    x = conv1d_reference(x, conv1d_weight.squeeze(1), conv1d_bias, silu=True)
    delta, B, C = _project(x, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    y, _ = scan_reference(x, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def bimamba_inner_ref(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """`bimamba_inner_fn` composed of the definitions of its parts; see there for the arguments."""
    x, z = _split(xz)
    x = conv1d_reference(x, conv1d_weight.squeeze(1), conv1d_bias, silu=True)
    delta, B, C = _project(x, x_proj_weight, delta_proj_weight, A, B, C, B_proj_bias, C_proj_bias)
    y, _ = scan_reference(x, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus)
    y_b, _ = scan_reference(x, delta, A_b, B, C, D, z, delta_bias, delta_softplus=delta_softplus, reverse=True)
    return F.linear((y + y_b).transpose(1, 2), out_proj_weight, out_proj_bias)


def _recomputing(function: Callable[..., Tensor], arguments: tuple[Any, ...], checkpoint_lvl: int | None) -> Tensor:
    """Call `function`; with a level of 1 its intermediate results are recomputed in the backward, not kept."""
    count = len(inspect.signature(function).parameters)
    if len(arguments) > count:
        *arguments_list, checkpoint_lvl = arguments
        arguments = tuple(arguments_list)
    level = 1 if checkpoint_lvl is None else checkpoint_lvl
    if level not in (0, 1):
        raise ValueError(f"`checkpoint_lvl` must be 0 or 1, got {level}")
    if level == 0 or not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)


class MambaInnerFn(torch.autograd.Function):
    """`mamba_inner_fn` by its arguments in order, and `checkpoint_lvl` (1: recompute in the backward, 0: keep)."""

    @staticmethod
    def apply(*args: Any, checkpoint_lvl: int | None = None) -> Tensor:
        return _recomputing(mamba_inner_fn, args, checkpoint_lvl)


class MambaInnerFnNoOutProj(torch.autograd.Function):
    """`mamba_inner_fn_no_out_proj` by its arguments in order, and `checkpoint_lvl` as `MambaInnerFn`."""

    @staticmethod
    def apply(*args: Any, checkpoint_lvl: int | None = None) -> Tensor:
        return _recomputing(mamba_inner_fn_no_out_proj, args, checkpoint_lvl)


class BiMambaInnerFn(torch.autograd.Function):
    """`bimamba_inner_fn` by its arguments in order, and `checkpoint_lvl` as `MambaInnerFn`."""

    @staticmethod
    def apply(*args: Any, checkpoint_lvl: int | None = None) -> Tensor:
        return _recomputing(bimamba_inner_fn, args, checkpoint_lvl)
