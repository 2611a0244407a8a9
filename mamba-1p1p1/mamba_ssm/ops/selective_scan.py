"""The selective scan ops: their contract (schema, fake, gradients), their PyTorch kernels, their public functions.

    b batch, d channels, l length, n state, g groups, s directions

`selective_scan` runs one direction; `bidirectional_scan` runs two over the same tokens, one from each end, and gates
their sum once: what a bidirectional Mamba block needs, without flipped copies of its inputs.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from causal_conv1d.backend import Family, no_second_derivative, refuse_forward_mode, require_one_device
from causal_conv1d.backend.triton import TRITON
from mamba_ssm.ops import reference
from mamba_ssm.ops import selective_scan_cuda as cuda
from mamba_ssm.ops import selective_scan_native as native
from mamba_ssm.ops import selective_scan_torch as kernels
from mamba_ssm.ops.selective_scan_torch import Direction, Gradients

FAMILY = Family(
    *("selective_scan", "SELECTIVE_SCAN_FORCE_FALLBACK", "mamba_ssm", "mamba-1p1p1"),
    cuda=cuda.LIBRARY,
    native=native.LIBRARY,
    triton=TRITON,
)

# --- contract -------------------------------------------------------------------------------------------------------

ONE = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias"
OTHER = "Tensor u_b, Tensor delta_b, Tensor A_b, Tensor B_b, Tensor C_b, Tensor? D_b, Tensor? delta_bias_b"
PER_DIRECTION = 7  # tensors of one direction in the schemas above

LIBRARY = torch.library.Library("mamba_ssm", "FRAGMENT")
LIBRARY.define(
    f"selective_scan({ONE}, Tensor? z, bool delta_softplus, bool reverse, bool keep_states)"
    " -> (Tensor out, Tensor last_state, Tensor states)"
)
LIBRARY.define(
    f"selective_scan_backward(Tensor dout, Tensor? dlast_state, Tensor states, {ONE}, Tensor? z, bool delta_softplus,"
    " bool reverse) -> Tensor[]"
)
LIBRARY.define(
    f"bidirectional_scan({ONE}, {OTHER}, Tensor? z, bool delta_softplus, bool keep_states)"
    " -> (Tensor out, Tensor states)"
)
LIBRARY.define(
    f"bidirectional_scan_backward(Tensor dout, Tensor states, {ONE}, {OTHER}, Tensor? z, bool delta_softplus)"
    " -> Tensor[]"
)
FAMILY.implement(
    LIBRARY, "selective_scan", "selective_scan_backward", "bidirectional_scan", "bidirectional_scan_backward"
)


def _states_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, directions: int, keep_states: bool
) -> Tensor:
    groups = next((value.shape[1] for value in (B, C) if value.dim() == 4), 1)
    shape = _kept_shape(u, groups, A.shape[1], directions) if keep_states else (0,)
    return u.new_empty(shape, dtype=_state_dtype(u, delta, A))


def _kept_shape(u: Tensor, groups: int, states: int, directions: int) -> tuple[int, ...]:
    """The shape of the states before each chunk, (b, chunks, s, g, n, d / g)."""
    batch, channels, length = u.shape
    chunks = (length + kernels.CHUNK - 1) // kernels.CHUNK
    return batch, chunks, directions, groups, states, channels // groups


def _state_dtype(u: Tensor, delta: Tensor, A: Tensor) -> torch.dtype:
    dtype = reference.scan_dtype(u, delta, A)
    return dtype.to_complex() if A.is_complex() else dtype


@torch.library.register_fake("mamba_ssm::selective_scan", lib=LIBRARY)
def _selective_scan_fake(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    last = u.new_empty((u.shape[0], u.shape[1], A.shape[1]), dtype=_state_dtype(u, delta, A))
    return torch.empty_like(u), last, _states_fake(u, delta, A, B, C, 1, rest[-1])


@torch.library.register_fake("mamba_ssm::bidirectional_scan", lib=LIBRARY)
def _bidirectional_scan_fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(u), _states_fake(u, delta, A, B, C, 2, rest[-1])


def _like(*arguments: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(value) for value in arguments if value is not None]


@torch.library.register_fake("mamba_ssm::selective_scan_backward", lib=LIBRARY)
def _selective_scan_backward_fake(dout: Tensor, dlast: Any, states: Tensor, *arguments: Any) -> list[Tensor]:
    return _like(*arguments[: PER_DIRECTION + 1])


@torch.library.register_fake("mamba_ssm::bidirectional_scan_backward", lib=LIBRARY)
def _bidirectional_scan_backward_fake(dout: Tensor, states: Tensor, *arguments: Any) -> list[Tensor]:
    return _like(*arguments[: 2 * PER_DIRECTION + 1])


def _given(arguments: tuple[Any, ...], gradients: list[Tensor]) -> list[Tensor | None]:
    """Spread the gradients over the arguments: None where the argument was not given."""
    found = iter(gradients)
    return [None if value is None else next(found) for value in arguments]


def _save_one(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _one_gradients(ctx: Any, dout: Tensor | None, dlast: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, states = ctx.saved_tensors
    dout = torch.zeros_like(tensors[0]) if dout is None else dout
    gradients = torch.ops.mamba_ssm.selective_scan_backward(dout, dlast, states, *tensors, ctx.softplus, ctx.reverse)
    return (*_given(tensors, gradients), None, None, None)


def _save_two(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _two_gradients(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, states = ctx.saved_tensors
    gradients = torch.ops.mamba_ssm.bidirectional_scan_backward(dout, states, *tensors, ctx.softplus)
    return (*_given(tensors, gradients), None, None)


torch.library.register_autograd("mamba_ssm::selective_scan", _one_gradients, setup_context=_save_one, lib=LIBRARY)
torch.library.register_autograd("mamba_ssm::bidirectional_scan", _two_gradients, setup_context=_save_two, lib=LIBRARY)
_refuse = no_second_derivative("selective_scan_fn")
torch.library.register_autograd("mamba_ssm::selective_scan_backward", _refuse, lib=LIBRARY)
torch.library.register_autograd("mamba_ssm::bidirectional_scan_backward", _refuse, lib=LIBRARY)

# --- PyTorch kernels ------------------------------------------------------------------------------------------------


def _directions(
    arguments: tuple[Any, ...], reverse: tuple[bool, ...], states: Tensor | None = None, dlast: Tensor | None = None
) -> list[Direction]:
    """The scans of an op that was called with these arguments, in its backward also with the kept states.

    Raises:
        ValueError: there are no channels, or states that are no such scan's; the public functions do not let the former
            through and autograd makes the latter right, but the ops may be called without either.
    """
    parts = [arguments[index * PER_DIRECTION : (index + 1) * PER_DIRECTION] for index in range(len(reverse))]
    scans = [Direction(*(*part, flag)) for part, flag in zip(parts, reverse, strict=True)]
    u, n, groups = scans[0].u, scans[0].A.shape[-1], scans[0].groups
    if u.dim() != 3 or not 0 < groups <= u.shape[1]:
        raise ValueError(
            f"`u` must have shape (b, d, l) with a channel for each of {groups} groups, got {tuple(u.shape)}"
        )
    _check("states", states, "(b, chunks, s, g, n, d / g)", _kept_shape(u, groups, n, len(scans)))
    _check("dlast_state", dlast, "(b, d, n)", (*u.shape[:2], n))
    return scans


def _flatten(gradients: list[Gradients], arguments: tuple[Any, ...], dz: Tensor | None) -> list[Tensor]:
    """In the schema's order, without those of arguments that were not given, in the arguments' layouts."""
    flat = [getattr(part, name) for part in gradients for name in Gradients.__dataclass_fields__]
    return [
        torch.empty_like(argument).copy_(value)
        for argument, value in zip(arguments, [*flat, dz], strict=True)
        if value is not None
    ]


@FAMILY.kernel("torch", "selective_scan")
def _selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, z, softplus, reverse, keep_states = arguments
    return kernels.scan_forward(_directions(tuple(tensors), (reverse,)), z, softplus, keep_states)


@FAMILY.kernel("torch", "selective_scan_backward")
def _selective_scan_backward(dout: Tensor, dlast: Tensor | None, states: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, z, softplus, reverse = arguments
    directions = _directions(tuple(tensors), (reverse,), states, dlast)
    gradients, dz = kernels.scan_backward(directions, z, dout, dlast, states, softplus)
    return _flatten(gradients, (*tensors, z), dz)


@FAMILY.kernel("torch", "bidirectional_scan")
def _bidirectional_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, z, softplus, keep_states = arguments
    out, _, states = kernels.scan_forward(_directions(tuple(tensors), (False, True)), z, softplus, keep_states)
    return out, states


@FAMILY.kernel("torch", "bidirectional_scan_backward")
def _bidirectional_scan_backward(dout: Tensor, states: Tensor, *arguments: Any) -> list[Tensor]:
    *tensors, z, softplus = arguments
    directions = _directions(tuple(tensors), (False, True), states)
    gradients, dz = kernels.scan_backward(directions, z, dout, None, states, softplus)
    return _flatten(gradients, (*tensors, z), dz)


# --- compiled kernels -----------------------------------------------------------------------------------------------


def _register(backend: str, module: str) -> None:
    """Make `scan` and `scan_backward` of this module, which return None for what they do not do, kernels of the ops.

    It is imported when one is called: triton may be missing.
    """

    def compiled() -> Any:
        return importlib.import_module(module)

    def selective_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        *tensors, z, softplus, reverse, keep_states = arguments
        found: tuple[Tensor, Tensor, Tensor] | None
        found = compiled().scan(_directions(tuple(tensors), (reverse,)), z, softplus, keep_states)
        return found

    def bidirectional(*arguments: Any) -> tuple[Tensor, Tensor] | None:
        *tensors, z, softplus, keep_states = arguments
        found = compiled().scan(_directions(tuple(tensors), (False, True)), z, softplus, keep_states)
        return None if found is None else (found[0], found[2])

    def selective_backward(dout: Tensor, dlast: Tensor | None, states: Tensor, *arguments: Any) -> list[Tensor] | None:
        *tensors, z, softplus, reverse = arguments
        directions = _directions(tuple(tensors), (reverse,), states, dlast)
        found: list[Tensor] | None = compiled().scan_backward(directions, z, dout, dlast, states, softplus)
        return found

    def bidirectional_backward(dout: Tensor, states: Tensor, *arguments: Any) -> list[Tensor] | None:
        *tensors, z, softplus = arguments
        directions = _directions(tuple(tensors), (False, True), states)
        found: list[Tensor] | None = compiled().scan_backward(directions, z, dout, None, states, softplus)
        return found

    FAMILY.compiled_kernel(backend, "selective_scan", selective_scan)
    FAMILY.compiled_kernel(backend, "selective_scan_backward", selective_backward)
    FAMILY.compiled_kernel(backend, "bidirectional_scan", bidirectional)
    FAMILY.compiled_kernel(backend, "bidirectional_scan_backward", bidirectional_backward)


for _name in ("cuda", "triton", "native"):
    _register(_name, f"mamba_ssm.ops.selective_scan_{_name}")

# --- public functions -----------------------------------------------------------------------------------------------


def _check(name: str, value: Tensor | None, meaning: str, *shapes: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"`{name}` must have shape {meaning} = {expected}, got {tuple(value.shape)}")


def _check_projection(name: str, value: Tensor, u: Tensor, A: Tensor) -> None:
    batch, channels, length = u.shape
    last = 2 * length if A.is_complex() else length
    if value.dim() == 2:
        _check(name, value, "(d, n)", tuple(A.shape))
        if value.is_complex() != A.is_complex():
            raise ValueError(f"a constant `{name}` must be complex where A is and real where A is, got {value.dtype}")
        return
    if value.is_complex():
        raise ValueError(f"a varying `{name}` must be real (complex values as (re, im) pairs), got {value.dtype}")
    groups = value.shape[1] if value.dim() == 4 else 1
    if groups == 0 or channels % groups:
        raise ValueError(f"`{name}` has {groups} groups, which do not divide the {channels} channels of `u`")
    meaning = "(b, n, l) or (b, g, n, l)" + (" with l counted twice, for (re, im) pairs" if A.is_complex() else "")
    n = A.shape[1]
    _check(name, value, meaning, (batch, n, last), (batch, groups, n, last))


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Raise ValueError, naming the argument and what it got, if the arguments of a scan do not fit together.

    Raises:
        RuntimeError: they are on several devices.
        NotImplementedError: one carries a tangent of forward-mode differentiation.
    """
    require_one_device(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    refuse_forward_mode("selective_scan_fn", u, delta, A, B, C, D, z, delta_bias)
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"`u` must have shape (b, d, l) without empty axes, got {tuple(u.shape)}")
    channels = u.shape[1]
    if A.dim() != 2:
        raise ValueError(f"`A` must have shape (d, n), got {tuple(A.shape)}")
    _check("A", A, "(d, n)", (channels, A.shape[1]))
    _check("delta", delta, "(b, d, l)", tuple(u.shape))
    _check("z", z, "(b, d, l)", tuple(u.shape))
    _check("D", D, "(d,)", (channels,))
    _check("delta_bias", delta_bias, "(d,)", (channels,))
    for name, value in (("B", B), ("C", C)):
        _check_projection(name, value, u, A)
    if B.dim() == 4 and C.dim() == 4 and B.shape[1] != C.shape[1] and 1 not in (B.shape[1], C.shape[1]):
        raise ValueError(f"`B` and `C` must have the same number of groups, got {B.shape[1]} and {C.shape[1]}")


def _grouped(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Varying ones as (b, g, n, l), of as many groups: what has one group serves all those of the other."""
    B, C = (value[:, None] if value.dim() == 3 else value for value in (B, C))
    if B.dim() == C.dim() == 4 and B.shape[1] != C.shape[1]:
        groups = max(B.shape[1], C.shape[1])
        B, C = (value.expand(-1, groups, -1, -1) for value in (B, C))
    return B, C


def _keeps_states(*arguments: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in arguments)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run Mamba's input-dependent linear recurrence along the last axis.

        h[t] = exp(dt[t] * A) * h[t-1] + dt[t] * B[t] * u[t],     h[-1] = 0
        y[t] = <C[t], h[t]> + D * u[t];  2 * Re<C[t], h[t]> for complex A;  y *= silu(z) if z is given
    where dt = delta + delta_bias, through softplus if `delta_softplus`.

    Args:
        u: (b, d, l), any strides. fp64, fp32, fp16 or bf16; the result has this dtype and this layout.
        delta: (b, d, l).
        A: (d, n), real or complex, any n.
        B, C: each constant, (d, n) of A's kind, or varying, (b, n, l) or (b, g, n, l) with g groups of channels.
            Varying with complex A: real, (re, im) pairs interleaved along a last axis of length 2 l.
        D: (d,).
        z: (b, d, l).
        delta_bias: (d,).
        return_last_state: also return h[l - 1], (b, d, n), in the dtype of the state.

    Returns:
        y (b, d, l), or that and the last state. Differentiable in every tensor, through both results.

    Raises:
        ValueError: a shape or dtype above does not hold; names the argument and what it got.
        RuntimeError: an explicitly requested backend cannot run this call; says why and what to do.
    Accumulates in at least fp32. Definition: `selective_scan_ref`. Source: arXiv 2312.00752, Algorithm 2.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    out, last_state, _ = torch.ops.mamba_ssm.selective_scan(
        u, delta, A, *_grouped(B, C), D, delta_bias, z, delta_softplus, False,
        _keeps_states(u, delta, A, B, C, D, z, delta_bias),
    )  # fmt: skip
    return (out, last_state) if return_last_state else out


def bidirectional_scan(
    forward: Sequence[Any],
    backward: Sequence[Any],
    z: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """The sum of a scan from the first token and one from the last, gated by silu(z).

    Args:
        forward, backward: (u, delta, A, B, C, D, delta_bias) of each direction, as `selective_scan_fn` takes them,
            in the same (not flipped) order of tokens; the same forms of B and C in both.
        z: (b, d, l).

    Returns:
        (b, d, l), dtype and layout of the forward u. Source: arXiv 2401.09417, Algorithm 1.
    """
    arguments: list[Any] = []
    for u, delta, A, B, C, D, delta_bias in (forward, backward):
        check_scan(u, delta, A, B, C, D, z, delta_bias)
        arguments += [u, delta, A, *_grouped(B, C), D, delta_bias]
    keep = _keeps_states(*arguments, z)
    out, _ = torch.ops.mamba_ssm.bidirectional_scan(*arguments, z, delta_softplus, keep)
    return out


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan_fn` by its definition, one step at a time; see there for the arguments."""
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    out, last_state = reference.scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus=delta_softplus)
    return (out, last_state) if return_last_state else out


class SelectiveScanFn(torch.autograd.Function):
    """The name under which code calls `selective_scan_fn` through `apply`, with the same positional arguments."""

    apply = staticmethod(selective_scan_fn)
