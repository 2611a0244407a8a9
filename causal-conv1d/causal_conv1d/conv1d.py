"""The causal convolution ops: their contract (schema, fake, gradients), their PyTorch kernels, their public functions.

b batch, d channels, l length, w conv width
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_conv1d import conv1d_cuda, conv1d_native, reference
from causal_conv1d.backend import Family, no_second_derivative, refuse_forward_mode, require_one_device
from causal_conv1d.backend.triton import TRITON

FAMILY = Family(
    *("causal_conv1d", "CAUSAL_CONV1D_FORCE_FALLBACK", "causal_conv1d", "causal-conv1d"),
    cuda=conv1d_cuda.LIBRARY,
    native=conv1d_native.LIBRARY,
    triton=TRITON,
)

# --- contract -------------------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("causal_conv1d", "FRAGMENT")
LIBRARY.define("conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, bool silu, bool reverse) -> Tensor")
LIBRARY.define(
    "conv1d_backward(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, bool silu, bool reverse)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, Tensor? cache_seqlens, bool silu)"
    " -> Tensor"
)
FAMILY.implement(LIBRARY, "conv1d", "conv1d_backward", "conv1d_update")


@torch.library.register_fake("causal_conv1d::conv1d", lib=LIBRARY)
def _conv1d_fake(x: Tensor, weight: Tensor, bias: Any, seq_idx: Any, silu: bool, reverse: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("causal_conv1d::conv1d_backward", lib=LIBRARY)
def _conv1d_backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Any, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(x), weight.new_empty(weight.shape), dbias


@torch.library.register_fake("causal_conv1d::conv1d_update", lib=LIBRARY)
def _conv1d_update_fake(x: Tensor, conv_state: Tensor, weight: Tensor, bias: Any, seqlens: Any, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _conv1d_gradients(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    x, weight, bias, seq_idx = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.causal_conv1d.conv1d_backward(dout, x, weight, bias, seq_idx, ctx.silu, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None, None, None


torch.library.register_autograd(
    "causal_conv1d::conv1d", _conv1d_gradients, setup_context=_save_for_backward, lib=LIBRARY
)

torch.library.register_autograd("causal_conv1d::conv1d_backward", no_second_derivative("causal_conv1d_fn"), lib=LIBRARY)

# --- PyTorch kernels ------------------------------------------------------------------------------------------------


def correlate(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, reverse: bool) -> Tensor:
    """The convolution without its activation, as one multiply-add of the whole tensor per tap.

    All in one dtype. Several sets of taps (s, 1, d, w) and biases (s, 1, d) run at once over x (s, b, d, l). Works on
    any layout; every pass walks memory in the order of `x`. On a CPU this beats a grouped `conv1d` two to four times,
    and its channel-last output needs no transpose before the projections.
    """
    length, width = x.shape[-1], weight.shape[-1]
    taps = weight.movedim(-1, 0).contiguous()[..., None]  # (w, ..., d, 1), channels contiguous
    out = torch.empty_like(x)
    if bias is None:
        torch.mul(x, taps[-1], out=out)
    else:
        torch.addcmul(bias[..., None], x, taps[-1], out=out)
    for shift in range(1, min(width, length)):
        ahead, behind = slice(shift, None), slice(None, length - shift)
        target, source = (behind, ahead) if reverse else (ahead, behind)
        term = x[..., source]
        if seq_idx is not None:
            term = term * (seq_idx[:, ahead] == seq_idx[:, behind])[:, None]
        out[..., target].addcmul_(term, taps[width - 1 - shift])
    return out


def _working_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


@FAMILY.kernel("torch", "conv1d")
def _conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, silu: bool, reverse: bool
) -> Tensor:
    dtype = _working_dtype(x, weight)
    out = correlate(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), seq_idx, reverse)
    if silu:
        F.silu(out, inplace=True)
    return out.to(x.dtype)


@FAMILY.kernel("torch", "conv1d_backward")
def _conv1d_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _working_dtype(x, weight)
    columns, taps, grad = x.to(dtype), weight.to(dtype), dout.to(dtype)
    if silu:
        out = correlate(columns, taps, None if bias is None else bias.to(dtype), seq_idx, reverse)
        grad = torch.ops.aten.silu_backward(grad, out)
    # The gradient of a causal correlation is the same correlation, run the other way.
    dx = torch.empty_like(x).copy_(correlate(grad, taps, None, seq_idx, not reverse))
    length, width = x.shape[-1], weight.shape[-1]
    dweight = torch.zeros_like(taps, memory_format=torch.contiguous_format)
    for shift in range(min(width, length)):
        ahead, behind = slice(shift, None), slice(None, length - shift)
        target, source = (behind, ahead) if reverse else (ahead, behind)
        product = grad[..., target] * columns[..., source]
        if seq_idx is not None:
            product = product * (seq_idx[:, ahead] == seq_idx[:, behind])[:, None]
        dweight[:, width - 1 - shift] = product.sum((0, 2))
    dbias = weight.new_empty(0) if bias is None else grad.sum((0, 2)).to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias


@FAMILY.kernel("torch", "conv1d_update")
def _conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache_seqlens: Tensor | None,
    silu: bool,
) -> Tensor:
    return reference.conv1d_update_reference(x, conv_state, weight, bias, cache_seqlens, silu=silu).contiguous()


FAMILY.compiled_kernel("cuda", "conv1d", conv1d_cuda.conv1d)
FAMILY.compiled_kernel("cuda", "conv1d_backward", conv1d_cuda.conv1d_backward)
FAMILY.compiled_kernel("cuda", "conv1d_update", conv1d_cuda.conv1d_update)
FAMILY.compiled_kernel("native", "conv1d", conv1d_native.conv1d)
FAMILY.compiled_kernel("native", "conv1d_backward", conv1d_native.conv1d_backward)
FAMILY.compiled_kernel("native", "conv1d_update", conv1d_native.conv1d_update)
FAMILY.triton_kernel("causal_conv1d.conv1d_triton", "conv1d", "conv1d_backward", "conv1d_update")

# --- public functions -----------------------------------------------------------------------------------------------


def _wants_silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"`activation` must be None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def _check_shape(name: str, value: Tensor | None, meaning: str, shape: tuple[int, ...]) -> None:
    if value is not None and tuple(value.shape) != shape:
        raise ValueError(f"`{name}` must have shape {meaning} = {shape}, got {tuple(value.shape)}")


def _check_weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require_one_device(x=x, weight=weight, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"`weight` must have shape (d, w), got {tuple(weight.shape)}")
    _check_shape("weight", weight, "(d, w)", (x.shape[1], weight.shape[1]))
    _check_shape("bias", bias, "(d,)", (x.shape[1],))


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Correlate each channel with its own `w` taps, causally; the last tap meets the current column.

        out[b, d, l] = act(bias[d] + sum_k weight[d, k] * x[b, d, l - (w - 1) + k])

    Args:
        x: (b, d, l), any strides. fp64, fp32, fp16 or bf16; the result has this dtype and this layout.
        weight: (d, w), any w; its dtype may differ from that of `x`.
        bias: (d,).
        seq_idx: (b, l) integers; a tap counts only where its column has the index of the output's. Excludes states.
        initial_states: (b, d, w - 1), the columns before the first; zero if None.
        return_final_states: also return the last w - 1 columns of what was read, (b, d, w - 1) in the dtype of `x`.
        final_states_out: (b, d, w - 1), where to put and return those; used only if they are asked for.
        activation: None, "silu" or "swish" (the same).

    Returns:
        (b, d, l), or that and the final states. Differentiable in `x`, `weight`, `bias` and `initial_states`.

    Raises:
        ValueError: a shape above does not hold, or `seq_idx` is given together with states.
        NotImplementedError: another activation.
        RuntimeError: an explicitly requested backend cannot run this call.
    Accumulates in at least fp32. Definition: `reference.conv1d_reference`.
    """
    silu = _wants_silu(activation)
    refuse_forward_mode("causal_conv1d_fn", x, weight, bias, initial_states)
    if isinstance(seq_idx, str):
        raise TypeError(f"`seq_idx` must be a tensor, got {seq_idx!r}; pass the activation as activation={seq_idx!r}")
    if x.dim() != 3:
        raise ValueError(f"`x` must have shape (b, d, l), got {tuple(x.shape)}")
    _check_weights(x, weight, bias)
    batch, channels, length = x.shape
    history = weight.shape[1] - 1
    _check_shape("seq_idx", seq_idx, "(b, l)", (batch, length))
    _check_shape("initial_states", initial_states, "(b, d, w - 1)", (batch, channels, history))
    if seq_idx is not None and (initial_states is not None or return_final_states):
        raise ValueError(
            "`seq_idx` cannot be combined with `initial_states` or `return_final_states`: pass one or the other"
        )
    columns = x if initial_states is None else prepend(initial_states.to(x.dtype), x)
    out = torch.ops.causal_conv1d.conv1d(columns, weight, bias, seq_idx, silu, False)[..., -length:]
    if not return_final_states:
        return out
    final_states = last_columns(columns, history)
    if final_states_out is None:
        return out, final_states.contiguous()
    _check_shape("final_states_out", final_states_out, "(b, d, w - 1)", (batch, channels, history))
    return out, final_states_out.copy_(final_states)


def last_columns(x: Tensor, count: int) -> Tensor:
    """The last columns of x (b, d, l), with zeros before them where there are fewer."""
    return F.pad(x, (max(0, count - x.shape[-1]), 0))[..., max(0, x.shape[-1] - count) :]


def prepend(states: Tensor, x: Tensor) -> Tensor:
    """(b, d, w - 1 + l), in the layout of `x`."""
    if x.stride(1) == 1:
        return torch.cat([states.transpose(1, 2), x.transpose(1, 2)], dim=1).transpose(1, 2)
    return torch.cat([states, x], dim=2)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """Convolve new columns after the history kept in `conv_state`, which takes them in, in place.

    Args:
        x: (b, d) or (b, d, l), the new columns; the result has this shape and dtype.
        conv_state: (b, d, s), s >= w - 1: a sliding window of the last s columns or, with `cache_seqlens`, a
            circular buffer. Changed in place.
        weight: (d, w).
        bias: (d,).
        activation: None, "silu" or "swish" (the same).
        cache_seqlens: (b,) int32, how many columns each sequence has stored so far.

    Raises:
        ValueError: a shape above does not hold; names the argument and what it got.
        NotImplementedError: another activation.
    Accumulates in at least fp32. Not differentiable. Definition: `reference.conv1d_update_reference`.
    """
    silu = _wants_silu(activation)
    if x.dim() not in (2, 3):
        raise ValueError(f"`x` must have shape (b, d) or (b, d, l), got {tuple(x.shape)}")
    columns = x[..., None] if x.dim() == 2 else x
    _check_weights(columns, weight, bias)
    batch, channels, _ = columns.shape
    size = conv_state.shape[-1]
    _check_shape("conv_state", conv_state, "(b, d, s)", (batch, channels, size))
    _check_shape("cache_seqlens", cache_seqlens, "(b,)", (batch,))
    if size < weight.shape[1] - 1:
        raise ValueError(f"`conv_state` must hold at least w - 1 = {weight.shape[1] - 1} columns, got {size}")
    with torch.no_grad():
        out = torch.ops.causal_conv1d.conv1d_update(columns, conv_state, weight, bias, cache_seqlens, silu)
    return out[..., 0] if x.dim() == 2 else out


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` by its definition, in plain differentiable PyTorch; see there for the arguments."""
    silu = _wants_silu(activation)
    out = reference.conv1d_reference(x, weight, bias, initial_states=initial_states, silu=silu)
    if not return_final_states:
        return out
    history = weight.shape[1] - 1
    read = x if initial_states is None else torch.cat([initial_states.to(x.dtype), x], dim=-1)
    final_states = last_columns(read, history)
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` by its definition; see there for the arguments."""
    silu = _wants_silu(activation)
    columns = x[..., None] if x.dim() == 2 else x
    out = reference.conv1d_update_reference(columns, conv_state, weight, bias, cache_seqlens, silu=silu)
    return out[..., 0] if x.dim() == 2 else out


class CausalConv1dFn(torch.autograd.Function):
    """The name under which code calls `causal_conv1d_fn` through `apply`, with the same positional arguments."""

    apply = staticmethod(causal_conv1d_fn)
