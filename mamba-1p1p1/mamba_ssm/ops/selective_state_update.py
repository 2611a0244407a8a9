"""One token of Mamba's recurrence, for decoding step by step.

Glossary: b batch, h heads, d channels (of one head), n state, g groups that share B and C.

Source: arXiv 2312.00752, Alg. 2, at length 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from causal_conv1d.backend import differentiates_forward
from mamba_ssm.ops.selective_scan import FAMILY

__all__ = ["selective_state_update", "selective_state_update_ref"]


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Advance `state` by one token, in place, and return the token's output.

        state = exp(dt * A) * state + dt * B * x
        out = <C, state> + D * x;  out *= silu(z) if z is given
    where dt includes `dt_bias`, and then goes through softplus if `dt_softplus`.

    Args:
        state: (b, d, n) or (b, h, d, n), any floating dtype, which it keeps; overwritten.
        x, dt, z: (b, d) or (b, h, d). The result has x's dtype.
        A: (d, n) or (h, d, n), real.
        B, C: (b, n) or (b, g, n), where g divides h; head i uses group i // (h / g).
        D, dt_bias: (d,) or (h, d).

    Returns:
        out, x's shape and dtype.

    Raises:
        ValueError: a shape above does not hold.

    Computes in at least fp32 and rounds `state` only when it is stored. Autograd follows all arguments, the
    overwritten state included; one triton kernel runs a call on a GPU that nothing differentiates. Definition:
    `selective_state_update_ref`.
    """
    _check_shapes(state, x, dt, A, B, C, D, z, dt_bias)
    arguments = (state, x, dt, A, B, C, D, z, dt_bias)
    kernel = _advance if _is_followed(*arguments) else FAMILY.choose("selective_state_update", state.device.type)
    out: Tensor = kernel(*arguments, dt_softplus)
    return out


def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Define `selective_state_update` head by head, in the dtypes that are given (dt is not widened).

    Same arguments, result and in-place `state`; shapes are taken on trust.
    """
    if state.dim() == 4:
        heads_per_group = state.shape[1] // B.shape[1]
        outputs = []
        for i in range(state.shape[1]):
            group = i // heads_per_group
            D_i, z_i = None if D is None else D[i], None if z is None else z[:, i]
            bias_i = None if dt_bias is None else dt_bias[i]
            one_head = (state[:, i], x[:, i], dt[:, i], A[i], B[:, group], C[:, group], D_i, z_i, bias_i)
            outputs.append(selective_state_update_ref(*one_head, dt_softplus=dt_softplus))
        return torch.stack(outputs, dim=1)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = functional.softplus(dt)
    state.copy_(state * torch.exp(dt[:, :, None] * A) + (dt * x)[:, :, None] * B[:, None, :])
    out = (state.to(C.dtype) * C[:, None, :]).sum(-1)
    if D is not None:
        out = out + D * x
    if z is not None:
        out = out * functional.silu(z)
    return out.to(x.dtype)


@FAMILY.kernel("torch", "selective_state_update")
def _advance(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """Compute `selective_state_update` in plain PyTorch, which autograd follows."""
    wide = torch.float32
    for tensor in (state, x, dt, A):
        wide = torch.promote_types(wide, tensor.dtype)
    u = x.to(wide)
    step = dt.to(wide) if dt_bias is None else dt.to(wide) + dt_bias.to(wide)
    if dt_softplus:
        step = functional.softplus(step)
    heads = state.shape[1] if state.dim() == 4 else None
    # Autograd keeps the old state for the decay's gradient, so it must survive the overwriting.
    old_state = state.to(wide, copy=torch.is_grad_enabled())

    new_state = torch.exp(step.unsqueeze(-1) * A.to(wide)) * old_state
    new_state = new_state + (step * u).unsqueeze(-1) * _per_channel(B.to(wide), heads)
    state.copy_(new_state)
    out = (new_state * _per_channel(C.to(wide), heads)).sum(-1)
    if D is not None:
        out = out + u * D.to(wide)
    if z is not None:
        out = out * functional.silu(z.to(wide))
    return out.to(x.dtype)


FAMILY.triton_kernel("mamba_ssm.ops.selective_state_update_triton", "selective_state_update")
FAMILY.compose("selective_state_update")


def _is_followed(*tensors: Tensor | None) -> bool:
    """Whether autograd, a compiler or a transform follows these: through PyTorch's own operations only."""
    if torch.compiler.is_compiling() or differentiates_forward() or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)


def _per_channel(projection: Tensor, heads: int | None) -> Tensor:
    """Bring B or C from (b, n) or (b, g, n) to a shape that broadcasts over the state."""
    if heads is not None:
        projection = projection.repeat_interleave(heads // projection.shape[1], dim=1)
    return projection.unsqueeze(-2)


def _check_shapes(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> None:
    """Raise the ValueErrors of `selective_state_update`."""
    if state.dim() not in (3, 4):
        raise ValueError(f"`state` must have shape (b, d, n) or (b, h, d, n), got {tuple(state.shape)}.")
    if A.is_complex():
        raise ValueError("`A` must be real, got a complex tensor; selective_scan_fn takes complex A.")
    batch, n = state.shape[0], state.shape[-1]
    per_token, per_channel = state.shape[:-1], state.shape[1:-1]
    projection = (batch, n) if state.dim() == 3 else (batch, B.shape[1] if B.dim() == 3 else 1, n)
    wanted = [("x", x, per_token), ("dt", dt, per_token), ("z", z, per_token), ("A", A, state.shape[1:])]
    wanted += [("D", D, per_channel), ("dt_bias", dt_bias, per_channel)]
    for name, tensor, shape in [*wanted, ("B", B, projection), ("C", C, projection)]:
        if tensor is not None and tensor.shape != torch.Size(shape):
            raise ValueError(
                f"`{name}` must have shape {tuple(shape)} because `state` has shape {tuple(state.shape)}, "
                f"got {tuple(tensor.shape)}."
            )
    if state.dim() == 4 and state.shape[1] % B.shape[1] != 0:
        raise ValueError(
            f"`B` and `C` have {B.shape[1]} groups, which must divide the {state.shape[1]} heads of `state`."
        )
