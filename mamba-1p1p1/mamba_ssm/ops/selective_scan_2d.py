"""The selective scan of a picture in four directions at once, as VMamba's SS2D needs it.

    b batch, h height, w width, d channels, l = h w pixels, n state, r dt rank, k direction

The compiled CPU kernel reads the pixels where they are, in the order of each direction, and adds the outputs where they
belong: neither the sequences nor the step sizes, products of r numbers, are ever held as a whole. Elsewhere the op is
composed of `selective_scan` with a group for each direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from causal_conv1d.backend import no_second_derivative, refuse_forward_mode, require_one_device
from mamba_ssm.ops import selective_scan_2d_native as native
from mamba_ssm.ops.reference import ROUTES, scan_2d_reference, scan_dtype, take_route, undo_route
from mamba_ssm.ops.selective_scan import FAMILY

# --- contract -------------------------------------------------------------------------------------------------------

_INPUTS = "Tensor x, Tensor projected, Tensor dt_weight, Tensor A, Tensor? D, Tensor? dt_bias, str directions"
LIBRARY = torch.library.Library("mamba_ssm", "FRAGMENT")
LIBRARY.define(f"selective_scan_2d({_INPUTS}, bool keep_states) -> (Tensor out, Tensor states)")
LIBRARY.define(f"selective_scan_2d_backward(Tensor dout, Tensor states, {_INPUTS}) -> Tensor[]")
FAMILY.implement(LIBRARY, "selective_scan_2d", "selective_scan_2d_backward")
FAMILY.compose("selective_scan_2d", "selective_scan_2d_backward")


@torch.library.register_fake("mamba_ssm::selective_scan_2d", lib=LIBRARY)
def _scan_2d_fake(x: Tensor, projected: Tensor, dt_weight: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = scan_dtype(x, projected, A)
    out = x.new_empty(x.shape, dtype=dtype)
    if not rest[-1]:
        return out, x.new_empty(0, dtype=dtype)
    return out, x.new_empty(native.kept_shape(x, A), dtype=dtype)


@torch.library.register_fake("mamba_ssm::selective_scan_2d_backward", lib=LIBRARY)
def _scan_2d_backward_fake(dout: Tensor, states: Tensor, *arguments: Any) -> list[Tensor]:
    return [value.new_empty(value.shape) for value in arguments[:6] if value is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.directions, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, states = ctx.saved_tensors
    found = iter(torch.ops.mamba_ssm.selective_scan_2d_backward(dout, states, *tensors, ctx.directions))
    return (*(None if value is None else next(found) for value in tensors), None, None)


torch.library.register_autograd("mamba_ssm::selective_scan_2d", _gradients, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd(
    "mamba_ssm::selective_scan_2d_backward", no_second_derivative("selective_scan_2d"), lib=LIBRARY
)

# --- kernels --------------------------------------------------------------------------------------------------------


def _routed(value: Tensor, directions: str, *, each: bool) -> Tensor:
    """(b, h, w, c) as the directions visit it, (b, l, 4, c); `each`: (b, h, w, 4, c), of which each takes its own."""
    parts = value.unbind(3) if each else [value] * len(ROUTES[directions])
    return torch.stack([take_route(part, *route) for part, route in zip(parts, ROUTES[directions], strict=True)], 2)


def _unrouted(value: Tensor, directions: str, height: int) -> list[Tensor]:
    """What belongs to each direction of (b, l, 4, c), as (b, h, w, c)."""
    parts = zip(value.unbind(2), ROUTES[directions], strict=True)
    return [undo_route(part, *route, height) for part, route in parts]


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0].contiguous() + parts[1]
    for part in parts[2:]:
        total += part
    return total


def _scan_arguments(x: Tensor, projected: Tensor, parameters: Sequence[Any], directions: str) -> tuple[Any, ...]:
    """What `selective_scan` takes before z: the directions are its groups."""
    dt_weight, A, D, dt_bias = parameters
    states, rank = A.shape[2], dt_weight.shape[2]
    r, B, C = _routed(projected, directions, each=True).split([rank, states, states], -1)
    delta = torch.einsum("blkr,kdr->blkd", r, dt_weight.to(r.dtype))
    u = _routed(x, directions, each=False)
    skip, shift = (None if value is None else value.flatten() for value in (D, dt_bias))
    u, delta = (value.flatten(2).transpose(1, 2) for value in (u, delta))
    return u, delta, A.flatten(0, 1), B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), skip, shift


def _outside_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with its products in the dtype of their inputs, wherever it is called."""

    def run(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *rest)

    return run


@FAMILY.kernel("torch", "selective_scan_2d")
@_outside_autocast
def _scan_2d(x: Tensor, projected: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *parameters, directions, keep_states = arguments
    dtype = scan_dtype(x, projected, parameters[1])
    given = _scan_arguments(x.to(dtype), projected.to(dtype), parameters, directions)
    y, _, states = torch.ops.mamba_ssm.selective_scan(*given, None, True, False, keep_states)
    y = y.transpose(1, 2).unflatten(2, (len(ROUTES[directions]), -1))
    return _sum(_unrouted(y, directions, x.shape[1])), states.transpose(2, 3).contiguous() if keep_states else states


@FAMILY.kernel("torch", "selective_scan_2d_backward")
@_outside_autocast
def _scan_2d_backward(dout: Tensor, states: Tensor, x: Tensor, projected: Tensor, *arguments: Any) -> list[Tensor]:
    dt_weight, A, D, dt_bias, directions = arguments
    if states.shape != native.kept_shape(x, A):
        raise ValueError(f"`states` must be of the shape {native.kept_shape(x, A)}, got {tuple(states.shape)}")
    given = _scan_arguments(x.to(dout.dtype), projected.to(dout.dtype), arguments[:-1], directions)
    dy = _routed(dout, directions, each=False).flatten(2).transpose(1, 2)
    du, ddelta, dA, dB, dC, *rest = torch.ops.mamba_ssm.selective_scan_backward(
        dy, None, states.transpose(2, 3), *given, None, True, False
    )
    du, ddelta = (value.transpose(1, 2).unflatten(2, (A.shape[0], -1)) for value in (du, ddelta))
    dr = torch.einsum("blkd,kdr->blkr", ddelta, dt_weight.to(ddelta.dtype))
    dprojected = torch.cat([dr, dB.permute(0, 3, 1, 2), dC.permute(0, 3, 1, 2)], -1)
    r = _routed(projected[..., : dt_weight.shape[2]].to(ddelta.dtype), directions, each=True)
    found = [
        _sum(_unrouted(du, directions, x.shape[1])),
        torch.stack(_unrouted(dprojected, directions, x.shape[1]), 3),
        torch.einsum("blkd,blkr->kdr", ddelta, r),
        dA.view(A.shape),
        *(value.view(A.shape[:2]) for value in rest),
    ]
    likes = [value for value in (x, projected, dt_weight, A, D, dt_bias) if value is not None]
    return [value.to(like.dtype).contiguous() for value, like in zip(found, likes, strict=True)]


FAMILY.compiled_kernel("native", "selective_scan_2d", native.scan)
FAMILY.compiled_kernel("native", "selective_scan_2d_backward", _outside_autocast(native.scan_backward))

# --- public functions -----------------------------------------------------------------------------------------------


def _check(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    directions: str,
) -> None:
    require_one_device(x=x, projected=projected, dt_weight=dt_weight, A=A, D=D, dt_bias=dt_bias)
    refuse_forward_mode("selective_scan_2d", x, projected, dt_weight, A, D, dt_bias)
    if directions not in ROUTES:
        raise ValueError(f"`directions` must be one of {', '.join(map(repr, ROUTES))}, got {directions!r}")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"`x` must have shape (b, h, w, d) without empty axes, got {tuple(x.shape)}")
    if A.dim() != 3 or A.is_complex():
        raise ValueError(f"`A` must be real and have shape (4, d, n), got {tuple(A.shape)} of {A.dtype}")
    if dt_weight.dim() != 3 or dt_weight.shape[2] == 0:
        raise ValueError(f"`dt_weight` must have shape (4, d, r) with r from 1 on, got {tuple(dt_weight.shape)}")
    count, channels, states, rank = len(ROUTES[directions]), x.shape[3], A.shape[2], dt_weight.shape[2]
    expected = {
        "projected": (projected, "(b, h, w, 4, r + 2 n)", (*x.shape[:3], count, rank + 2 * states)),
        "dt_weight": (dt_weight, "(4, d, r)", (count, channels, rank)),
        "A": (A, "(4, d, n)", (count, channels, states)),
        "D": (D, "(4, d)", (count, channels)),
        "dt_bias": (dt_bias, "(4, d)", (count, channels)),
    }
    for name, (value, meaning, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"`{name}` must have shape {meaning} = {shape}, got {tuple(value.shape)}")
    for name, value in {"x": x, **{name: value for name, (value, *_) in expected.items()}}.items():
        if value is not None and not value.is_floating_point():
            raise ValueError(f"`{name}` must be of real floating-point numbers, got {value.dtype}")


def selective_scan_2d(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    directions: str = "cross",
) -> Tensor:
    """Run four selective scans over the pixels of a picture, each in its own order, and add their outputs up.

        dt[k] = softplus(dt_weight[k] @ r[k] + dt_bias[k])        (r, B, C)[k] = projected[..., k, :]
        y = sum over k of the scan of x along the k-th order, with dt[k], A[k], B[k], C[k] and D[k]

    Args:
        x: (b, h, w, d), any strides. fp64, fp32, fp16 or bf16.
        projected: (b, h, w, 4, r + 2 n), what each direction projects each pixel to, in the order of the picture; r
            from 1 on.
        dt_weight: (4, d, r).
        A: (4, d, n), real, negative.
        D, dt_bias: (4, d).
        directions: "cross": row by row, column by column, and both from the end; "rows": four times row by row; "both":
            twice row by row and twice the same from the end.

    Returns:
        (b, h, w, d), contiguous; at least fp32. Differentiable in every tensor.

    Raises:
        ValueError: a shape or dtype above does not hold, or there are no such directions; names the argument and what
            it got.
        RuntimeError: a backend that was asked for cannot run this call.
    Accumulates in fp32 (fp64 stays fp64). Definition: `selective_scan_2d_ref`. Source: arXiv 2401.10166, section 4.2.
    """
    tensors = (x, projected, dt_weight, A, D, dt_bias)
    _check(*tensors, directions)
    keep = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)
    out: Tensor = torch.ops.mamba_ssm.selective_scan_2d(*tensors, directions, keep)[0]
    return out


def selective_scan_2d_ref(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    directions: str = "cross",
) -> Tensor:
    """`selective_scan_2d` by its definition, one direction and one step at a time; see there for the arguments."""
    _check(x, projected, dt_weight, A, D, dt_bias, directions)
    return scan_2d_reference(x, projected, dt_weight, A, D, dt_bias, directions)
